"""Base of the methods that compare features: pairs of layers, one pass over both networks, losses of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.core.method import Losses, Method, TrainingContext
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.layer_discovery import LayerInfo, drop_aliases, find_layer, is_cut, trace_layers
from edgekd.training.layer_matching import LayerMatch
from edgekd.training.losses import check_temperature, check_weights, resolve_ce_weight
from edgekd.training.teachers import class_columns, get_teacher


@dataclass(frozen=True)
class LayerPair(Settings):
    """Two layers that are compared, by dotted path."""

    teacher: str
    student: str


def equal_pairs(ctx: TrainingContext, pairs: tuple[LayerPair, ...]) -> list[LayerMatch]:
    """Return the named pairs; if none are named, the last layers of each map size that both networks have.

    They are in the order of the student.

    Raises:
        ConfigError: if a named layer does not exist, if sizes of a pair differ, or if there is no common size.
    """
    x = next(ctx.first_batches(1)).images[:2]
    if pairs:
        return [check_equal_size(match) for match in find_pairs(ctx, pairs, x)]
    teacher_layers, student_layers = last_layers(get_teacher(ctx), x), last_layers(ctx.student, x)
    matches = [LayerMatch(t, s) for s in student_layers for t in teacher_layers if t.size == s.size]
    if not matches:
        sizes = [
            ", ".join("{}x{}".format(*layer.size) for layer in side) or "none"
            for side in (teacher_layers, student_layers)
        ]
        raise ConfigError(
            f"no maps of teacher and student have equal sizes (teacher: {sizes[0]}; student: {sizes[1]})",
            hint="choose a student with the same map sizes, or a method that compares layers of any size",
        )
    return matches


def deepest_pairs(ctx: TrainingContext, pairs: tuple[LayerPair, ...]) -> list[LayerMatch]:
    """Return the named pairs; if none are named, the last layer of the smallest maps in each network.

    Sizes of a pair may differ.

    Raises:
        ConfigError: if a named layer does not exist, or if a network has no maps.
    """
    x = next(ctx.first_batches(1)).images[:2]
    return find_pairs(ctx, pairs, x) or [LayerMatch(last_smallest(get_teacher(ctx), x), last_smallest(ctx.student, x))]


def find_pairs(ctx: TrainingContext, pairs: tuple[LayerPair, ...], x: Tensor) -> list[LayerMatch]:
    """Look up named pairs. Raise ConfigError if a layer does not exist."""
    return [
        LayerMatch(
            find_layer(get_teacher(ctx), p.teacher, x, "teacher"), find_layer(ctx.student, p.student, x, "student")
        )
        for p in pairs
    ]


def check_equal_size(pair: LayerMatch) -> LayerMatch:
    """Return the pair. Raise ConfigError if the map sizes differ."""
    if pair.teacher.size != pair.student.size:
        raise ConfigError(
            f"layer `{pair.teacher.path}` of the teacher has maps of {'{}x{}'.format(*pair.teacher.size)}, "
            f"`{pair.student.path}` of the student of {'{}x{}'.format(*pair.student.size)}",
            hint="choose layers of equal height and width",
        )
    return pair


def last_layers(model: nn.Module, x: Tensor) -> list[LayerInfo]:
    """Return for each map size the last layer that everything passes through; the last of all if there is none.

    In order of execution, for a batch of two images or more. What has the shape of the answer is no feature.
    """
    with torch.no_grad():
        answer = tuple(model(x).shape[1:])
    candidates = [layer for layer in drop_aliases(trace_layers(model, x)) if (layer.channels, *layer.size) != answer]
    last = []
    for size in {layer.size for layer in candidates}:
        same_size = [layer for layer in reversed(candidates) if layer.size == size]
        last.append(next((layer for layer in same_size if is_cut(model, layer.path, x)), same_size[0]))
    return sorted(last, key=candidates.index)


def last_smallest(model: nn.Module, x: Tensor) -> LayerInfo:
    """Return the last layer of the smallest maps. Raise ConfigError if the network has no maps."""
    layers = last_layers(model, x)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layer with (N, C, H, W) maps of more than one pixel",
            hint="use a method that compares logits only",
        )
    return min(layers, key=lambda layer: layer.size[0] * layer.size[1])


class PairedForward:
    """One pass of teacher (without gradients) and student: their outputs, and the features of each pair."""

    def __init__(self, ctx: TrainingContext, pairs: list[LayerMatch]) -> None:
        self.pairs = pairs
        self.teacher = FeatureExtractor(get_teacher(ctx), *(pair.teacher.path for pair in pairs))
        self.student = FeatureExtractor(ctx.student, *(pair.student.path for pair in pairs))
        ctx.log_choice("layers", [{"teacher": p.teacher.path, "student": p.student.path} for p in pairs])

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the student's output, the teacher's output, and for each pair the teacher's and student's feature."""
        with torch.no_grad():
            teacher_output, teacher_features = self.teacher(x)
        logits, features = self.student(x)
        pairs = [(teacher_features[pair.teacher.path], features[pair.student.path]) for pair in self.pairs]
        return logits, teacher_output, pairs


@dataclass(frozen=True)
class FeatureMethod(Method):
    """Settings of a method that compares features, beside labels and, if wanted, the teacher's outputs."""

    layers: tuple[LayerPair, ...] = ()  # that are compared; none: they are chosen by map size
    kd_weight: float = 0.0  # of the teacher's softened logits, or of its maps
    ce_weight: float | None = None  # of the labels' loss; None: 1 - kd_weight
    temperature: float = 4.0
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_weights(kd_weight=self.kd_weight)
        check_temperature(self.temperature)
        resolve_ce_weight(self.ce_weight, self.kd_weight)

    def output_losses(self, ctx: TrainingContext) -> Callable[[Tensor, Tensor, Tensor], Losses]:
        """Return a function of the student's output, the teacher's output and the labels: the losses of the output.

        Raises:
            ConfigError: if kd_weight is not 0, but the teacher lacks some of the classes.
        """
        columns = [column for column in class_columns(ctx) if column is not None]
        if self.kd_weight and len(columns) < ctx.num_classes:
            raise ConfigError(
                f"kd_weight is {self.kd_weight:g}, but the teacher knows {len(columns)} of the {ctx.num_classes} "
                "classes",
                hint="set kd_weight to 0: features alone teach across tasks",
            )
        ce_weight = resolve_ce_weight(self.ce_weight, self.kd_weight)

        def losses(logits: Tensor, teacher: Tensor, labels: Tensor) -> Losses:
            task = {"task": ce_weight * ctx.task.loss(logits, labels)}
            if not self.kd_weight:
                return task
            target = teacher[:, columns] if ctx.class_columns else teacher
            kd = ctx.task.distill_loss(logits, target, self.temperature, self.standardize_logits)
            return dict(task, kd=self.kd_weight * kd)

        return losses
