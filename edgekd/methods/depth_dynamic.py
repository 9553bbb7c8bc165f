"""depth_dynamic: one network that holds students of several depths (Zhao et al., 2021, arXiv 2103.00793, EKD-DDNN).

Sub-net k keeps the first blocks of every stage and shares their weights. One training teaches all of them; the full
net, which is the student, is in the same step the teacher of the K others. With z the logits, F_s the map at the end
of stage s, sg a stopped gradient, and A(F) the sum over channels, standardised over height and width of each sample:

    L = L_p(z_full) + share / K sum_k [ L_p(z_k) + logits T^2 KL(sg(z_full) || z_k)
                                        + attention sum_s MSE(A(F_s^k), sg(A(F_s^full))) ]

with the labels' loss L_p. On dense tasks L_p and KL are mean absolute errors. All sub-nets are returned, each as a
plain network; which one ships on a target is decided by its latency there.

Only the paper's abstract and introduction could be read: depths that share weights, the full net as the teacher in the
same step, KL of answers, attention between maps of the same resolution. Choices where they are silent, and why:
- Attention, temperature and the weights `logits` 0.6 and `attention` 1 are those of code that the same group published
  beside another paper (EKD-FWSNet); there the teacher's side gets gradients and only the last stage has attention.
  Here the gradient is stopped, which protects the full net, and every stage with sub-nets counts, as the text says.
- The first blocks of each stage stay and the last ones are skipped: the first carry stride and width.
- Statistics of BatchNorm are private to each sub-net, for the maps behind a cut differ. `norms` says whether scales and
  shifts are, too; if not, statistics are estimated anew at the end, as once-for-all networks do (1908.09791).
- A pre-trained teacher may take part in L_p; the paper has none. Without one, set `teacher` to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.batchnorm import reestimate
from edgekd.training.feature_hooks import Taps
from edgekd.training.losses import check_shares, check_temperature, check_weights, imitation, precise, supervised
from edgekd.training.subnets import Depth, Stage, spread, stages, subnet
from edgekd.training.teachers import answering, columns

REESTIMATED = 64  # batches of training images
IMITATION = 0.9  # as in kd


@dataclass(frozen=True)
class DepthDynamic(Method):
    subnets: int = 2  # at most, beside the full net: the shallowest, and others evenly between
    depths: tuple[tuple[int, ...], ...] = ()  # sub-nets by hand: blocks left of each stage that has some to skip
    norms: Literal["private", "shared"] = "private"  # scales and shifts of BatchNorm; statistics are always private
    sampled: int = 0  # sub-nets of a step, drawn at random; 0: all
    share: float = 1.0  # weight of the sub-nets together; the full net's is 1
    temperature: float = 3.0
    logits: float = 0.6  # weight of the full net's softened logits
    attention: float = 1.0  # weight of its maps
    teacher: float | None = None  # weight of a teacher's answers in L_p; None: 0.9 if it knows the classes, else 0
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        check_weights(share=self.share, logits=self.logits, attention=self.attention)
        for name, least in {"subnets": 1, "sampled": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint=f"use {least} or more")
        check_temperature(self.temperature, 3)
        if len(set(self.depths)) < len(self.depths):
            raise ConfigError("depths has a sub-net twice", hint="keep one")
        if self.teacher is not None:
            check_shares(teacher=self.teacher)

    def teach(self, lesson: Lesson) -> Script:
        whole, first = lesson.student, next(lesson.sample(1)).x[:2]
        found = stages(whole, first)
        nets = [subnet(whole, found, depth, self.norms == "private") for depth in self.chosen(whole, found)]
        full, *parts = (Taps(n, *(s.end(n) for s in found)) for n in (whole, *(net.module for net in nets)))
        aim = self.aim(lesson)
        lesson.note("blocks", {stage.path: stage.blocks for stage in found})
        lesson.note("subnets", {net.name: list(net.depth) for net in nets})

        def loss(batch: Batch) -> Losses:
            answer, maps = full(batch.x)
            task = aim(batch)
            losses = {"task": task(answer)}
            drawn = self.drawn(len(nets))
            weight = self.share / len(drawn)
            for net, part in ((nets[n], parts[n]) for n in drawn):
                net.module.train(whole.training)  # the trainer sees only the tensors of its own
                theirs, seen = part(batch.x)
                losses[f"{net.name}:task"] = weight * task(theirs)
                losses[f"{net.name}:full"] = weight * self.logits * self.copied(theirs, answer.detach())
                losses[f"{net.name}:maps"] = weight * self.attention * gap(seen.values(), maps.values())
            return losses

        yield Phase("depths", trains=(whole, *(net.own for net in nets)), loss=loss, epochs=lesson.epochs)
        made = {net.name: net.alone() for net in nets}
        if self.norms == "shared":
            for module in made.values():
                reestimate(module, (batch.x for batch in lesson.sample(REESTIMATED)))
        return {"student": whole, **made}

    def chosen(self, whole: nn.Module, found: list[Stage]) -> list[Depth]:
        """The depths of the sub-nets. Raises ConfigError if the network has none, or not those named by hand."""
        if not found:
            raise ConfigError(
                f"{type(whole).__name__} has no blocks that can be skipped, so there are no sub-nets in it",
                hint="use a student whose stages are nn.Sequential or nn.ModuleList, and end in residual blocks of one "
                "shape, such as `resnet` of depth 14 or more",
            )
        full = tuple(stage.blocks for stage in found)
        ranges = [range(stage.least, stage.blocks + 1) for stage in found]
        for depth in self.depths:
            fits = len(depth) == len(found) and all(d in r for d, r in zip(depth, ranges, strict=True))
            if not fits or depth == full:
                has = ", ".join(f"{stage.path} {stage.least} to {stage.blocks}" for stage in found)
                raise ConfigError(
                    f"depths has {list(depth)}, which is no sub-net of the student",
                    hint=f"the blocks that its stages may keep are {has}; all of them are the full net",
                )
        return list(self.depths) or spread(found, self.subnets)

    def drawn(self, count: int) -> list[int]:
        """The numbers of the sub-nets that learn in this step; on validation data all."""
        if self.sampled and torch.is_grad_enabled():
            return torch.randperm(count)[: self.sampled].tolist()
        return list(range(count))

    def aim(self, lesson: Lesson) -> Callable[[Batch], Callable[[Tensor], Tensor]]:
        """L_p of an answer to a batch: the labels' loss, mixed with that of a teacher's answers.

        Raises ConfigError if a teacher is wanted that does not answer for the classes.
        """
        weight = self.teacher
        if weight is None:
            weight = IMITATION if lesson.teachers and None not in columns(lesson) else 0.0
        lesson.note("teacher", weight)
        teacher = answering(lesson) if weight else None

        def task(batch: Batch) -> Callable[[Tensor], Tensor]:
            if teacher is None:
                return lambda answer: supervised(answer, batch.y)
            told = teacher(batch.x)
            return lambda answer: (1 - weight) * supervised(answer, batch.y) + weight * self.copied(answer, told)

        return task

    def copied(self, answer: Tensor, wanted: Tensor) -> Tensor:
        return imitation(answer, wanted, self.temperature, self.standardise)


def gap(maps: Iterable[Tensor], aims: Iterable[Tensor]) -> Tensor:
    """Sum over stages of the mean squared distance between attention maps; no gradient reaches `aims`."""
    pairs = zip(maps, aims, strict=True)
    return torch.stack([F.mse_loss(attention(own), attention(aim.detach())) for own, aim in pairs]).sum()


def attention(feature: Tensor) -> Tensor:
    """(N, C, H, W) summed over channels, then brought to mean 0 and deviation 1 over H and W in each sample."""
    total = precise(feature).sum(1)
    return F.layer_norm(total, total.shape[1:])


PLUGIN = DepthDynamic
