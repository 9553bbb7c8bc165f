"""dist: match how classes and samples correlate (Huang, You, Wang, Qian, Xu, 2022, arXiv 2205.10536).

With p the (N, classes) softmax at temperature T and rho the Pearson correlation of teacher and student

    L = ce_weight CE + T^2 [inter_weight (1 - mean over rows of rho) + intra_weight (1 - mean over columns of rho)]

so the student may scale and shift its probabilities. The paper takes T = 4 for CIFAR, 1 for ImageNet, and both weights
2. Columns are correlated over the batch, so its size matters. With `standardize_logits` the logits are standardized
before the softmax (Sun et al., 2024, arXiv 2403.01427).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.training.losses import check_temperature, check_weights, standardize
from edgekd.training.teachers import teacher_class_logits

EPSILON = 1e-8  # a constant column correlates with nothing


@dataclass(frozen=True)
class DIST(Method):
    """Settings of DIST."""

    temperature: float = 4.0
    inter_weight: float = 2.0  # of the correlation over the classes of a sample
    intra_weight: float = 2.0  # of the correlation over the samples of a class
    ce_weight: float = 1.0
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_weights(inter_weight=self.inter_weight, intra_weight=self.intra_weight, ce_weight=self.ce_weight)
        check_temperature(self.temperature)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        student, teacher = ctx.student, teacher_class_logits(ctx)

        def loss(batch: Batch) -> Losses:
            logits = student(batch.images)
            p, q = self.soften(logits), self.soften(teacher(batch.images))
            return {
                "task": self.ce_weight * ctx.task.loss(logits, batch.labels),
                "inter": self.inter_weight * self.temperature**2 * (1 - pearson(p, q, 1).mean()),
                "intra": self.intra_weight * self.temperature**2 * (1 - pearson(p, q, 0).mean()),
            }

        yield Phase("dist", trains=(student,), loss=loss, epochs=ctx.epochs)
        return {"student": student}

    def soften(self, logits: Tensor) -> Tensor:
        """Return (N, classes) probabilities at the temperature."""
        z = standardize(logits) if self.standardize_logits else logits.float()
        return (z / self.temperature).softmax(1)


def pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return the correlation of two (N, classes) matrices along one dimension."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    correlation: Tensor = (a * b).sum(dim) / (norms + EPSILON)
    return correlation


PLUGIN = DIST
