"""kpn: knowledge projection (Zhang, Ning, He, 2017, arXiv 1710.09505): project teacher features into a thin student.

A route joins a teacher layer to a student layer of equal spatial size through a 1x1 convolution P. With r the
projected teacher feature, v the student's own output at that layer, and h = 1 where r >= 0, else `negative`:

    L_KP = mean(h |r - v|)                                                              (eq. 9-10)
    stage 1: L_p(rear(r)) + lambda L_KP; the rear part and P learn from L_p, the front part only from L_KP
    stage 2: L_p(student(x)) + lambda L_KP, with lambda fading from `weight` to 0       (eq. 7)

Several routes are taught side by side, each with its own copy of the student, with one teacher pass per batch; after
each search period the one with the worst joint loss on validation data is dropped (section 3.4).

Deviations from the paper, and why:
- Algorithm 1 drops the smallest loss; its text says the worst. The text is followed.
- The mask of eq. 9 has the teacher's channels where a tensor of the student's is multiplied; the sign of r is used.
- The route search lies within stage 1, whose joint loss it compares. All routes have the same lambda there.
- Candidates are layers that everything passes through, because only there does an injected feature replace the
  student's front part; by themselves they are bounded to `candidates`, layers at like places of their stages first.
- L_KP is divided by the mean of |r| (a constant for the gradient), so that neither routes with small features nor
  a shrinking P look good, and `weight` means the same for every network.
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
from edgekd.learn.losses import cross_entropy, soft_kl
from edgekd.learn.taps import Taps


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
    restart: float = 0.5  # where in the learning-rate schedule stage 2 starts; stage 1 runs through all of it
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
        """Routes between layers of equal size whose receptive fields agree; like places of their stages first."""
        wide, thin = placed(layers(lesson.teachers[0], x)), placed(layers(lesson.student, x))
        fitting = [
            (abs(there - here), -s.receptive, Candidate(t, s))
            for s, here in thin
            for t, there in wide
            if t.size == s.size
            and (1 - self.receptive_tolerance) * t.receptive
            <= s.receptive
            <= (1 + self.receptive_tolerance) * t.receptive
        ]
        if not fitting:
            sizes = [sorted({"{}x{}".format(*layer.size) for layer, _ in side}) for side in (wide, thin)]
            raise ConfigError(
                "no layer of the student fits one of the teacher in size and receptive field "
                f"(teacher: {', '.join(sizes[0])}; student: {', '.join(sizes[1])}; "
                f"receptive_tolerance {self.receptive_tolerance})",
                hint="raise receptive_tolerance, name `routes`, or choose a student that shrinks maps alike",
            )
        ranked = sorted(fitting, key=lambda item: item[:2])
        first: dict[str, Candidate] = {}  # one route for each student layer, so that depths compete
        for _, _, route in ranked:
            first.setdefault(route.student.path, route)
        rest = [route for _, _, route in ranked if route not in first.values()]
        return [*first.values(), *rest][: self.candidates]

    def first_stage(self, name: str, lesson: Lesson, pupils: list[Pupil], spent: int, epochs: int, end: int) -> Phase:
        teacher = Taps(lesson.teachers[0], *{p.route.teacher.path for p in pupils})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                answer, known = teacher(batch.x)
            losses: dict[str, Tensor] = {}
            for pupil in pupils:
                projected = pupil.projection(known[pupil.route.teacher.path])
                logits, own = pupil.taps(batch.x, {pupil.route.student.path: projected})
                losses[f"{pupil.name}:task"] = self.task(logits, answer, batch.y)
                losses[f"{pupil.name}:project"] = self.weight * self.gap(
                    projected.detach(), own[pupil.route.student.path]
                )
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
            span=(self.restart, 1.0),
            decay={pupil.projection: 0.0},
        )

    def task(self, logits: Tensor, answer: Tensor, labels: Tensor) -> Tensor:
        """L_p: cross-entropy, with softened logits mixed in if wanted."""
        if self.logits == 0:
            return cross_entropy(logits, labels)
        soft = soft_kl(logits, answer, self.temperature)
        return (1 - self.logits) * cross_entropy(logits, labels) + self.logits * soft

    def gap(self, projected: Tensor, own: Tensor) -> Tensor:
        """L_KP of (N, C, H, W) features: summed over C, mean over the rest, relative to the mean size of `projected`."""
        r, v = projected.float(), own.float()
        relaxed = torch.where(r >= 0, 1.0, self.negative)
        return (relaxed * (r - v).abs()).sum(1).mean() / r.detach().abs().mean().clamp_min(1e-6)


@dataclass(frozen=True)
class Candidate:
    teacher: Layer
    student: Layer

    @property
    def name(self) -> str:
        return f"{self.teacher.path}>{self.student.path}"


class Pupil:
    """One route with what it trains: a copy of the student, and the projection."""

    def __init__(self, route: Candidate, lesson: Lesson, x: Tensor, method: KPN) -> None:
        self.route, self.name = route, route.name
        self.student = copy.deepcopy(lesson.student)
        self.projection = nn.Conv2d(route.teacher.channels, route.student.channels, 1).to(x.device)
        self.taps = Taps(self.student, route.student.path)

    def joint(self, losses: dict[str, float]) -> float:
        """The joint loss on validation data; L_KP per element, so that wide layers do not look worse."""
        return losses[f"{self.name}:task"] + losses[f"{self.name}:project"] / self.route.student.channels


def placed(found: list[Layer]) -> list[tuple[Layer, float]]:
    """Each layer with its place among those of its size: above 0 for the first, 1 for the last."""
    order = {size: [layer for layer in found if layer.size == size] for size in {layer.size for layer in found}}
    return [(layer, (order[layer.size].index(layer) + 1) / len(order[layer.size])) for layer in found]


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
