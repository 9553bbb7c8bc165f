"""sparse_match: the student first learns the teacher's sparse codes (Tran, Gabbouj, Iosifidis, 2021, arXiv 2103.17012).

A sparse layer at each tap, of C channels, has a dictionary D (C x K) and a scalar bias c. Of a pixel's feature x:

    k = sigmoid(D^T x + c)           similarities to the K atoms
    k_s = k where among the s largest of the pixel, else 0
    x^ = D k_s

1. dictionary: the teacher's D and c learn to minimise the sum over taps of MSE(x, x^); the teacher stays as it is.
2. initialise: the student learns, through sparse layers of its own (K as the teacher's), what needs no class labels:
       pixel: CE(k of the student as logits, argmax k of the teacher), mean over pixels
       image: BCE(mean over pixels of the student's k, mean over pixels of the teacher's k_s), mean over atoms
3. kd: the sparse layers are dropped; labels CE + weight T^2 KL(teacher || student), as in `kd`.

K = `atoms` C and s = `rate` K, at least 1, with C of the teacher. The gap of CE over sigmoids is narrow: it starts near
ln K and cannot fall by more than 1. `raw` takes D^T x + c as its logits instead.

Deviations from the paper, and why:
- The published code lets the teacher's BatchNorm statistics drift in 1 and labels with them; here it is in eval mode.
- The trainer's SGD stands for Adam, which is blind to the size of a loss. So MSE is summed over channels, and features
  are divided by their root mean square times C^(1/4), the student's by C^(1/4): with less similarities saturate or
  diverge, with C^(1/2) they are flat. The s largest are picked before the sigmoid, where those that saturate differ.
- Atoms begin as features of pixels, scaled to decode best. From random ones learn only the few that win at first (a
  teacher of digits, C = 128: labels as varied as 20 equally frequent atoms of 256 and 20 % of the features' energy
  unexplained; Adam, ten times as long: 29 and 36 %; begun as features: 87 and 15 %).
- Taps are before the activation where there is one. Global pooling is no tap: it has no pixels.
- The paper needs maps of equal size. Found taps have it if any two layers do; where sizes differ, the larger map is
  average-pooled to the smaller size, the teacher's before it is coded.
- The student of the last epoch of a phase goes on, not the best on validation data: budgets are short.
- With a teacher that lacks some of the classes, and so gives no answers to imitate, 3 learns from labels alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import Taps
from edgekd.training.feature_method import Pair, named
from edgekd.training.layer_discovery import Layer, layers
from edgekd.training.layer_matching import Candidate
from edgekd.training.losses import check_temperature, check_weights, imitation, labels_weight, supervised
from edgekd.training.sparse_coding import SparseLayer
from edgekd.training.teachers import answering, answers_all, teacher

SHOWN = 128  # training images, at least, if there are as many, with which dictionaries begin


@dataclass(frozen=True)
class SparseMatch(Method):
    layers: tuple[Pair, ...] = ()  # none: they are found
    taps: int = 3  # pairs of layers, the deepest, when they are found
    atoms: float = 2.0  # of a dictionary, by channels of the teacher's layer
    rate: float = 0.02  # share of the atoms in a sparse code
    dictionary: float = 0.1  # share of the budget
    initialise: float = 0.4  # share of the budget
    pixel: float = 1.0  # weight of the pixels' labels in `initialise`
    image: float = 1.0  # weight of the images' labels
    raw: bool = False  # the pixels' logits are similarities before the sigmoid
    temperature: float = 4.0
    weight: float = 0.75  # of the softened logits in `kd`
    labels: float | None = None  # weight of the labels' loss; None: 1 - weight
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        for name in ("dictionary", "initialise"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a share between 0 and 1")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate is {self.rate}", hint="use a share up to 1; 0.01 to 0.03 is usual")
        if not 0 < self.atoms < float("inf"):
            raise ConfigError(f"atoms is {self.atoms}", hint="use a number above 0; 1.5 to 4 is usual")
        if self.taps < 1:
            raise ConfigError(f"taps is {self.taps}", hint="use 1 or more; 3 is usual")
        check_weights(pixel=self.pixel, image=self.image, weight=self.weight)
        if self.pixel == self.image == 0:
            raise ConfigError("pixel and image are 0, so nothing is matched", hint="give one of them a weight")
        check_temperature(self.temperature)
        labels_weight(self.labels, self.weight)

    def teach(self, lesson: Lesson) -> Script:
        first = next(lesson.sample(1)).x[:2]
        first_end, second_end = self.boundaries(lesson.epochs)
        codings = [Coding(pair, self.atoms, self.rate, first.device) for pair in self.pairs(lesson, first)]
        final = self.final(lesson)
        known = Taps(teacher(lesson), *(c.pair.teacher.path for c in codings))
        own = Taps(lesson.student, *(c.pair.student.path for c in codings))
        begin(codings, known, spread(lesson))
        outcome = yield self.dictionary_phase(codings, known, first_end)
        lesson.note("taps", [c.told(outcome.losses[c.pair.name]) for c in codings])
        yield self.initial_phase(lesson, codings, known, own, second_end - first_end)
        yield Phase("kd", trains=(lesson.student,), loss=final, epochs=lesson.epochs - second_end)
        return {"student": lesson.student}

    def boundaries(self, epochs: int) -> tuple[int, int]:
        """The epochs at which the dictionaries and the initialisation are done."""
        first = max(1, round(self.dictionary * epochs))
        second = first + max(1, round(self.initialise * epochs))
        if second >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for kd (dictionary until {first}, initialise until {second})",
                hint="give more epochs, or smaller shares to dictionary and initialise",
            )
        return first, second

    def pairs(self, lesson: Lesson, x: Tensor) -> list[Candidate]:
        """The layers that are matched, as named or found. Raises ConfigError if there are none such."""
        if self.layers:
            return named(lesson, self.layers, x)
        wide, thin = last_layers("teacher", teacher(lesson), x), last_layers("student", lesson.student, x)
        return matched(wide, thin)[-self.taps :]

    def dictionary_phase(self, codings: list[Coding], known: Taps, epochs: int) -> Phase:
        def loss(batch: Batch) -> Losses:
            seen = features(known, batch.x)
            return {c.pair.name: c.theirs.gap(c.of_teacher(seen)) for c in codings}

        trains = tuple(c.theirs for c in codings)
        return Phase("dictionary", trains, loss, epochs, decay=dict.fromkeys(trains, 0.0))

    def initial_phase(self, lesson: Lesson, codings: list[Coding], known: Taps, own: Taps, epochs: int) -> Phase:
        def loss(batch: Batch) -> Losses:
            seen, (_, mine) = features(known, batch.x), own(batch.x)
            losses: dict[str, Tensor] = {}
            for c in codings:
                pixel, image = match(c.own(c.of_student(mine)), c.theirs, c.of_teacher(seen), self.raw)
                losses[f"{c.pair.name}:pixel"] = self.pixel * pixel
                losses[f"{c.pair.name}:image"] = self.image * image
            return losses

        return Phase("initialise", (lesson.student, *(c.own for c in codings)), loss, epochs)

    def final(self, lesson: Lesson) -> Callable[[Batch], Losses]:
        """The loss of `kd`; of labels alone where the teacher does not know all classes."""
        student = lesson.student
        if not answers_all(lesson):
            return lambda batch: {"task": supervised(student(batch.x), batch.y)}
        answer, labels = answering(lesson), labels_weight(self.labels, self.weight)

        def loss(batch: Batch) -> Losses:
            made = student(batch.x)
            soft = imitation(made, answer(batch.x), self.temperature, self.standardise)
            return {"task": labels * supervised(made, batch.y), "kd": self.weight * soft}

        return loss


class Coding:
    """A pair of layers, the teacher's sparse layer and the student's, and the size at which their maps meet."""

    def __init__(self, pair: Candidate, atoms: float, rate: float, device: torch.device) -> None:
        count = max(1, int(atoms * pair.teacher.channels))
        kept = max(1, int(rate * atoms * pair.teacher.channels))
        self.pair = pair
        (height, width), (own_height, own_width) = pair.teacher.size, pair.student.size
        self.size = min(height, own_height), min(width, own_width)
        self.theirs = SparseLayer(pair.teacher.channels, count, kept).to(device)
        self.own = SparseLayer(pair.student.channels, count, kept).to(device)
        self.own.unit.fill_(pair.student.channels**0.25)

    def of_teacher(self, seen: dict[str, Tensor]) -> Tensor:
        return pooled(seen[self.pair.teacher.path], self.size)

    def of_student(self, seen: dict[str, Tensor]) -> Tensor:
        return pooled(seen[self.pair.student.path], self.size)

    def told(self, gap: float) -> dict[str, object]:
        """The pair as the report shows it, with the share of the features' energy that the dictionary misses."""
        return {
            "teacher": self.pair.teacher.path,
            "student": self.pair.student.path,
            "size": list(self.size),
            "atoms": self.theirs.atoms.shape[1],
            "kept": self.theirs.kept,
            "unexplained": round(gap / self.pair.teacher.channels**0.5, 4),
        }


def pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Features at a smaller size, in full precision."""
    return x.float() if x.shape[2:] == size else F.adaptive_avg_pool2d(x.float(), size)


def match(own: Tensor, layer: SparseLayer, x: Tensor, raw: bool) -> tuple[Tensor, Tensor]:
    """The pixels' and the images' loss of a student's similarities (N, K, H, W) before the sigmoid.

    `layer` and `x` are the teacher's sparse layer and features.
    """
    with torch.no_grad():
        similar = layer(x)
        label, target = similar.argmax(1), layer.codes(similar).mean((2, 3))
    with torch.autocast(own.device.type, enabled=False):  # binary cross-entropy is refused under it
        dense = own.sigmoid()
        pixel = F.cross_entropy(own if raw else dense, label)
        return pixel, F.binary_cross_entropy(dense.mean((2, 3)), target)


@torch.no_grad()
def features(known: Taps, x: Tensor) -> dict[str, Tensor]:
    """What the teacher's tapped layers make of images."""
    return known(x)[1]


def spread(lesson: Lesson) -> Tensor:
    """Training images from all over the split, which may be sorted by class."""
    shown: list[Tensor] = []
    step = 1
    for number, x in enumerate(x for batch in lesson.sample(sys.maxsize) for x in batch.x):
        if number % step == 0:
            shown.append(x.clone())  # else the whole batch stays in memory
        if len(shown) == 2 * SHOWN:
            shown, step = shown[::2], 2 * step
    return torch.stack(shown)


