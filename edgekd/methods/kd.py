"""kd: match the teacher's softened logits (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531).

L = ce_weight CE + kd_weight T^2 KL(teacher || student), KL summed over classes, mean over the batch. With
`standardize_logits` each row of logits is brought to mean 0 and deviation 1 within KL (Sun et al., 2024, arXiv
2403.01427, which takes T = 2, kd_weight 9, ce_weight 0.1). The task defines both
losses: on maps they are mean absolute errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.training.losses import check_temperature, check_weights, resolve_ce_weight
from edgekd.training.teachers import teacher_logits


@dataclass(frozen=True)
class KD(Method):
    """Settings of knowledge distillation by softened logits."""

    temperature: float = 4.0
    kd_weight: float = 0.9
    ce_weight: float | None = None  # None: 1 - kd_weight
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_weights(kd_weight=self.kd_weight)
        resolve_ce_weight(self.ce_weight, self.kd_weight)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        student, teacher = ctx.student, teacher_logits(ctx)
        ce_weight = resolve_ce_weight(self.ce_weight, self.kd_weight)

        def loss(batch: Batch) -> Losses:
            logits = student(batch.images)
            task = ctx.task.loss(logits, batch.labels)
            kd = ctx.task.distill_loss(logits, teacher(batch.images), self.temperature, self.standardize_logits)
            return {"task": ce_weight * task, "kd": self.kd_weight * kd}

        yield Phase("kd", trains=(student,), loss=loss, epochs=ctx.epochs)
        return {"student": student}


PLUGIN = KD
