"""quant_aware: a last phase in which the student computes as its INT8 file will; around any method.

Quantization-aware distillation: the roundings of weights and tensors are simulated in the forward pass (Jacob et al.,
2018, arXiv 1712.05877), with the ranges of tensors learnt (LSQ, Esser et al., 2020, arXiv 1902.08153), while the
teacher goes on teaching the rounded student (Mishra, Marr, 2018, arXiv 1711.05852). On the student that `base` made,

    L = (1 - weight) CE + weight T^2 KL(teacher || rounded student)

What is rounded where is read from a draft of the INT8 file for the first target, which also gives the ranges to begin
with; `learn.fake_quant` says how BatchNorms are folded. The ranges go with the weights, into the INT8 files.

With frozen statistics a rate that suits a new network breaks a trained one, so the phase runs through the very end of
the schedule (`start`). The student then fits its INT8 file; its FP32 file may answer worse than that.

Deviations: `share` of the epochs is taken from `base`, not added. Students of a family are finished side by side, in
the same epochs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.fake_quant import Rounding
from edgekd.training.losses import check_shares, check_temperature, imitation, supervised
from edgekd.training.teachers import answering
from edgekd.training.trainer import right

SHOWN = "int8 accuracy"  # beside the losses on validation data


@dataclass(frozen=True)
class QuantAware(Method):
    LEARNS_RANGES: ClassVar[bool] = True

    base: Method  # what is taught first
    share: float = 0.2  # of the budget, for the rounded student
    start: float = 0.98  # where in the learning-rate schedule it begins: at a thousandth of the rate
    temperature: float = 4.0
    weight: float = 0.9  # of the teacher's answers; 0: labels only
    standardise: bool = False  # the logits, before they are softened

    def __post_init__(self) -> None:
        for name in ("share", "start"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a share between 0 and 1")
        check_shares(weight=self.weight)
        check_temperature(self.temperature)

    @property
    def priced(self) -> bool:
        return True

    def teach(self, lesson: Lesson) -> Script:
        if lesson.blueprint is None:
            raise ConfigError("there is no INT8 file to learn for", hint="name a target that runs INT8 files")
        last = max(1, round(self.share * lesson.epochs))
        if last >= lesson.epochs:
            raise ConfigError(f"{lesson.epochs} epochs leave none for `base`", hint="give 2 epochs or more")
        teacher = answering(lesson) if self.weight else None
        students = yield from self.base.teach(dataclasses.replace(lesson, epochs=lesson.epochs - last))
        images = next(lesson.sample(1)).x
        rounded = {name: Rounding(s, lesson.blueprint(s), images) for name, s in students.items()}

        def loss(batch: Batch) -> Losses:
            losses: dict[str, torch.Tensor] = {}
            answers = {name: network(batch.x) for name, network in rounded.items()}
            theirs = teacher(batch.x) if teacher else None
            for name, answer in answers.items():
                losses[f"{name}:task"] = (1 - self.weight) * supervised(answer, batch.y)
                if theirs is not None:
                    copied = imitation(answer, theirs, self.temperature, self.standardise)
                    losses[f"{name}:kd"] = self.weight * copied
                if not torch.is_grad_enabled():  # no part of what is minimised
                    losses[f"{name}:{SHOWN}"] = torch.tensor(right(answer, batch.y), dtype=torch.float64)
            return losses

        rounders = [network.rounders for network in rounded.values()]
        outcome = yield Phase(
            "int8",
            trains=(*students.values(), *rounders),
            loss=loss,
            epochs=last,
            span=(self.start, 1.0),
            decay=dict.fromkeys(rounders, 0.0),
        )
        told = {}
        for name, network in rounded.items():
            ranges = network.learnt()
            lesson.learnt(name, ranges)
            accuracy = outcome.losses[f"{name}:{SHOWN}"]
            told[name] = {"ranges": len(ranges), "not in training": network.missing, "accuracy": accuracy}
        lesson.note("int8", told)
        return students


PLUGIN = QuantAware