def begin(codings: list[Coding], known: Taps, x: Tensor) -> None:
    """Give the teacher's sparse layers the size of their features and atoms that are drawn from these."""
    seen = features(known, x)
    for c in codings:
        pixels = c.of_teacher(seen).movedim(1, -1).flatten(0, -2)
        c.theirs.begin(pixels[torch.randperm(len(pixels)).to(pixels.device)])


def last_layers(role: str, model: nn.Module, x: Tensor) -> list[Layer]:
    """Of each size of maps the last layer, before its activation, in order of execution.

    Answers that are maps do not count. Raises ConfigError if there is none.
    """
    with torch.no_grad():
        answer = model(x)
    found = [layer for layer in layers(model, x) if (layer.channels, *layer.size) != tuple(answer.shape[1:])]
    last = {layer.size: layer for layer in found}
    if not last:
        raise ConfigError(
            f"no layer of the {role} that everything passes through gives maps (N, C, H, W) of several pixels",
            hint="name `layers`, or use a method that copies answers, such as `kd`",
        )
    return [layer for layer in found if last[layer.size] is layer]


def matched(wide: list[Layer], thin: list[Layer]) -> list[Candidate]:
    """Layers of the teacher and the student of equal size; if there are none, each student layer with the nearest."""
    equal = [Candidate(theirs, own) for own in thin for theirs in wide if theirs.size == own.size]
    return equal or [Candidate(min(wide, key=lambda layer: apart(layer, own)), own) for own in thin]


def apart(a: Layer, b: Layer) -> float:
    """By how much the sizes of two maps differ, as a ratio."""
    return sum(abs(log(m / n)) for m, n in zip(a.size, b.size, strict=True))


PLUGIN = SparseMatch
