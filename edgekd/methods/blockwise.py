"""blockwise: student blocks trained separately by teacher blocks, several candidates each; the best is fine-tuned.

Neighbourhood distillation (Shao, Moroz, Eban, Movshovitz-Attias, 2020, arXiv 2010.01189) with the search of DNA (Li et
al., 2020, arXiv 1911.13053). Both networks are cut where the size of their maps changes. With t_i the teacher's
features at cut i, P_i a 1x1 convolution to the student's width (then ReLU, where the student's layer has no negative
outputs), r_i = P_i(t_i), and B_ik candidate k of block i, the student's block with k repeats fewer per stage:

    trained: mean (B_ik(r_i-1) - r_i)^2 / var(r_i), with this r_i fixed; the head, on the last r_i: the task's loss
    rated:   mean |B_ik(r_i-1) - r_i| / std(r_i) on validation data; a path by the sum over its blocks (DNA)

The best path within the limits is assembled and fine-tuned with labels and the teacher's outputs. r_i is both the
target of block i and the input of block i+1, so the blocks fit together without P, which is dropped. P_i learns only
from the block behind it; from the block before it, it would learn a constant, which is easy to predict.

Deviations from the papers, and why:
- DNA's blocks end in the teacher's widths, and its candidates are layers of other kinds. Ours stay in the family of the
  student, so that the result can be built again: a candidate has fewer residual blocks, and P joins the widths.
- All candidates are trained in one phase: their inputs are fixed, so no gradient passes between them, and they share
  the teacher's pass. Each has separate weights, so its BatchNorm need not be re-estimated before it is rated.
- The loss is relative (DNA: plain), because one optimiser teaches blocks whose features differ in size.
- The teacher stays in eval mode (DNA: train mode). Blocks keep their weights (DNA retrains the path); fine-tuning
  re-estimates their BatchNorm, which has seen only the teacher's features.
- Layers behind the last common size belong to the head; it has one candidate, the full one.
- Latencies are measured, not summed over blocks: paths are tried in the order of their rating, except those that are
  nowhere shorter than one that was too slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.architecture_diff import ArchitectureDiff, apply_diff
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.feature_method import LayerPair
from edgekd.training.layer_discovery import LayerInfo, block_of_modules, drop_aliases, is_cut, trace_layers
from edgekd.training.layer_matching import LayerMatch, match_named_layers
from edgekd.training.losses import check_fractions, check_temperature
from edgekd.training.macs import count_macs
from edgekd.training.subnets import find_stages
from edgekd.training.teachers import class_columns, get_teacher, knows_all_classes

BlockPath: TypeAlias = tuple[int, ...]  # for each block how many repeats fewer its candidate has
OutputLosses: TypeAlias = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Blockwise(Method):
    """Settings of blockwise distillation."""

    cuts: tuple[LayerPair, ...] = ()  # layers where blocks end, in order; none: the last ones of each common size
    num_candidates: int = 3  # of a block, at most: full, one repeat fewer, two fewer
    blocks_fraction: float = 0.4  # of the budget, to train the blocks; the rest fine-tunes; at least an epoch each
    max_macs: int | None = None  # limit of the student, for one image
    max_ms: float | None = None  # limit of the student's measured latency
    kd_weight: float = 0.9  # of the teacher's outputs, if it knows all classes; labels have the rest
    temperature: float = 4.0
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ConfigError(f"num_candidates is {self.num_candidates}", hint="use 1 or more; 1 means no search")
        check_fractions(blocks_fraction=self.blocks_fraction, kd_weight=self.kd_weight)
        check_temperature(self.temperature)
        for name in ("max_macs", "max_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}", hint="use a number above 0")

    @property
    def needs_target(self) -> bool:
        return self.max_ms is not None

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        if ctx.epochs < 2:
            raise ConfigError("1 epoch cannot both train blocks and fine-tune", hint="use 2 epochs or more")
        epochs = min(max(1, round(self.blocks_fraction * ctx.epochs)), ctx.epochs - 1)
        x, student, output_losses = next(ctx.first_batches(1)).images[:2], ctx.student, self.output_losses(ctx)
        blocks, block_of = divide_student(ctx, self.cuts, self.num_candidates, x)
        search = Search(ctx, blocks, x, self)
        count = max(len(block.lengths) for block in blocks)
        paths = [tuple(min(fewer, len(block.lengths) - 1) for block in blocks) for fewer in range(count)]
        copies = [search.network(path) for path in paths]
        result = yield block_phase(ctx, blocks, copies, output_losses, epochs)
        ratings = [[result.losses[b.key(fewer)] for fewer in range(len(b.lengths))] for b in blocks]
        path = search.best(ratings)
        ctx.log_choice("paths", search.summary(ratings, path))
        for stage, left in search.lengths(path).items():
            del student.get_submodule(stage)[left:]  # type: ignore[operator]
        states = [copies[fewer].state_dict() for fewer in (*path, 0)]
        modules = {key: key.rpartition(".")[0] for key in student.state_dict()}
        student.load_state_dict({key: states[block_of.get(module, 0)][key] for key, module in modules.items()})

        def loss(batch: Batch) -> Losses:
            with torch.no_grad():
                teacher = get_teacher(ctx)(batch.images)
            return output_losses(student(batch.images), teacher, batch.labels)

        yield Phase("fine-tune", trains=(student,), loss=loss, epochs=ctx.epochs - epochs)
        return {"student": student}

    def output_losses(self, ctx: TrainingContext) -> OutputLosses:
        """Return a function of the student's output, the teacher's output and the labels: the losses of the output.

        The teacher's output counts if it has all classes.
        """
        columns, imitates = [column for column in class_columns(ctx) if column is not None], knows_all_classes(ctx)

        def losses(logits: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
            task = ctx.task.loss(logits, labels)
            if not imitates:
                return {"task": task}
            kd = ctx.task.distill_loss(logits, teacher[:, columns], self.temperature, self.standardize_logits)
            return {"task": (1 - self.kd_weight) * task, "kd": self.kd_weight * kd}

        return losses


def relative_gap(feature: Tensor, target: Tensor, power: int) -> Tensor:
    """Return the mean of |feature - target|^power, relative to the deviation of the target."""
    return ((feature.float() - target.float()).abs() / (target.float().std() + 1e-6)).pow(power).mean()


@dataclass(frozen=True)
class Block:
    """The part of the student between two cuts."""

    end: LayerMatch  # the teacher's and the student's last layer
    lengths: tuple[dict[str, int], ...]  # by candidate: remaining children of the nn.Sequential of that path

    def key(self, fewer: int) -> str:
        """Return the loss name of the candidate with so many repeats fewer."""
        return f"{self.end.student.path}:{-fewer}"

    def projection(self) -> nn.Module:
        """Return a new P of the block."""
        conv = nn.Conv2d(self.end.teacher.channels, self.end.student.channels, 1)
        return conv if self.end.student.signed else nn.Sequential(conv, nn.ReLU())


def divide_student(
    ctx: TrainingContext, cuts: tuple[LayerPair, ...], num_candidates: int, x: Tensor
) -> tuple[list[Block], dict[str, int]]:
    """Return the student's blocks, with up to so many candidates, and the block number of each module by path.

    Raises:
        ConfigError: if the student cannot be divided, or not at the named cuts.
    """
    student = ctx.student
    nets = get_teacher(ctx), student
    pairs = [match_named_layers(*nets, cut.teacher, cut.student, x) for cut in cuts]
    if not pairs:
        teacher_layers, student_layers = (last_cut_layers(net, x) for net in nets)
        pairs = [LayerMatch(t, s) for s in student_layers for t in teacher_layers if t.size == s.size]
    if not pairs:
        sizes = [
            ", ".join("{}x{}".format(*layer.size) for layer in side) or "none"
            for side in (teacher_layers, student_layers)
        ]
        raise ConfigError(
            "the student cannot be cut into blocks: its layers that everything passes through share no map size "
            f"with the teacher's (teacher: {sizes[0]}; student: {sizes[1]})",
            hint="choose a student with the same map sizes, or name `cuts`",
        )
    order = [pair.student.path for pair in pairs]
    block_of = block_of_modules(student, order, x)
    if [block_of.get(path) for path in order] != list(range(len(order))):
        raise ConfigError("the `cuts` are not in the order in which the student runs them", hint="sort them")
    ends = {student.get_submodule(path) for path in order}  # a stage that contains one stays as it is
    stages = [s for s in find_stages(student, x) if ends.isdisjoint([*student.get_submodule(s.path).modules()][1:])]
    blocks = []
    for number, pair in enumerate(pairs):
        members = [s for s in stages if block_of[s.end(student)] == number]
        count = min(num_candidates, 1 + max((s.blocks - s.least for s in members), default=0))
        lengths = ({s.path: max(s.least, s.blocks - fewer) for s in members} for fewer in range(count))
        blocks.append(Block(pair, tuple(lengths)))
    return blocks, block_of


def last_cut_layers(model: nn.Module, x: Tensor) -> list[LayerInfo]:
    """Return the last layer of each size that everything passes through, in order of execution; not the answer.

    It lies in as few modules as can be that end in another size, so not in the next stage; and it is the last layer of
    a stage only as the stage itself, whose path stays when it becomes shorter.
    """
    with torch.no_grad():
        answer = tuple(model(x).shape[1:])
    traced = trace_layers(model, x)
    sizes = {layer.path: layer.size for layer, _ in traced}

    def foreign_parents(layer: LayerInfo) -> int:
        """Count the modules around a layer that end in another size."""
        parts = layer.path.split(".")
        parents = [".".join(parts[:i]) for i in range(1, len(parts))]
        return sum(sizes.get(path, layer.size) != layer.size for path in parents)

    candidates = [layer for layer in drop_aliases(traced) if (layer.channels, *layer.size) != answer]
    ranked = sorted(reversed(candidates), key=foreign_parents)
    last = [
        next((layer for layer in ranked if layer.size == size and is_cut(model, layer.path, x)), None)
        for size in {layer.size for layer in candidates}
    ]
    return sorted(filter(None, last), key=candidates.index)


def block_phase(
    ctx: TrainingContext, blocks: list[Block], copies: list[nn.Module], output_losses: OutputLosses, epochs: int
) -> Phase:
    """Return the phase that trains all candidates: copy k of the student has candidate k of every block."""
    teacher = FeatureExtractor(get_teacher(ctx), *dict.fromkeys(block.end.teacher.path for block in blocks))
    projections = [block.projection() for block in blocks]
    order = [block.end.student.path for block in blocks]
    students = [FeatureExtractor(network, *order) for network in copies]

    def loss(batch: Batch) -> Losses:
        power = 2 if torch.is_grad_enabled() else 1
        with torch.no_grad():
            teacher_output, features = teacher(batch.images)
        targets = [project(features[b.end.teacher.path]) for b, project in zip(blocks, projections, strict=True)]
        losses: dict[str, Tensor] = {}
        for fewer, student in enumerate(students):
            logits, ends = student(batch.images, dict(zip(order, targets, strict=True)))
            for block, end, target in zip(blocks, order, targets, strict=True):
                if fewer < len(block.lengths):
                    losses[block.key(fewer)] = relative_gap(ends[end], target.detach(), power)
            if fewer == 0:
                losses |= output_losses(logits, teacher_output, batch.labels)
        return losses

    return Phase("blocks", trains=(*copies, *projections), loss=loss, epochs=epochs)


class Search:
    """All paths through the candidates, and their cost. Raises ConfigError if none is within the limits."""

    def __init__(self, ctx: TrainingContext, blocks: list[Block], images: Tensor, method: Blockwise) -> None:
        self.ctx, self.blocks, self.method = ctx, blocks, method
        paths = itertools.product(*(range(len(block.lengths)) for block in blocks))
        self.macs = {path: count_macs(self.network(path), images[:1]) for path in paths}
        self.ms: dict[BlockPath, float] = {}
        shortest = max(self.macs)
        if not self.fits(shortest):
            latency = f" and takes {self.ms[shortest]:.3g} ms" if shortest in self.ms else ""
            raise ConfigError(
                f"no path is within the limits (max_macs {method.max_macs}, max_ms {method.max_ms}): "
                f"the cheapest has {self.macs[shortest]} MACs{latency}",
                hint="increase the limit or num_candidates, or choose a thinner student",
            )

    def fits(self, path: BlockPath) -> bool:
        """Return whether a path is within the limits; measure its latency if that decides."""
        max_macs, max_ms, latency_ms = self.method.max_macs, self.method.max_ms, self.ctx.latency_ms
        if max_macs is not None and self.macs[path] > max_macs:
            return False
        if max_ms is None:
            return True
        if latency_ms is None:
            raise ConfigError(
                f"max_ms is {max_ms}, but latencies cannot be measured here",
                hint="set max_macs instead, or build where the first target can run",
            )
        if path not in self.ms:
            self.ms[path] = latency_ms(self.network(path))
        return self.ms[path] <= max_ms

    def lengths(self, path: BlockPath) -> dict[str, int]:
        """Return the remaining children of each nn.Sequential that a path shortens."""
        chosen = (block.lengths[fewer] for block, fewer in zip(self.blocks, path, strict=True))
        return {stage: left for lengths in chosen for stage, left in lengths.items()}

    def network(self, path: BlockPath) -> nn.Module:
        """Return a copy of the student, shortened to a path."""
        return apply_diff(self.ctx.student, ArchitectureDiff(self.lengths(path)))

    def ranked(self, ratings: list[list[float]]) -> list[tuple[float, BlockPath]]:
        """Return every path with the sum of its blocks' ratings, best first, the cheaper one of equal ones first."""
        rated = [(sum(r[n] for r, n in zip(ratings, path, strict=True)), path) for path in self.macs]
        return sorted(rated, key=lambda each: (each[0], self.macs[each[1]]))

    def best(self, ratings: list[list[float]]) -> BlockPath:
        """Return the best path within the limits; the shortest of all always is."""
        too_slow: list[BlockPath] = []
        for _, path in self.ranked(ratings):
            if any(all(a <= b for a, b in zip(path, slow, strict=True)) for slow in too_slow):
                continue  # nowhere shorter
            if self.fits(path):
                break
            too_slow.append(path)
        return path

    def summary(self, ratings: list[list[float]], chosen: BlockPath) -> list[dict[str, Any]]:
        """Return every path for the report, best rating first; `ms` is None if it was not measured."""
        return [
            {
                "lengths": self.lengths(path),
                "ratings": [round(r[fewer], 4) for r, fewer in zip(ratings, path, strict=True)],
                "rating": round(rating, 4),
                "macs": self.macs[path],
                "ms": self.ms.get(path),
                "chosen": path == chosen,
            }
            for rating, path in self.ranked(ratings)
        ]


PLUGIN = Blockwise
