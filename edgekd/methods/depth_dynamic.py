"""depth_dynamic: one network that contains students of several depths (Zhao et al., 2021, arXiv 2103.00793, EKD-DDNN).

Sub-net k keeps the first blocks of every stage and shares their weights. All of them are trained together; in each step
the full net, which is the student, is the teacher of the K others. With z the logits, F_s the map at the end
of stage s, sg a stopped gradient, and A(F) the sum over channels, standardized over height and width of each sample:

    L = L_p(z_full) + subnet_weight / K sum_k [ L_p(z_k) + kd_weight T^2 KL(sg(z_full) || z_k)
                                                + attention_weight sum_s MSE(A(F_s^k), sg(A(F_s^full))) ]

with the labels' loss L_p. Of a regression L_p and KL are mean absolute errors. All sub-nets are returned, each as a
plain network; which one ships on a target is decided by its latency there.

Only the paper's abstract and introduction could be read: depths that share weights, the full net as the teacher in the
same step, KL of logits, attention between maps of the same resolution. Choices where they are silent, and why:
- Attention, temperature, kd_weight 0.6 and attention_weight 1 are those of code that the same group published with
  another paper (EKD-FWSNet); there the teacher's side gets gradients and only the last stage has attention.
  Here the gradient is stopped, which protects the full net, and every stage with sub-nets counts, as the text says.
- The first blocks of each stage stay and the last ones are skipped: the first carry stride and width.
- Statistics of BatchNorm are private to each sub-net, for the maps behind a cut differ. `norms` says whether scales and
  shifts are, too; if not, statistics are re-estimated at the end, as once-for-all networks do (1908.09791).
- A pre-trained teacher may take part in L_p; the paper has none. Without one, set
  `teacher_weight` to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.batchnorm import reestimate
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.losses import check_fractions, check_temperature, check_weights, to_float32
from edgekd.training.subnets import SkippableStage, StageDepths, build_subnet, find_stages, spread_depths
from edgekd.training.teachers import class_columns, teacher_logits

REESTIMATED = 64  # batches of training images
TEACHER_WEIGHT = 0.9  # as in kd


@dataclass(frozen=True)
class DepthDynamic(Method):
    """Settings of depth-dynamic networks."""

    num_subnets: int = 2  # at most, beside the full net: the shallowest, and others evenly between
    depths: tuple[tuple[int, ...], ...] = ()  # sub-nets by hand: remaining blocks of each stage that can be shortened
    norms: Literal["private", "shared"] = "private"  # scales and shifts of BatchNorm; statistics are always private
    subnets_per_step: int = 0  # drawn at random; 0: all
    subnet_weight: float = 1.0  # of the sub-nets together; the full net's is 1
    temperature: float = 3.0
    kd_weight: float = 0.6  # of the full net's softened logits
    attention_weight: float = 1.0  # of the full net's attention maps
    teacher_weight: float | None = None  # of a teacher's outputs in L_p; None: 0.9 if it knows all classes, else 0
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_weights(
            subnet_weight=self.subnet_weight, kd_weight=self.kd_weight, attention_weight=self.attention_weight
        )
        for name, least in {"num_subnets": 1, "subnets_per_step": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint=f"use {least} or more")
        check_temperature(self.temperature, 3)
        if len(set(self.depths)) < len(self.depths):
            raise ConfigError("depths has a sub-net twice", hint="keep one")
        if self.teacher_weight is not None:
            check_fractions(teacher_weight=self.teacher_weight)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        full_net, x = ctx.student, next(ctx.first_batches(1)).images[:2]
        stages = find_stages(full_net, x)
        depths = self.choose_depths(full_net, stages)
        subnets = [build_subnet(full_net, stages, depth, self.norms == "private") for depth in depths]
        full, *shallow = (
            FeatureExtractor(n, *(s.end(n) for s in stages)) for n in (full_net, *(net.module for net in subnets))
        )
        batch_loss = self.batch_loss(ctx)
        ctx.log_choice("blocks", {stage.path: stage.blocks for stage in stages})
        ctx.log_choice("subnets", {net.name: list(net.depth) for net in subnets})

        def loss(batch: Batch) -> Losses:
            full_logits, full_maps = full(batch.images)
            task_loss = batch_loss(batch)
            losses = {"task": task_loss(full_logits)}
            drawn = self.draw_subnets(len(subnets))
            weight = self.subnet_weight / len(drawn)
            for net, forward in ((subnets[n], shallow[n]) for n in drawn):
                net.module.train(full_net.training)  # the trainer only sees the tensors that the sub-net does not share
                logits, maps = forward(batch.images)
                losses[f"{net.name}:task"] = weight * task_loss(logits)
                kd = self.distill_loss(ctx, logits, full_logits.detach())
                losses[f"{net.name}:full"] = weight * self.kd_weight * kd
                attention = attention_loss(maps.values(), full_maps.values())
                losses[f"{net.name}:maps"] = weight * self.attention_weight * attention
            return losses

        yield Phase("depths", trains=(full_net, *(net.unshared for net in subnets)), loss=loss, epochs=ctx.epochs)
        students = {net.name: net.alone() for net in subnets}
        if self.norms == "shared":
            for module in students.values():
                reestimate(module, (batch.images for batch in ctx.first_batches(REESTIMATED)))
        return {"student": full_net, **students}

    def choose_depths(self, full_net: nn.Module, stages: list[SkippableStage]) -> list[StageDepths]:
        """Return the depths of the sub-nets. Raise ConfigError if the network has none, or not those of `depths`."""
        if not stages:
            raise ConfigError(
                f"{type(full_net).__name__} has no blocks that can be skipped, so there are no sub-nets in it",
                hint="use a student whose stages are nn.Sequential or nn.ModuleList, and end in residual blocks of one "
                "shape, such as `resnet` of depth 14 or more",
            )
        full = tuple(stage.blocks for stage in stages)
        ranges = [range(stage.least, stage.blocks + 1) for stage in stages]
        for depth in self.depths:
            fits = len(depth) == len(stages) and all(d in r for d, r in zip(depth, ranges, strict=True))
            if not fits or depth == full:
                limits = ", ".join(f"{stage.path} {stage.least} to {stage.blocks}" for stage in stages)
                raise ConfigError(
                    f"depths has {list(depth)}, which is no sub-net of the student",
                    hint=f"the blocks that its stages may keep are {limits}; all of them are the full net",
                )
        return list(self.depths) or spread_depths(stages, self.num_subnets)

    def draw_subnets(self, count: int) -> list[int]:
        """Return the indices of the sub-nets that are trained in this step; on validation data all."""
        if self.subnets_per_step and torch.is_grad_enabled():
            return torch.randperm(count)[: self.subnets_per_step].tolist()
        return list(range(count))

    def batch_loss(self, ctx: TrainingContext) -> Callable[[Batch], Callable[[Tensor], Tensor]]:
        """Return L_p: for a batch, a function of logits that mixes the labels' and a teacher's loss.

        Raises:
            ConfigError: if a teacher is needed that lacks some of the classes.
        """
        weight = self.teacher_weight
        if weight is None:
            weight = TEACHER_WEIGHT if ctx.teachers and None not in class_columns(ctx) else 0.0
        ctx.log_choice("teacher", weight)
        teacher = teacher_logits(ctx) if weight else None

        def for_batch(batch: Batch) -> Callable[[Tensor], Tensor]:
            if teacher is None:
                return lambda logits: ctx.task.loss(logits, batch.labels)
            target = teacher(batch.images)

            def loss(logits: Tensor) -> Tensor:
                task, kd = ctx.task.loss(logits, batch.labels), self.distill_loss(ctx, logits, target)
                return (1 - weight) * task + weight * kd

            return loss

        return for_batch

    def distill_loss(self, ctx: TrainingContext, logits: Tensor, target: Tensor) -> Tensor:
        """Return the task's distillation loss at the temperature of the method."""
        return ctx.task.distill_loss(logits, target, self.temperature, self.standardize_logits)


def attention_loss(maps: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor:
    """Return the sum over stages of the mean squared distance of attention maps; targets get no gradient."""
    pairs = zip(maps, targets, strict=True)
    return torch.stack([F.mse_loss(attention_map(m), attention_map(t.detach())) for m, t in pairs]).sum()


def attention_map(feature: Tensor) -> Tensor:
    """Sum (N, C, H, W) over channels, and bring it to mean 0 and deviation 1 over H and W in each sample."""
    total = to_float32(feature).sum(1)
    return F.layer_norm(total, total.shape[1:])


PLUGIN = DepthDynamic
