"""fine_tune: go on from the teacher's own weights, for a student of the teacher's architecture.

The baseline of transfer: what a big network that learnt another task reaches when it is taught the new one. Tensors
of the student that the teacher has under the same name and in the same shape are taken over; the others, such as a head
for other classes, start random and learn alone for a while, so that their first gradients do no harm to what is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.losses import supervised
from edgekd.training.teachers import teacher


@dataclass(frozen=True)
class FineTune(Method):
    LABELS_ONLY: ClassVar[bool] = True

    head: float = 0.2  # share of the budget in which only new layers learn
    start: float = 0.5  # where in the learning-rate schedule all layers begin; 0 would be the full rate

    def __post_init__(self) -> None:
        for name in ("head", "start"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a share from 0 to below 1")

    def teach(self, lesson: Lesson) -> Script:
        student = lesson.student
        fresh = take_over(student, teacher(lesson))

        def loss(batch: Batch) -> Losses:
            return {"task": supervised(student(batch.x), batch.y)}

        alone = min(round(self.head * lesson.epochs), lesson.epochs - 1) if fresh else 0
        if alone:
            yield Phase("head", trains=fresh, loss=loss, epochs=alone, span=(0.0, self.start))
        yield Phase("all", trains=(student,), loss=loss, epochs=lesson.epochs - alone, span=(self.start, 1.0))
        return {"student": student}


def take_over(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, ...]:
    """Copy what fits; the layers of the student that did not. Raises ConfigError unless most layers did."""
    given, wanted = teacher.state_dict(), student.state_dict()
    fitting = {key: given[key] for key in wanted if key in given and given[key].shape == wanted[key].shape}
    if 2 * len(fitting) < len(wanted):
        raise ConfigError(
            f"only {len(fitting)} of the student's {len(wanted)} tensors are in the teacher",
            hint="give the student the teacher's architecture: student.model as teacher.model",
        )
    student.load_state_dict(fitting, strict=False)
    new = {key.rpartition(".")[0] for key in wanted.keys() - fitting.keys()}
    return tuple(student.get_submodule(path) for path in sorted(new))


PLUGIN = FineTune
