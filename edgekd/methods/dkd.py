"""dkd: decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, 2022, arXiv 2203.08679).

At temperature T each distribution p is split into b = (p_y, 1 - p_y) and q, the other classes made to sum to 1.
KD is KL(b) + (1 - p_y of the teacher) KL(q); here KL(q) is no longer damped where the teacher is sure:

    L = labels CE + w T^2 [target KL(b_t || b_s) + others KL(q_t || q_s)],  w = min(progress / warmup, 1)

KL is summed over classes, mean over the batch. The paper takes T = 4, target (alpha) 1 and others (beta) 8 for most
pairs, 2 to 6 for narrow ones, and a warm-up of 20 of 240 epochs. With `standardise` (Sun et al., 2024) T is 2, and
both weights are 9 times as large.

Deviations from the paper, and why:
- Of a sample without a label the target is the class that the teacher finds most likely; the paper has labels only.
- The warm-up is a share of the budget, and rises with each step, so that it scales with the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.losses import check_temperature, check_weights, standardised, supervised
from edgekd.training.teachers import answering_classes

NEVER = -1000.0  # a logit that softmax makes 0 of, without the NaN that KL makes of minus infinity


@dataclass(frozen=True)
class DKD(Method):
    temperature: float = 4.0
    target: float = 1.0  # alpha
    others: float = 8.0  # beta
    labels: float = 1.0  # weight of the labels' loss
    warmup: float = 1 / 12  # share of the budget over which the teacher's weight rises from 0
    standardise: bool = False

    def __post_init__(self) -> None:
        check_weights(target=self.target, others=self.others, labels=self.labels)
        check_temperature(self.temperature)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is {self.warmup}", hint="use a share of the budget between 0 and 1")

    def teach(self, lesson: Lesson) -> Script:
        student, teacher = lesson.student, answering_classes(lesson)

        def loss(batch: Batch) -> Losses:
            answer, theirs = student(batch.x), teacher(batch.x)
            target, others = self.decoupled(answer, theirs, batch.y)
            weight = min(batch.progress / self.warmup, 1.0) if self.warmup else 1.0
            return {
                "task": self.labels * supervised(answer, batch.y),
                "target": weight * self.target * target,
                "others": weight * self.others * others,
            }

        yield Phase("dkd", trains=(student,), loss=loss, epochs=lesson.epochs)
        return {"student": student}

    def decoupled(self, answer: Tensor, theirs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """T^2 KL between b of teacher and student, and between q, of (N, classes) logits and (N,) labels."""
        truth = torch.where(truth < 0, theirs.argmax(1), truth)
        chosen = F.one_hot(truth, answer.shape[1]).bool()
        (b, q), (b_t, q_t) = (self.split(logits, chosen) for logits in (answer, theirs))
        kl = [F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in ((b, b_t), (q, q_t))]
        return kl[0] * self.temperature**2, kl[1] * self.temperature**2

    def split(self, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """log b (N, 2) and log q (N, classes), where `chosen` marks the target."""
        z = (standardised(logits) if self.standardise else logits.float()) / self.temperature
        others = z.masked_fill(chosen, NEVER)
        both = torch.stack([z.masked_fill(~chosen, NEVER).logsumexp(1), others.logsumexp(1)], 1)
        return F.log_softmax(both, 1), F.log_softmax(others, 1)


PLUGIN = DKD
