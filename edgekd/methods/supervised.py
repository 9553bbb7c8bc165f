"""supervised: the student learns from labels only, without a teacher. The baseline of every report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.training.losses import supervised


@dataclass(frozen=True)
class Supervised(Method):
    LABELS_ONLY: ClassVar[bool] = True

    def teach(self, lesson: Lesson) -> Script:
        student = lesson.student

        def loss(batch: Batch) -> Losses:
            return {"task": supervised(student(batch.x), batch.y)}

        yield Phase("supervised", trains=(student,), loss=loss, epochs=lesson.epochs)
        return {"student": student}


PLUGIN = Supervised
