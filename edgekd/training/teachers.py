"""Access to the teachers of a training context, and to the classes that they know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgekd.core.method import TrainingContext
from edgekd.errors import ConfigError


def get_teacher(ctx: TrainingContext, number: int = 0) -> nn.Module:
    """Return a teacher by number. Raise ConfigError if there are fewer."""
    if number >= len(ctx.teachers):
        raise ConfigError(
            f"the method needs {number + 1} teacher(s), there are {len(ctx.teachers)}",
            hint="configure `teacher` and `extra_teachers`, or use another method",
        )
    return ctx.teachers[number]


def class_columns(ctx: TrainingContext, number: int = 0) -> tuple[int | None, ...]:
    """Return for each class the column of the teacher's logits; None where the teacher lacks the class."""
    return ctx.class_columns[number] if ctx.class_columns else tuple(range(ctx.num_classes))


def teacher_logits(ctx: TrainingContext, number: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a function from images to the teacher's logits for the student's classes, without gradients.

    Raises:
        ConfigError: if there is no such teacher, or it lacks some of the classes.
    """
    module, columns = get_teacher(ctx, number), class_columns(ctx, number)
    present = [column for column in columns if column is not None]
    if len(present) < len(columns):
        raise ConfigError(
            f"the teacher knows {len(present)} of the {len(columns)} classes, so its logits cannot be imitated",
            hint="use a method that learns from features, such as `kpn` with `kd_weight: 0`",
        )

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        logits: Tensor = module(images)
        return logits[:, present] if ctx.class_columns else logits

    return forward


def knows_all_classes(ctx: TrainingContext) -> bool:
    """Return whether the first teacher has logits for all classes; log for the report if it has not."""
    columns = class_columns(ctx)
    if None in columns:
        present = len(columns) - columns.count(None)
        reason = f"the teacher knows {present} of the {len(columns)} classes, so its logits are not imitated"
        ctx.log_choice("labels only", reason)
    return None not in columns


def teacher_class_logits(ctx: TrainingContext, number: int = 0) -> Callable[[Tensor], Tensor]:
    """Return the same as `teacher_logits`. Raise ConfigError if the task has no class logits."""
    if not ctx.task.class_logits:
        raise ConfigError(
            "the method compares class logits, but this task has none",
            hint="use a method that needs no classes, such as `kd`",
        )
    return teacher_logits(ctx, number)
