"""kpn: knowledge projection (Zhang, Ning, He, 2017, arXiv 1710.09505): project teacher features into a thin student.

A route joins a teacher layer to a student layer of equal spatial size through a 1x1 convolution P. With r the
projected teacher feature, v the student's own output at that layer, and h = 1 where r >= 0, else `negative`:

    L_KP = mean(h |r - v|)                                                              (eq. 9-10)
    stage 1: L_p(rear(r)) + L_KP; the rear part and P learn from L_p, the front part only from L_KP
    stage 2: L_p(student(x)) + lambda L_KP, with lambda fading from `weight` to 0       (eq. 7)

Several routes are taught side by side, each with its own copy of the student, with one teacher pass per batch; after
each search period the one with the worst joint loss on validation data is dropped (section 3.4).

Deviations from the paper, and why:
- Algorithm 1 drops the smallest loss; its text says the worst. The text is followed.
- The mask of eq. 9 has the teacher's channels where a tensor of the student's is multiplied; the sign of r is used.
- r and v are standardised per channel before they are compared; mean and spread count apart, a little. Where the
  student cannot foresee r, the plain L1 is smallest for a constant v: its BatchNorm gains vanish, and stage 2 starts
  from a student that hardly learns (measured: docs/results.md).
- In stage 1 the front part has no other loss, so lambda would only scale its steps, which are far too small with a
  mean over elements. There L_KP is summed over channels. Everywhere else, and when routes are compared, it is a mean.
- The route search lies within stage 1. On validation data L_p is that of the student itself, nothing injected: a route
  is worth what its student has become, not how well its rear part reads the teacher. lambda is `weight` for all.
- Candidates are layers that everything passes through, because only there does an injected feature replace the
  student's front part. To bound the memory, each student layer is paired only with the teacher layer of the nearest
  receptive field, and of those routes the `candidates` with the deepest student layers are tried.
- The paper's random re-entries into stage 1 are not built; their frequency is not given.
- Each stage runs through a learning-rate schedule of its own (the paper gives none).
- `logits` adds softened logits (Hinton et al., 2015) to L_p where teacher and student share the classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.errors import ConfigError
from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.core.settings import Settings
from edgekd.learn.layers import Layer, cuts, layers, look
from edgekd.learn.losses import soft_kl, supervised
from edgekd.learn.taps import Taps

MOMENTS = 0.1  # weight of mean and spread beside the standardised features


@dataclass(frozen=True)
class Route(Settings):
    """Where knowledge leaves the teacher and enters the student: dotted layer paths."""

    teacher: str
    student: str


@dataclass(frozen=True)
class KPN(Method):
    routes: tuple[Route, ...] = ()  # none: candidates are found
    candidates: int = 4  # routes taught side by side at first, when they are found
    receptive_tolerance: float = 0.2  # beta: receptive fields of a route's layers may differ by this share
    stage1: float = 0.4  # share of the budget
    search: float = 0.2  # share of the budget, within stage 1, over which routes are dropped
    weight: float = 0.6  # lambda
    negative: float = 0.25  # eta
    projection_decay: float = 1e-3  # weight decay of P in stage 1; none in stage 2
    logits: float = 0.0  # weight of softened logits within L_p
    temperature: float = 4.0

    def __post_init__(self) -> None:
        for name in ("stage1", "search", "logits"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a share between 0 and 1")
        if self.search > self.stage1:
            raise ConfigError(f"search ({self.search}) is longer than stage1 ({self.stage1})", hint="search within it")
        if self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates}", hint="use 1 or more; 1 searches nothing")

    def teach(self, lesson: Lesson) -> Script:
        first = next(lesson.sample(1)).x[:2]
        chosen = [named(lesson, r, first) for r in self.routes] or self.candidate_routes(lesson, first)
        pupils = [Pupil(route, lesson, first, self) for route in chosen]
        history: dict[str, list[float]] = {p.name: [] for p in pupils}
        dropped: dict[str, int] = {}
        search, end = self.boundaries(lesson.epochs, len(pupils))
        spent = 0
        periods = [len(p) for p in np.array_split(np.arange(search), min(search, len(pupils) - 1))] if search else []
        for number, period in enumerate(periods, 1):
            outcome = yield self.first_stage(f"search{number}", lesson, pupils, spent, period, end)
            spent += period
            ranked = sorted(pupils, key=lambda p: p.joint(outcome.losses))
            for pupil in pupils:
                history[pupil.name].append(round(pupil.joint(outcome.losses), 4))
            left = round((len(chosen) - 1) * (1 - spent / search)) + 1
            pupils = [p for p in pupils if p in ranked[:left]]
            dropped |= {p.name: number for p in ranked[left:]}
        (winner,) = pupils
        lesson.note("routes", [told(r, history[r.name], dropped.get(r.name)) for r in chosen])
        lesson.note("chosen", {"teacher": winner.route.teacher.path, "student": winner.route.student.path})
        if spent < end:
            yield self.first_stage("project", lesson, [winner], spent, end - spent, end)
        lesson.student.load_state_dict(winner.student.state_dict())
        winner.student = lesson.student
        yield self.second_stage(lesson, winner, end)
        return {"student": lesson.student}

    def boundaries(self, epochs: int, routes: int) -> tuple[int, int]:
        """The epochs at which the search and stage 1 end."""
        search = max(1, round(self.search * epochs)) if routes > 1 else 0
        end = max(search, round(self.stage1 * epochs))
        if end >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for the joint stage (search {search}, stage 1 until {end})",
                hint="give more epochs, or less stage1",
            )
        return search, end

    def candidate_routes(self, lesson: Lesson, x: Tensor) -> list[Candidate]:
        """For each student layer the teacher layer of equal size with the nearest receptive field; deep ones first."""
        wide, thin = layers(lesson.teachers[0], x), layers(lesson.student, x)
        found = []
        for student in reversed(thin):
            fitting = [Candidate(t, student) for t in wide if t.size == student.size]
            near = min(fitting, key=lambda c: c.mismatch, default=None)
            if near and near.mismatch <= self.receptive_tolerance:
                found.append(near)
        if not found:
            sizes = [sorted({"{}x{}".format(*layer.size) for layer in side}) for side in (wide, thin)]
            raise ConfigError(
                "no layer of the student fits one of the teacher in size and receptive field "
                f"(teacher: {', '.join(sizes[0])}; student: {', '.join(sizes[1])}; "
                f"receptive_tolerance {self.receptive_tolerance})",
                hint="raise receptive_tolerance, name `routes`, or choose a student that shrinks maps alike",
            )
        return found[: self.candidates]

    def first_stage(self, name: str, lesson: Lesson, pupils: list[Pupil], spent: int, epochs: int, end: int) -> Phase:
        teacher = Taps(lesson.teachers[0], *{p.route.teacher.path for p in pupils})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                answer, known = teacher(batch.x)
            losses: dict[str, Tensor] = {}
            for pupil in pupils:
                projected = pupil.projection(known[pupil.route.teacher.path])
                inject = {pupil.route.student.path: projected} if torch.is_grad_enabled() else {}
                logits, own = pupil.taps(batch.x, inject)
                losses[f"{pupil.name}:task"] = self.task(logits, answer, batch.y)
                gap = self.gap(projected.detach(), own[pupil.route.student.path])
                losses[f"{pupil.name}:project"] = pupil.route.student.channels * gap
            return losses

        return Phase(
            name,
            trains=tuple(module for p in pupils for module in (p.student, p.projection)),
            loss=loss,
            epochs=epochs,
            span=(spent / end, (spent + epochs) / end),
            decay={p.projection: self.projection_decay for p in pupils},
        )

    def second_stage(self, lesson: Lesson, pupil: Pupil, spent: int) -> Phase:
        teacher = Taps(lesson.teachers[0], pupil.route.teacher.path)
        taps = Taps(lesson.student, pupil.route.student.path)

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                answer, known = teacher(batch.x)
            logits, own = taps(batch.x)
            projected = pupil.projection(known[pupil.route.teacher.path])
            fading = self.weight * (1 - batch.progress)
            return {
                "task": self.task(logits, answer, batch.y),
                "project": fading * self.gap(projected, own[pupil.route.student.path]),
            }

        return Phase(
            "joint",
            trains=(lesson.student, pupil.projection),
            loss=loss,
            epochs=lesson.epochs - spent,
            decay={pupil.projection: 0.0},
        )

    def task(self, logits: Tensor, answer: Tensor, labels: Tensor) -> Tensor:
        """L_p: cross-entropy, with softened logits mixed in if wanted."""
        if self.logits == 0:
            return supervised(logits, labels)
        soft = soft_kl(logits, answer, self.temperature)
        return (1 - self.logits) * supervised(logits, labels) + self.logits * soft

    def gap(self, projected: Tensor, own: Tensor) -> Tensor:
        """L_KP of (N, C, H, W) features, standardised per channel, with a little for what that takes out."""
        r, v = projected.float(), own.float()
        (level, spread), (own_level, own_spread) = moments(r), moments(v)
        relaxed = torch.where(r >= 0, 1.0, self.negative)
        form = (relaxed * ((r - level) / spread - (v - own_level) / own_spread).abs()).mean()
        size = (((level - own_level).abs() + (spread - own_spread).abs()) / spread).mean()
        return form + MOMENTS * size


@dataclass(frozen=True)
class Candidate:
    teacher: Layer
    student: Layer

    @property
    def mismatch(self) -> float:
        """By how much the receptive fields differ, as a share of the teacher's; at most beta (section 3.4)."""
        return abs(self.student.receptive - self.teacher.receptive) / max(self.teacher.receptive, 1)

    @property
    def name(self) -> str:
        return f"{self.teacher.path}>{self.student.path}"


