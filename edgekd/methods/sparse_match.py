"""sparse_match: the student first learns the teacher's sparse codes (Tran, Gabbouj, Iosifidis, 2021, arXiv 2103.17012).

A sparse layer behind each compared layer, of C channels, has a dictionary D (C x K) and a scalar bias c. Of a pixel's
feature x:

    k = sigmoid(D^T x + c)           similarities to the K atoms
    k_s = k where among the s largest of the pixel, else 0
    x^ = D k_s

1. dictionary: the teacher's D and c are trained to minimise the sum over layers of MSE(x, x^); the teacher is frozen.
2. initialise: the student learns, through sparse layers of its own (K as the teacher's), without class labels:
       pixel: CE(k of the student as logits, argmax k of the teacher), mean over pixels
       image: BCE(mean over pixels of the student's k, mean over pixels of the teacher's k_s), mean over atoms
3. kd: the sparse layers are dropped; ce_weight CE + kd_weight T^2 KL(teacher || student), as in `kd`.

K = `atoms` C and s = `code_fraction` K, at least 1, with C of the teacher. The range of CE over sigmoids is narrow: it
starts near ln K and cannot fall by more than 1. `raw_logits` takes D^T x + c as its logits instead.

Deviations from the paper, and why:
- The published code lets the teacher's BatchNorm statistics drift in 1 and labels with them; here it is in eval mode.
- The trainer's SGD replaces Adam, which is insensitive to the scale of a loss. So MSE is summed over channels, and
  features are divided by their root mean square times C^(1/4), the student's by C^(1/4): with less similarities
  saturate or diverge, with C^(1/2) they are flat. The s largest are picked before the sigmoid, where saturated ones
  differ.
- Atoms are initialised with features of pixels, scaled to decode best. From random ones only the few learn that win at
  first (a teacher of digits, C = 128: labels as varied as 20 equally frequent atoms of 256 and 20 % of the features'
  energy unexplained; Adam, ten times as long: 29 and 36 %; initialised with features: 87 and 15 %).
- Compared layers are before the activation where there is one. Global pooling is none: it has no pixels.
- The paper needs maps of equal size. Pairs that are chosen automatically have it if any two layers do; where sizes
  differ, the larger map is average-pooled to the smaller size, the teacher's before it is coded.
- The student of the last epoch of a phase goes on, not the best on validation data: budgets are short.
- With a teacher that lacks some of the classes, whose logits cannot be imitated, 3 learns from labels alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.feature_method import LayerPair, find_pairs
from edgekd.training.layer_discovery import LayerInfo, cut_layers
from edgekd.training.layer_matching import LayerMatch
from edgekd.training.losses import check_temperature, check_weights, resolve_ce_weight
from edgekd.training.sparse_coding import SparseLayer
from edgekd.training.teachers import get_teacher, knows_all_classes, teacher_logits

NUM_IMAGES = 128  # training images, at least, if there are as many, that initialise the dictionaries


@dataclass(frozen=True)
class SparseMatch(Method):
    """Settings of sparse matching."""

    layers: tuple[LayerPair, ...] = ()  # none: they are chosen by map size
    num_pairs: int = 3  # of layers, the deepest, if they are chosen
    atoms: float = 2.0  # of a dictionary, relative to the channels of the teacher's layer
    code_fraction: float = 0.02  # of the atoms, in a sparse code
    dictionary_fraction: float = 0.1  # of the budget
    initialise_fraction: float = 0.4  # of the budget
    pixel_weight: float = 1.0  # in `initialise`
    image_weight: float = 1.0  # in `initialise`
    raw_logits: bool = False  # the pixels' logits are similarities before the sigmoid
    temperature: float = 4.0
    kd_weight: float = 0.75  # in `kd`
    ce_weight: float | None = None  # in `kd`; None: 1 - kd_weight
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("dictionary_fraction", "initialise_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a fraction between 0 and 1")
        if not 0 < self.code_fraction <= 1:
            raise ConfigError(
                f"code_fraction is {self.code_fraction}", hint="use a fraction up to 1; 0.01 to 0.03 is usual"
            )
        if not 0 < self.atoms < float("inf"):
            raise ConfigError(f"atoms is {self.atoms}", hint="use a number above 0; 1.5 to 4 is usual")
        if self.num_pairs < 1:
            raise ConfigError(f"num_pairs is {self.num_pairs}", hint="use 1 or more; 3 is usual")
        check_weights(pixel_weight=self.pixel_weight, image_weight=self.image_weight, kd_weight=self.kd_weight)
        if self.pixel_weight == self.image_weight == 0:
            raise ConfigError("pixel_weight and image_weight are 0: nothing is matched", hint="set one of them above 0")
        check_temperature(self.temperature)
        resolve_ce_weight(self.ce_weight, self.kd_weight)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        x = next(ctx.first_batches(1)).images[:2]
        dictionary_end, initialise_end = self.boundaries(ctx.epochs)
        pairs = [SparsePair(match, self.atoms, self.code_fraction, x.device) for match in self.match_layers(ctx, x)]
        final_loss = self.final_loss(ctx)
        teacher = FeatureExtractor(get_teacher(ctx), *(p.match.teacher.path for p in pairs))
        student = FeatureExtractor(ctx.student, *(p.match.student.path for p in pairs))
        init_dictionaries(pairs, teacher, spread_images(ctx))
        result = yield self.dictionary_phase(pairs, teacher, dictionary_end)
        ctx.log_choice("pairs", [p.summary(result.losses[p.match.name]) for p in pairs])
        yield self.initialise_phase(ctx, pairs, teacher, student, initialise_end - dictionary_end)
        yield Phase("kd", trains=(ctx.student,), loss=final_loss, epochs=ctx.epochs - initialise_end)
        return {"student": ctx.student}

    def boundaries(self, epochs: int) -> tuple[int, int]:
        """Return the epochs at which the phases `dictionary` and `initialise` end."""
        dictionary_end = max(1, round(self.dictionary_fraction * epochs))
        initialise_end = dictionary_end + max(1, round(self.initialise_fraction * epochs))
        if initialise_end >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for kd (dictionary until {dictionary_end}, "
                f"initialise until {initialise_end})",
                hint="increase the epochs, or decrease dictionary_fraction and initialise_fraction",
            )
        return dictionary_end, initialise_end

    def match_layers(self, ctx: TrainingContext, x: Tensor) -> list[LayerMatch]:
        """Return the pairs of layers, as named or chosen. Raise ConfigError if there are none."""
        if self.layers:
            return find_pairs(ctx, self.layers, x)
        teacher, student = last_layers("teacher", get_teacher(ctx), x), last_layers("student", ctx.student, x)
        return match_by_size(teacher, student)[-self.num_pairs :]

    def dictionary_phase(self, pairs: list[SparsePair], teacher: FeatureExtractor, epochs: int) -> Phase:
        """Return the phase that trains the teacher's dictionaries."""

        def loss(batch: Batch) -> Losses:
            features = teacher_features(teacher, batch.images)
            return {p.match.name: p.teacher.gap(p.teacher_feature(features)) for p in pairs}

        trains = tuple(p.teacher for p in pairs)
        return Phase("dictionary", trains, loss, epochs, weight_decay=dict.fromkeys(trains, 0.0))

    def initialise_phase(
        self,
        ctx: TrainingContext,
        pairs: list[SparsePair],
        teacher: FeatureExtractor,
        student: FeatureExtractor,
        epochs: int,
    ) -> Phase:
        """Return the phase in which the student learns the teacher's sparse codes."""

        def loss(batch: Batch) -> Losses:
            targets, (_, features) = teacher_features(teacher, batch.images), student(batch.images)
            losses: dict[str, Tensor] = {}
            for p in pairs:
                similarities = p.student(p.student_feature(features))
                pixel, image = match_losses(similarities, p.teacher, p.teacher_feature(targets), self.raw_logits)
                losses[f"{p.match.name}:pixel"] = self.pixel_weight * pixel
                losses[f"{p.match.name}:image"] = self.image_weight * image
            return losses

        return Phase("initialise", (ctx.student, *(p.student for p in pairs)), loss, epochs)

    def final_loss(self, ctx: TrainingContext) -> Callable[[Batch], Losses]:
        """Return the loss of `kd`; of labels alone if the teacher lacks some of the classes."""
        student = ctx.student
        if not knows_all_classes(ctx):
            return lambda batch: {"task": ctx.task.loss(student(batch.images), batch.labels)}
        teacher, ce_weight = teacher_logits(ctx), resolve_ce_weight(self.ce_weight, self.kd_weight)

        def loss(batch: Batch) -> Losses:
            logits = student(batch.images)
            kd = ctx.task.distill_loss(logits, teacher(batch.images), self.temperature, self.standardize_logits)
            return {"task": ce_weight * ctx.task.loss(logits, batch.labels), "kd": self.kd_weight * kd}

        return loss


