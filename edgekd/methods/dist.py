"""dist: match how classes and samples correlate (Huang, You, Wang, Qian, Xu, 2022, arXiv 2205.10536).

With p the (N, classes) softmax at temperature T and rho the Pearson correlation of teacher and student

    L = labels CE + T^2 [inter (1 - mean over rows of rho) + intra (1 - mean over columns of rho)]

so the student may scale and shift its probabilities. The paper takes T = 4 for CIFAR, 1 for ImageNet, and both weights
2. Columns are correlated over the batch, so its size matters. With `standardise` the logits are standardised before
the softmax (Sun et al., 2024, arXiv 2403.01427).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.training.losses import check_temperature, check_weights, standardised, supervised
from edgekd.training.teachers import answering_classes

EPSILON = 1e-8  # a constant column correlates with nothing


@dataclass(frozen=True)
class DIST(Method):
    temperature: float = 4.0
    inter: float = 2.0  # weight of the relation between the classes of a sample
    intra: float = 2.0  # weight of the relation between the samples of a class
    labels: float = 1.0  # weight of the labels' loss
    standardise: bool = False

    def __post_init__(self) -> None:
        check_weights(inter=self.inter, intra=self.intra, labels=self.labels)
        check_temperature(self.temperature)

    def teach(self, lesson: Lesson) -> Script:
        student, teacher = lesson.student, answering_classes(lesson)

        def loss(batch: Batch) -> Losses:
            answer = student(batch.x)
            p, theirs = self.soft(answer), self.soft(teacher(batch.x))
            return {
                "task": self.labels * supervised(answer, batch.y),
                "inter": self.inter * self.temperature**2 * (1 - pearson(p, theirs, 1).mean()),
                "intra": self.intra * self.temperature**2 * (1 - pearson(p, theirs, 0).mean()),
            }

        yield Phase("dist", trains=(student,), loss=loss, epochs=lesson.epochs)
        return {"student": student}

    def soft(self, logits: Tensor) -> Tensor:
        z = standardised(logits) if self.standardise else logits.float()
        return (z / self.temperature).softmax(1)


def pearson(a: Tensor, b: Tensor, over: int) -> Tensor:
    """Correlation of two (N, classes) matrices along one dimension."""
    a, b = a - a.mean(over, keepdim=True), b - b.mean(over, keepdim=True)
    size = torch.linalg.vector_norm(a, dim=over) * torch.linalg.vector_norm(b, dim=over)
    correlation: Tensor = (a * b).sum(over) / (size + EPSILON)
    return correlation


PLUGIN = DIST
