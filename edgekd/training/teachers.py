"""Which teacher a method may learn from, and what it knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgekd.core.method import Lesson
from edgekd.errors import ConfigError


def teacher(lesson: Lesson, number: int = 0) -> nn.Module:
    """A teacher, whatever it knows. Raises ConfigError if there are fewer."""
    if number >= len(lesson.teachers):
        raise ConfigError(
            f"the method learns from {number + 1} teacher(s), there are {len(lesson.teachers)}",
            hint="configure `teacher` and `more_teachers`, or use another method",
        )
    return lesson.teachers[number]


def columns(lesson: Lesson, number: int = 0) -> tuple[int | None, ...]:
    """For each class of the lesson the column of a teacher's logits; None where it does not know the class."""
    return lesson.knows[number] if lesson.knows else tuple(range(lesson.classes))


def answering(lesson: Lesson, number: int = 0) -> Callable[[Tensor], Tensor]:
    """A teacher's answers for the classes of the lesson, without gradients.

    Raises ConfigError if there is no such teacher, or it does not know all classes.
    """
    module, chosen = teacher(lesson, number), columns(lesson, number)
    known = [column for column in chosen if column is not None]
    if len(known) < len(chosen):
        raise ConfigError(
            f"the teacher knows {len(known)} of the {len(chosen)} classes, so its answers cannot be copied",
            hint="use a method that learns from features, such as `kpn` with `logits: 0`",
        )

    @torch.no_grad()
    def answer(x: Tensor) -> Tensor:
        made: Tensor = module(x)
        return made[:, known] if lesson.knows else made

    return answer


def answers_all(lesson: Lesson) -> bool:
    """Whether the teacher answers for all classes, and so can be copied; if not, the report is told."""
    chosen = columns(lesson)
    if None in chosen:
        known = len(chosen) - chosen.count(None)
        lesson.note("labels only", f"the teacher knows {known} of the {len(chosen)} classes, so no answers are copied")
    return None not in chosen


def answering_classes(lesson: Lesson, number: int = 0) -> Callable[[Tensor], Tensor]:
    """As `answering`, for methods that need class logits. Raises ConfigError if the task has none."""
    if lesson.dense:
        raise ConfigError(
            "the method compares class logits, but the answers of this task are maps of numbers",
            hint="use a method that needs no classes, such as `kd`",
        )
    return answering(lesson, number)