class Pupil:
    """One route with what it trains: a copy of the student, and the projection."""

    def __init__(self, route: Candidate, lesson: Lesson, x: Tensor, method: KPN) -> None:
        self.route, self.name, self.weight = route, route.name, method.weight
        self.student = copy.deepcopy(lesson.student)
        self.projection = nn.Conv2d(route.teacher.channels, route.student.channels, 1).to(x.device)
        self.taps = Taps(self.student, route.student.path)

    def joint(self, losses: dict[str, float]) -> float:
        return losses[f"{self.name}:task"] + self.weight * losses[f"{self.name}:project"] / self.route.student.channels


def moments(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, C, 1, 1)."""
    over = (0, 2, 3)
    return feature.mean(over, keepdim=True), feature.std(over, keepdim=True) + 1e-5


def named(lesson: Lesson, route: Route, x: Tensor) -> Candidate:
    """A route that the user named. Raises ConfigError if its layers do not exist or do not fit."""
    teacher, student = look(lesson.teachers[0], route.teacher, x), look(lesson.student, route.student, x)
    if teacher.size != student.size:
        sizes = "{}x{} and {}x{}".format(*teacher.size, *student.size)
        raise ConfigError(
            f"the layers of route {route.teacher} > {route.student} have sizes {sizes}",
            hint="KPN projects channels only; choose layers of equal height and width",
        )
    if not cuts(lesson.student, route.student, x):
        raise ConfigError(
            f"the student has paths around layer `{route.student}`, so injecting there would not replace its front",
            hint="choose a layer that everything passes through, such as the end of a block",
        )
    return Candidate(teacher, student)


def told(route: Candidate, losses: list[float], dropped: int | None) -> dict[str, object]:
    """A route as the report shows it."""
    return {
        "teacher": route.teacher.path,
        "student": route.student.path,
        "size": list(route.student.size),
        "receptive": [route.teacher.receptive, route.student.receptive],
        "losses": losses,
        "dropped": dropped,
    }


PLUGIN = KPN
