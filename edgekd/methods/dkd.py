"""dkd: decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, 2022, arXiv 2203.08679).

At temperature T each distribution p is split into b = (p_y, 1 - p_y) and q, the other classes made to sum to 1.
KD is KL(b) + (1 - p_y of the teacher) KL(q); here KL(q) is no longer damped where the teacher is sure:

    L = ce_weight CE + w T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)],  w = min(progress / warmup_fraction, 1)

KL is summed over classes, mean over the batch. The paper takes T = 4, alpha 1 and beta 8 for most pairs, 2 to 6 for
narrow ones, and a warm-up of 20 of 240 epochs. With `standardize_logits` (Sun et al., 2024) T is 2, and both weights
are 9 times as large.

Deviations from the paper, and why:
- The target of an unlabelled sample is the class that the teacher finds most likely; the paper has labels only.
- The warm-up is a fraction of the budget, and rises with each step, so that it scales with the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.training.losses import check_fractions, check_temperature, check_weights, standardize
from edgekd.training.teachers import teacher_class_logits

NEVER = -1000.0  # a logit whose softmax is 0; minus infinity would make KL NaN


@dataclass(frozen=True)
class DKD(Method):
    """Settings of decoupled knowledge distillation."""

    temperature: float = 4.0
    alpha: float = 1.0  # weight of the target class (TCKD)
    beta: float = 8.0  # weight of the other classes (NCKD)
    ce_weight: float = 1.0
    warmup_fraction: float = 1 / 12  # of the budget, in which the teacher's weight rises from 0
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_weights(alpha=self.alpha, beta=self.beta, ce_weight=self.ce_weight)
        check_temperature(self.temperature)
        check_fractions(warmup_fraction=self.warmup_fraction)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        student, teacher = ctx.student, teacher_class_logits(ctx)

        def loss(batch: Batch) -> Losses:
            logits = student(batch.images)
            answers = teacher(batch.images)
            target, others = self.decoupled_kl(logits, answers, ctx.task.fill_targets(batch.labels, answers))
            weight = min(batch.progress / self.warmup_fraction, 1.0) if self.warmup_fraction else 1.0
            return {
                "task": self.ce_weight * ctx.task.loss(logits, batch.labels),
                "target": weight * self.alpha * target,
                "others": weight * self.beta * others,
            }

        yield Phase("dkd", trains=(student,), loss=loss, epochs=ctx.epochs)
        return {"student": student}

    def decoupled_kl(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return T^2 KL between b of teacher and student, and between q, of (N, classes) logits and (N,) labels."""
        target = F.one_hot(labels, logits.shape[1]).bool()
        (b, q), (b_t, q_t) = (self.split(z, target) for z in (logits, teacher))
        kl = [F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in ((b, b_t), (q, q_t))]
        return kl[0] * self.temperature**2, kl[1] * self.temperature**2

    def split(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return log b (N, 2) and log q (N, classes); `target` is a (N, classes) mask."""
        z = (standardize(logits) if self.standardize_logits else logits.float()) / self.temperature
        others = z.masked_fill(target, NEVER)
        both = torch.stack([z.masked_fill(~target, NEVER).logsumexp(1), others.logsumexp(1)], 1)
        return F.log_softmax(both, 1), F.log_softmax(others, 1)


PLUGIN = DKD
