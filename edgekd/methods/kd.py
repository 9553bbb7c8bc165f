"""kd: match the teacher's softened logits (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531).

L = (1 - weight) CE + weight T^2 KL(teacher || student), KL summed over classes, mean over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.learn.losses import cross_entropy, soft_kl


@dataclass(frozen=True)
class KD(Method):
    temperature: float = 4.0
    weight: float = 0.9

    def teach(self, lesson: Lesson) -> Script:
        student, (teacher,) = lesson.student, lesson.teachers

        def loss(batch: Batch) -> Losses:
            logits = student(batch.x)
            return {
                "task": (1 - self.weight) * cross_entropy(logits, batch.y),
                "kd": self.weight * soft_kl(logits, teacher(batch.x), self.temperature),
            }

        yield Phase("kd", trains=(student,), loss=loss, epochs=lesson.epochs)
        return {"student": student}


PLUGIN = KD
