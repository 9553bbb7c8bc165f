"""kpn: knowledge projection (Zhang, Ning, He, 2017, arXiv 1710.09505): project teacher features into a thin student.

A route joins a teacher layer to a student layer of equal spatial size through a 1x1 convolution P. With r the
projected teacher feature, v the student's own output at that layer, and h = 1 where r >= 0, else `negative`:

    L_KP = mean(h |r - v|)                                                              (eq. 9-10)
    stage 1: L_p(rear(r)) + L_KP; the rear part and P learn from L_p, the front part only from L_KP
    stage 2: L_p(student(x)) + lambda L_KP, with lambda fading from `weight` to 0       (eq. 7)

In stage 2 P goes on learning, from L_KP, as Algorithm 1 has it; only its weight decay becomes 0. The known risk is that
P and the front part agree by shrinking together. Standardising both sides (below) takes that way out: of a r and a v
with any a > 0 the gap is that of r and v.
Several routes are taught side by side, each with its own copy of the student, with one teacher pass per batch; after
each search period the one with the worst joint loss on validation data is dropped (section 3.4).

Deviations from the paper, and why:
- Algorithm 1 drops the smallest loss; its text says the worst. The text is followed.
- The mask of eq. 9 has the teacher's channels where a tensor of the student's is multiplied; the sign of r is used.
- r and v are standardised per channel before they are compared; mean and spread count apart, a little. Where the
  student cannot foresee r, the plain L1 is smallest for a constant v: its BatchNorm gains vanish, and stage 2 starts
  from a student that hardly learns (measured: docs/results.md). Channels of r with next to no spread are divided by a
  hundredth of the mean spread.
- In stage 1 the front part has no other loss, so lambda would only scale its steps, which are far too small with a
  mean over elements. There L_KP is summed over channels. Everywhere else, and when routes are compared, it is a mean.
- The route search lies within stage 1. On validation data L_p is that of the student itself, nothing injected: a route
  is worth what its student has become, not how well its rear part reads the teacher. lambda is `weight` for all.
- Candidates are layers that everything passes through, because only there does an injected feature replace the
  student's front part. To bound the memory, each student layer is paired only with the teacher layer of the nearest
  receptive field, and of those routes the `candidates` with the deepest student layers are tried.
- Found layers are pre-activations. Where a named one of the student's has no negative outputs, r passes a ReLU, too.
- `reentry` is the share of stage-2 steps that go back to stage 1, drawn at random; the paper gives no frequency.
- Each stage runs through a learning-rate schedule of its own (the paper gives none); stage 2 may `start` within it, for
  few labels at the full rate undo what stage 1 taught.
- With `keep` above 1 that many routes are left by the search and taught together: each injects into the same student,
  which thereby learns part by part. The paper ends with one.
- `logits` mixes softened logits (Hinton et al., 2015) into L_p, over the classes that the teacher knows, too, and for
  samples of these classes; for the others labels alone count.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import Taps
from edgekd.training.layer_matching import Candidate, candidates, check_partners, named
from edgekd.training.losses import (
    check_shares,
    check_temperature,
    check_weights,
    imitation,
    precise,
    soft_kl,
    supervised,
)
from edgekd.training.teachers import columns, teacher

MOMENTS = 0.1  # weight of mean and spread beside the standardised features
DEAD = 0.01  # of the mean spread of the projected channels: the least by which one is divided
NAMED = 4  # routes that may be named, however few `candidates` are


@dataclass(frozen=True)
class Route(Settings):
    """Where knowledge leaves the teacher and enters the student: dotted layer paths."""

    teacher: str
    student: str


@dataclass(frozen=True)
class KPN(Method):
    routes: tuple[Route, ...] = ()  # none: candidates are found
    keep: int = 1  # routes that are left in the end, and taught together
    candidates: int = 4  # routes taught side by side at first, each with a student; of named ones always up to 4
    receptive_tolerance: float = 0.2  # beta: receptive fields of a route's layers may differ by this share
    stage1: float = 0.4  # share of the budget
    search: float = 0.2  # share of the budget, within stage 1, over which routes are dropped
    start: float = 0.0  # where in the learning-rate schedule stage 2 begins: 0 is the full rate, 0.5 half of it
    weight: float = 0.6  # lambda
    negative: float = 0.25  # eta
    projection_decay: float = 1e-3  # weight decay of P in stage 1; none in stage 2
    reentry: float = 0.0  # share of stage-2 steps that go back to stage 1
    logits: float = 0.0  # weight of softened logits within L_p
    temperature: float = 4.0
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        check_shares(stage1=self.stage1, search=self.search, reentry=self.reentry, logits=self.logits)
        if self.search > self.stage1:
            raise ConfigError(f"search ({self.search}) is longer than stage1 ({self.stage1})", hint="search within it")
        if not 0 <= self.start < 1:
            raise ConfigError(f"start is {self.start}", hint="use a share from 0 to below 1")
        for name in ("candidates", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use 1 or more; 1 is the least")
        if not self.receptive_tolerance >= 0:
            raise ConfigError(f"receptive_tolerance is {self.receptive_tolerance}", hint="use a share of 0 or more")
        check_weights(weight=self.weight, negative=self.negative, projection_decay=self.projection_decay)
        check_temperature(self.temperature)
        if len(self.routes) > (most := max(self.candidates, NAMED)):
            raise ConfigError(
                f"{len(self.routes)} routes are named, but at most {most} are taught side by side",
                hint=f"name fewer, or set candidates to {len(self.routes)}: each is taught with a student of its own",
            )

    def teach(self, lesson: Lesson) -> Script:
        first = next(lesson.sample(1)).x[:2]
        nets = teacher(lesson), lesson.student
        found = [named(*nets, r.teacher, r.student, first) for r in self.routes]
        chosen = found or candidates(*nets, first, self.receptive_tolerance)[: self.candidates]
        keep = min(self.keep, len(chosen))
        check_partners(chosen, keep)
        task = Imitation(lesson, self)
        pupils = [Pupil((Way(route, first),), lesson.student, self.weight) for route in chosen]
        history: dict[str, list[float]] = {p.name: [] for p in pupils}
        dropped: dict[str, int] = {}
        search, end = self.boundaries(lesson.epochs, len(pupils) - keep)
        spent = 0
        periods = [len(p) for p in np.array_split(np.arange(search), min(search, len(pupils) - keep))] if search else []
        for number, period in enumerate(periods, 1):
            outcome = yield self.first_stage(f"search{number}", lesson, task, pupils, spent, period, end)
            spent += period
            ranked = sorted(pupils, key=lambda p: p.joint(outcome.losses))
            for pupil in pupils:
                history[pupil.name].append(round(pupil.joint(outcome.losses), 4))
            left = round((len(chosen) - keep) * (1 - spent / search)) + keep
            pupils = [p for p in ranked if p in ranked[:left]]
            dropped |= {p.name: number for p in ranked[left:]}
        winner = Pupil(tuple(p.ways[0] for p in pupils), pupils[0].student, self.weight)
        lesson.note("routes", [told(r, history[r.name], dropped.get(r.name)) for r in chosen])
        if spent < end:
            yield self.first_stage("project", lesson, task, [winner], spent, end - spent, end)
        lesson.student.load_state_dict(winner.student.state_dict())
        yield self.second_stage(lesson, task, Pupil(winner.ways, lesson.student, self.weight, copied=False), end)
        return {"student": lesson.student}

    def boundaries(self, epochs: int, drops: int) -> tuple[int, int]:
        """The epochs at which the search, which drops so many routes, and stage 1 end."""
        search = max(1, round(self.search * epochs)) if drops else 0
        end = max(search, round(self.stage1 * epochs))
        if end >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for the joint stage (search {search}, stage 1 until {end})",
                hint="give more epochs, or less stage1",
            )
        return search, end

    def first_stage(
        self, name: str, lesson: Lesson, task: Imitation, pupils: list[Pupil], spent: int, epochs: int, end: int
    ) -> Phase:
        known = Taps(teacher(lesson), *{w.route.teacher.path for p in pupils for w in p.ways})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                answer, features = known(batch.x)
            losses: dict[str, Tensor] = {}
            for pupil in pupils:
                learnt, gaps = self.guided(pupil, batch.x, features, inject=torch.is_grad_enabled())
                losses[f"{pupil.name}:task"] = task(learnt, answer, batch.y)
                losses[f"{pupil.name}:project"] = gaps
            return losses

        return Phase(
            name,
            trains=tuple(module for p in pupils for module in (p.student, *p.projections)),
            loss=loss,
            epochs=epochs,
            span=(spent / end, (spent + epochs) / end),
            decay={projection: self.projection_decay for p in pupils for projection in p.projections},
        )

    def guided(self, pupil: Pupil, x: Tensor, features: dict[str, Tensor], inject: bool) -> tuple[Tensor, Tensor]:
        """Stage 1: the answer with projected features injected (or not), and L_KP summed over channels and routes."""
        projected = {w.route.student.path: w.projection(features[w.route.teacher.path]) for w in pupil.ways}
        answer, own = pupil.taps(x, projected if inject else {})
        gaps = [
            w.route.student.channels * self.gap(projected[p].detach(), own[p])
            for w in pupil.ways
            for p in [w.route.student.path]
        ]
        return answer, torch.stack(gaps).sum()

    def second_stage(self, lesson: Lesson, task: Imitation, pupil: Pupil, spent: int) -> Phase:
        known = Taps(teacher(lesson), *{w.route.teacher.path for w in pupil.ways})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                answer, features = known(batch.x)
            if torch.is_grad_enabled() and self.reentry and torch.rand(()) < self.reentry:
                learnt, gaps = self.guided(pupil, batch.x, features, inject=True)
                return {"task": task(learnt, answer, batch.y), "project": gaps}
            learnt, own = pupil.taps(batch.x)
            gaps = torch.stack(
                [self.gap(w.projection(features[w.route.teacher.path]), own[w.route.student.path]) for w in pupil.ways]
            ).sum()
            return {"task": task(learnt, answer, batch.y), "project": self.weight * (1 - batch.progress) * gaps}

        return Phase(
            "joint",
            trains=(lesson.student, *pupil.projections),
            loss=loss,
            epochs=lesson.epochs - spent,
            span=(self.start, 1.0),
            decay=dict.fromkeys(pupil.projections, 0.0),
        )

    def gap(self, projected: Tensor, own: Tensor) -> Tensor:
        """L_KP of (N, C, H, W) features, standardised per channel, with a little for what that takes out."""
        r, v = precise(projected), precise(own)
        (level, spread), (own_level, own_spread) = moments(r), moments(v)
        spread = torch.maximum(spread, DEAD * spread.mean().detach())  # else one constant channel outweighs all others
        relaxed = torch.where(r >= 0, 1.0, self.negative)
        form = (relaxed * ((r - level) / spread - (v - own_level) / own_spread).abs()).mean()
        size = (((level - own_level).abs() + (spread - own_spread).abs()) / spread).mean()
        return form + MOMENTS * size


class Way:
    """One route with its projection."""

    def __init__(self, route: Candidate, x: Tensor) -> None:
        self.route = route
        projection = nn.Conv2d(route.teacher.channels, route.student.channels, 1)
        self.projection = (projection if route.student.signed else nn.Sequential(projection, nn.ReLU())).to(x.device)


class Pupil:
    """A student with the routes that it is taught on."""

    def __init__(self, ways: tuple[Way, ...], student: nn.Module, weight: float, copied: bool = True) -> None:
        self.ways, self.weight = ways, weight
        self.name = "+".join(w.route.name for w in ways)
        self.student = copy.deepcopy(student) if copied else student
        self.projections = tuple(w.projection for w in ways)
        self.taps = Taps(self.student, *(w.route.student.path for w in ways))

    def joint(self, losses: dict[str, float]) -> float:
        """lambda L_KP + L_p of its one route, L_KP as a mean over channels."""
        (way,) = self.ways
        return losses[f"{self.name}:task"] + self.weight * losses[f"{self.name}:project"] / way.route.student.channels


class Imitation:
    """L_p: what labels say, mixed with the teacher's softened logits where it knows the classes."""

    def __init__(self, lesson: Lesson, method: KPN) -> None:
        known = columns(lesson)
        self.method, self.dense = method, lesson.dense
        self.own = [label for label, column in enumerate(known) if column is not None]
        self.theirs = [column for column in known if column is not None]
        self.all = len(self.own) == lesson.classes
        if method.logits and len(self.own) < 2:
            raise ConfigError(
                f"logits is {method.logits}, but the teacher knows {len(self.own)} of the {lesson.classes} classes",
                hint="set logits to 0: hints alone teach across tasks",
            )

    def __call__(self, learnt: Tensor, answer: Tensor, truth: Tensor) -> Tensor:
        share, m = self.method.logits, self.method
        if share == 0:
            return supervised(learnt, truth)
        if self.dense:
            return (1 - share) * supervised(learnt, truth) + share * imitation(learnt, answer, m.temperature)
        if self.all:
            soft = soft_kl(learnt, answer[:, self.theirs], m.temperature, m.standardise)
            return (1 - share) * supervised(learnt, truth) + share * soft
        common = torch.isin(truth, torch.tensor(self.own, device=truth.device))
        part = share * common.sum() / len(truth)
        labels = supervised(learnt, truth) - part * supervised(learnt, truth.where(common, -1))
        if not common.any():
            return labels
        soft = soft_kl(learnt[common][:, self.own], answer[common][:, self.theirs], m.temperature, m.standardise)
        return labels + part * soft


def moments(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, C, 1, 1)."""
    over = (0, 2, 3)
    return feature.mean(over, keepdim=True), feature.std(over, keepdim=True) + 1e-5


def told(route: Candidate, losses: list[float], dropped: int | None) -> dict[str, object]:
    """A route as the report shows it."""
    return {
        "teacher": route.teacher.path,
        "student": route.student.path,
        "size": list(route.student.size),
        "receptive": [route.teacher.receptive, route.student.receptive],
        "losses": losses,
        "dropped": dropped,
        "won": dropped is None,
    }


PLUGIN = KPN
