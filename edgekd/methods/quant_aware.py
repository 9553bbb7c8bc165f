"""quant_aware: a last phase of quantization-aware training; wraps any method.

Quantization-aware distillation: the rounding of weights and tensors is simulated in the forward pass (Jacob et al.,
2018, arXiv 1712.05877), the ranges of tensors are learned (LSQ, Esser et al., 2020, arXiv 1902.08153), and the teacher
goes on teaching the quantized student (Mishra, Marr, 2018, arXiv 1711.05852). On the student of the method `base`,

    L = (1 - kd_weight) CE + kd_weight T^2 KL(teacher || quantized student)

Which tensors are quantized is read from a draft of the INT8 file for the first target, which also gives the initial
ranges; `training/fake_quant.py` says how BatchNorms are folded. The learned ranges are saved with the weights, and used
in the INT8 files.

With frozen statistics a learning rate that suits a new network breaks a trained one, so the phase uses the very end of
the schedule (`lr_start`). The student then fits its INT8 file; its FP32 file may be less accurate than that.

Deviations: the epochs of this phase (`qat_fraction`) are taken from `base`, not added. Students of a family are trained
side by side, in the same epochs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.fake_quant import FakeQuantModel
from edgekd.training.losses import check_fractions, check_temperature
from edgekd.training.teachers import teacher_logits

ACCURACY = "int8 accuracy"  # key beside the losses on validation data


@dataclass(frozen=True)
class QuantAware(Method):
    """Settings of quantization-aware distillation."""

    LEARNS_RANGES: ClassVar[bool] = True

    base: Method  # distils the student first
    qat_fraction: float = 0.2  # of the budget, for quantization-aware training
    lr_start: float = 0.98  # position in the learning-rate schedule where it starts: a thousandth of the full rate
    temperature: float = 4.0
    kd_weight: float = 0.9  # of the teacher's outputs; 0: labels only
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("qat_fraction", "lr_start"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a fraction between 0 and 1")
        check_fractions(kd_weight=self.kd_weight)
        check_temperature(self.temperature)

    @property
    def needs_target(self) -> bool:
        return True

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        if ctx.quant_spec is None:
            raise ConfigError("the first target runs no INT8 file", hint="use a target that runs INT8 files")
        epochs = max(1, round(self.qat_fraction * ctx.epochs))
        if epochs >= ctx.epochs:
            raise ConfigError(f"{ctx.epochs} epochs leave none for `base`", hint="use 2 epochs or more")
        teacher = teacher_logits(ctx) if self.kd_weight else None
        students = yield from self.base.phases(dataclasses.replace(ctx, epochs=ctx.epochs - epochs))
        images = next(ctx.first_batches(1)).images
        models = {name: FakeQuantModel(s, ctx.quant_spec(s), images) for name, s in students.items()}

        def loss(batch: Batch) -> Losses:
            losses: dict[str, torch.Tensor] = {}
            outputs = {name: model(batch.images) for name, model in models.items()}
            target = teacher(batch.images) if teacher else None
            for name, logits in outputs.items():
                losses[f"{name}:task"] = (1 - self.kd_weight) * ctx.task.loss(logits, batch.labels)
                if target is not None:
                    kd = ctx.task.distill_loss(logits, target, self.temperature, self.standardize_logits)
                    losses[f"{name}:kd"] = self.kd_weight * kd
                if not torch.is_grad_enabled():  # it is not minimised
                    accuracy = ctx.task.accuracy(logits, batch.labels)
                    losses[f"{name}:{ACCURACY}"] = torch.tensor(accuracy, dtype=torch.float64)
            return losses

        quantizers = [model.quantizers for model in models.values()]
        result = yield Phase(
            "int8",
            trains=(*students.values(), *quantizers),
            loss=loss,
            epochs=epochs,
            lr_span=(self.lr_start, 1.0),
            weight_decay=dict.fromkeys(quantizers, 0.0),
        )
        summary = {}
        for name, model in models.items():
            ranges = model.learned_ranges()
            ctx.save_ranges(name, ranges)
            summary[name] = {
                "ranges": len(ranges),
                "not in training": model.missing,
                "accuracy": result.losses[f"{name}:{ACCURACY}"],
            }
        ctx.log_choice("int8", summary)
        return students


PLUGIN = QuantAware
