"""kd: match the teacher's softened logits (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531).

L = labels CE + weight T^2 KL(teacher || student), KL summed over classes, mean over the batch. With `standardise` each
row of logits is brought to mean 0 and deviation 1 within KL (Sun et al., 2024, arXiv 2403.01427, which takes T = 2,
weight 9, labels 0.1). On dense tasks both terms are mean absolute errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.training.losses import check_temperature, check_weights, imitation, labels_weight, supervised
from edgekd.training.teachers import answering


@dataclass(frozen=True)
class KD(Method):
    temperature: float = 4.0
    weight: float = 0.9
    labels: float | None = None  # weight of the labels' loss; None: 1 - weight
    standardise: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_weights(weight=self.weight)
        labels_weight(self.labels, self.weight)

    def teach(self, lesson: Lesson) -> Script:
        student, teacher = lesson.student, answering(lesson)
        labels = labels_weight(self.labels, self.weight)

        def loss(batch: Batch) -> Losses:
            answer = student(batch.x)
            return {
                "task": labels * supervised(answer, batch.y),
                "kd": self.weight * imitation(answer, teacher(batch.x), self.temperature, self.standardise),
            }

        yield Phase("kd", trains=(student,), loss=loss, epochs=lesson.epochs)
        return {"student": student}


PLUGIN = KD
