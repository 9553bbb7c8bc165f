"""fine_tune: start from the teacher's weights, for a student of the teacher's architecture.

The baseline of transfer learning: the accuracy of a large network that is pretrained on another task and fine-tuned on
the new one. Tensors with the same name and shape are copied from the teacher; the others, such as a head for other
classes, start random and are trained alone at first, so that their first gradients do not damage the pretrained layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.teachers import get_teacher


@dataclass(frozen=True)
class FineTune(Method):
    """Settings of fine-tuning."""

    LABELS_ONLY: ClassVar[bool] = True

    head_fraction: float = 0.2  # of the budget, in which only new layers are trained
    lr_start: float = 0.5  # position in the learning-rate schedule from which all layers train; 0 is the full rate

    def __post_init__(self) -> None:
        for name in ("head_fraction", "lr_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a fraction from 0 to below 1")

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        student = ctx.student
        new_layers = copy_weights(student, get_teacher(ctx))

        def loss(batch: Batch) -> Losses:
            return {"task": ctx.task.loss(student(batch.images), batch.labels)}

        head_epochs = min(round(self.head_fraction * ctx.epochs), ctx.epochs - 1) if new_layers else 0
        if head_epochs:
            yield Phase("head", trains=new_layers, loss=loss, epochs=head_epochs, lr_span=(0.0, self.lr_start))
        yield Phase("all", trains=(student,), loss=loss, epochs=ctx.epochs - head_epochs, lr_span=(self.lr_start, 1.0))
        return {"student": student}


def copy_weights(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, ...]:
    """Copy the tensors that fit, and return the layers that have others. Raise ConfigError if fewer than half fit."""
    source, target = teacher.state_dict(), student.state_dict()
    fitting = {key: source[key] for key in target if key in source and source[key].shape == target[key].shape}
    if 2 * len(fitting) < len(target):
        raise ConfigError(
            f"only {len(fitting)} of the student's {len(target)} tensors are in the teacher",
            hint="give the student the teacher's architecture: student.model as teacher.model",
        )
    student.load_state_dict(fitting, strict=False)
    new = {key.rpartition(".")[0] for key in target.keys() - fitting.keys()}
    return tuple(student.get_submodule(path) for path in sorted(new))


PLUGIN = FineTune
