"""supervised: the student learns from labels only, without a teacher. The baseline of every report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext


@dataclass(frozen=True)
class Supervised(Method):
    """Supervised training. It has no settings."""

    LABELS_ONLY: ClassVar[bool] = True

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        student = ctx.student

        def loss(batch: Batch) -> Losses:
            return {"task": ctx.task.loss(student(batch.images), batch.labels)}

        yield Phase("supervised", trains=(student,), loss=loss, epochs=ctx.epochs)
        return {"student": student}


PLUGIN = Supervised