class SparsePair:
    """A pair of layers, a sparse layer for each, and the common size of their maps."""

    def __init__(self, match: LayerMatch, atoms: float, code_fraction: float, device: torch.device) -> None:
        num_atoms = max(1, int(atoms * match.teacher.channels))
        num_active = max(1, int(code_fraction * atoms * match.teacher.channels))
        self.match = match
        (height, width), (student_height, student_width) = match.teacher.size, match.student.size
        self.size = min(height, student_height), min(width, student_width)
        self.teacher = SparseLayer(match.teacher.channels, num_atoms, num_active).to(device)
        self.student = SparseLayer(match.student.channels, num_atoms, num_active).to(device)
        self.student.unit.fill_(match.student.channels**0.25)

    def teacher_feature(self, features: dict[str, Tensor]) -> Tensor:
        """Return the teacher's feature at the common size."""
        return pool_to(features[self.match.teacher.path], self.size)

    def student_feature(self, features: dict[str, Tensor]) -> Tensor:
        """Return the student's feature at the common size."""
        return pool_to(features[self.match.student.path], self.size)

    def summary(self, gap: float) -> dict[str, object]:
        """Return the pair for the report, with the fraction of the features' energy that the dictionary misses."""
        return {
            "teacher": self.match.teacher.path,
            "student": self.match.student.path,
            "size": list(self.size),
            "atoms": self.teacher.atoms.shape[1],
            "active": self.teacher.num_active,
            "unexplained": round(gap / self.match.teacher.channels**0.5, 4),
        }


def pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool features to a size, in float32."""
    return x.float() if x.shape[2:] == size else F.adaptive_avg_pool2d(x.float(), size)


def match_losses(similarities: Tensor, layer: SparseLayer, x: Tensor, raw_logits: bool) -> tuple[Tensor, Tensor]:
    """Return the losses `pixel` and `image` of a student's similarities (N, K, H, W) before the sigmoid.

    `layer` and `x` are the teacher's sparse layer and features.
    """
    with torch.no_grad():
        target = layer(x)
        label, mean_code = target.argmax(1), layer.codes(target).mean((2, 3))
    with torch.autocast(similarities.device.type, enabled=False):  # binary cross-entropy does not run under it
        probabilities = similarities.sigmoid()
        pixel = F.cross_entropy(similarities if raw_logits else probabilities, label)
        return pixel, F.binary_cross_entropy(probabilities.mean((2, 3)), mean_code)


@torch.no_grad()
def teacher_features(teacher: FeatureExtractor, x: Tensor) -> dict[str, Tensor]:
    """Return the features of the teacher's layers, without gradients."""
    return teacher(x)[1]


def spread_images(ctx: TrainingContext) -> Tensor:
    """Return training images from the whole split, which may be sorted by class."""
    images: list[Tensor] = []
    step = 1
    for number, x in enumerate(x for batch in ctx.first_batches(sys.maxsize) for x in batch.images):
        if number % step == 0:
            images.append(x.clone())  # else the whole batch stays in memory
        if len(images) == 2 * NUM_IMAGES:
            images, step = images[::2], 2 * step
    return torch.stack(images)


def init_dictionaries(pairs: list[SparsePair], teacher: FeatureExtractor, x: Tensor) -> None:
    """Set the scale of the teacher's sparse layers from their features, and draw their atoms from these."""
    features = teacher_features(teacher, x)
    for p in pairs:
        pixels = p.teacher_feature(features).movedim(1, -1).flatten(0, -2)
        p.teacher.init_atoms(pixels[torch.randperm(len(pixels)).to(pixels.device)])


def last_layers(role: str, model: nn.Module, x: Tensor) -> list[LayerInfo]:
    """Return for each map size the last layer, before its activation, in order of execution.

    A layer with the shape of the network's output is left out. Raise ConfigError if there is none.
    """
    with torch.no_grad():
        output = model(x)
    layers = [layer for layer in cut_layers(model, x) if (layer.channels, *layer.size) != tuple(output.shape[1:])]
    last = {layer.size: layer for layer in layers}
    if not last:
        raise ConfigError(
            f"no layer of the {role} that everything passes through gives maps (N, C, H, W) of several pixels",
            hint="name `layers`, or use a method that imitates logits, such as `kd`",
        )
    return [layer for layer in layers if last[layer.size] is layer]


def match_by_size(teacher: list[LayerInfo], student: list[LayerInfo]) -> list[LayerMatch]:
    """Pair layers of equal map size; if there are none, pair each student layer with the nearest size."""
    equal = [LayerMatch(t, s) for s in student for t in teacher if t.size == s.size]
    return equal or [LayerMatch(min(teacher, key=lambda t: size_ratio(t, s)), s) for s in student]


def size_ratio(a: LayerInfo, b: LayerInfo) -> float:
    """Return the difference of two map sizes, as the logarithm of their ratio."""
    return sum(abs(log(m / n)) for m, n in zip(a.size, b.size, strict=True))


PLUGIN = SparseMatch
