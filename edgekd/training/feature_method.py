"""What methods that compare features share: pairs of layers, one pass that reads both networks, the task's losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.core.method import Lesson, Losses, Method
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import Taps
from edgekd.training.layer_discovery import Layer, cuts, look, outputs, unique
from edgekd.training.layer_matching import Candidate
from edgekd.training.losses import check_temperature, check_weights, imitation, labels_weight, supervised
from edgekd.training.teachers import columns, teacher


@dataclass(frozen=True)
class Pair(Settings):
    """Two layers that are compared: dotted paths."""

    teacher: str
    student: str


def equal_pairs(lesson: Lesson, chosen: tuple[Pair, ...]) -> list[Candidate]:
    """The chosen pairs; if none, the ends of each size that both networks have, in the order of the student.

    Raises ConfigError if a chosen layer does not exist, if two have different sizes, or if no size is common.
    """
    x = next(lesson.sample(1)).x[:2]
    if chosen:
        return [checked(pair) for pair in named(lesson, chosen, x)]
    wide, thin = ends(teacher(lesson), x), ends(lesson.student, x)
    found = [Candidate(theirs, own) for own in thin for theirs in wide if theirs.size == own.size]
    if not found:
        sizes = [", ".join("{}x{}".format(*layer.size) for layer in side) or "none" for side in (wide, thin)]
        raise ConfigError(
            f"no maps of teacher and student have equal sizes (teacher: {sizes[0]}; student: {sizes[1]})",
            hint="choose a student that shrinks maps alike, or a method that compares layers of any size",
        )
    return found


def deepest_pairs(lesson: Lesson, chosen: tuple[Pair, ...]) -> list[Candidate]:
    """The chosen pairs; if none, the ends of the smallest size in each network. Sizes need not be equal.

    Raises ConfigError if a chosen layer does not exist, or if a network makes no maps.
    """
    x = next(lesson.sample(1)).x[:2]
    return named(lesson, chosen, x) or [Candidate(smallest(teacher(lesson), x), smallest(lesson.student, x))]


def named(lesson: Lesson, chosen: tuple[Pair, ...], x: Tensor) -> list[Candidate]:
    return [
        Candidate(look(teacher(lesson), p.teacher, x, "teacher"), look(lesson.student, p.student, x, "student"))
        for p in chosen
    ]


def checked(pair: Candidate) -> Candidate:
    if pair.teacher.size != pair.student.size:
        raise ConfigError(
            f"layer `{pair.teacher.path}` of the teacher makes maps of {'{}x{}'.format(*pair.teacher.size)}, "
            f"`{pair.student.path}` of the student of {'{}x{}'.format(*pair.student.size)}",
            hint="choose layers of equal height and width",
        )
    return pair


def ends(model: nn.Module, x: Tensor) -> list[Layer]:
    """Of each size the last layer that everything passes through; where paths lead around all of them, the last one.

    In order of execution, for a batch of two images or more. What has the shape of a dense answer is no feature.
    """
    with torch.no_grad():
        answer = tuple(model(x).shape[1:])
    found = [layer for layer in unique(outputs(model, x)) if (layer.channels, *layer.size) != answer]
    last = []
    for size in {layer.size for layer in found}:
        own = [layer for layer in reversed(found) if layer.size == size]
        last.append(next((layer for layer in own if cuts(model, layer.path, x)), own[0]))
    return sorted(last, key=found.index)


def smallest(model: nn.Module, x: Tensor) -> Layer:
    found = ends(model, x)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layer that makes (N, C, H, W) maps of more than one pixel",
            hint="use a method that compares answers only",
        )
    return min(found, key=lambda layer: layer.size[0] * layer.size[1])


class Both:
    """One pass of teacher (without gradients) and student: their answers, and the features of each pair."""

    def __init__(self, lesson: Lesson, pairs: list[Candidate]) -> None:
        self.pairs = pairs
        self.known = Taps(teacher(lesson), *(pair.teacher.path for pair in pairs))
        self.own = Taps(lesson.student, *(pair.student.path for pair in pairs))
        lesson.note("layers", [{"teacher": p.teacher.path, "student": p.student.path} for p in pairs])

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Student's answer, teacher's answer, and of each pair the teacher's and the student's feature."""
        with torch.no_grad():
            theirs, known = self.known(x)
        answer, own = self.own(x)
        return answer, theirs, [(known[pair.teacher.path], own[pair.student.path]) for pair in self.pairs]


@dataclass(frozen=True)
class FeatureMethod(Method):
    """A method that compares features, beside what labels and, if wanted, the teacher's answers say."""

    layers: tuple[Pair, ...] = ()  # none: they are found
    logits: float = 0.0  # weight of the teacher's softened logits; dense: of its answers
    labels: float | None = None  # weight of the labels' loss; None: 1 - logits
    temperature: float = 4.0
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        check_weights(logits=self.logits)
        check_temperature(self.temperature)
        labels_weight(self.labels, self.logits)

    def task(self, lesson: Lesson) -> Callable[[Tensor, Tensor, Tensor], Losses]:
        """The losses of a student's answer, given the teacher's answer and the truth.

        Raises ConfigError if the teacher's answers are wanted, but it knows other classes.
        """
        known = [column for column in columns(lesson) if column is not None]
        if self.logits and len(known) < lesson.classes:
            raise ConfigError(
                f"logits is {self.logits:g}, but the teacher knows {len(known)} of the {lesson.classes} classes",
                hint="set logits to 0: features alone teach across tasks",
            )

        labels = labels_weight(self.labels, self.logits)

        def losses(answer: Tensor, theirs: Tensor, truth: Tensor) -> Losses:
            task = {"task": labels * supervised(answer, truth)}
            if not self.logits:
                return task
            copied = theirs[:, known] if lesson.knows else theirs
            return task | {"logits": self.logits * imitation(answer, copied, self.temperature, self.standardise)}

        return losses
