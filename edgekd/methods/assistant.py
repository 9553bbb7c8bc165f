"""assistant: a chain of networks of falling size, each taught by the one before; around any method.

Teacher assistants (Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh, 2020, arXiv 1902.03393): where the gap
between teacher and student is too wide, teacher -> assistant -> ... -> student. Every step is a lesson of its own by
the method `base`; with `kd` it minimises (1 - weight) CE + weight T^2 KL. Networks of any families may stand in the
chain (Dastidar et al., 2021, arXiv 2102.10335: an assistant with an LSTM). Best is an assistant whose accuracy lies
midway between the teacher's and the student's; the accuracy of each, on validation data, is noted.

Deviations from the paper, and why:
- The budget is one student's, so the steps share it: `share` goes to the assistants, in equal parts, the rest to the
  student. In the paper each network has all epochs.
- The first assistant may have several teachers, if `base` wants them; every later network has one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edgekd.core import plugins
from edgekd.core.method import Batch, Lesson, Losses, Method, Outcome, Phase, Script
from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.training.teachers import teacher
from edgekd.training.trainer import freeze, right

SHOWN = "assistant accuracy"  # beside the losses on validation data


@dataclass(frozen=True)
class Assistant(Method):
    assistants: tuple[Model, ...]  # from the biggest to the smallest
    base: Method  # by which each network of the chain is taught
    share: float = 0.5  # of the budget, for all assistants together

    def __post_init__(self) -> None:
        if not self.assistants:
            raise ConfigError("assistants is empty", hint="name at least one network, or use `base` alone")
        if not 0 < self.share < 1:
            raise ConfigError(f"share is {self.share}", hint="use a share between 0 and 1")

    @property
    def priced(self) -> bool:
        return self.base.priced

    def teach(self, lesson: Lesson) -> Script:
        teacher(lesson)  # a chain begins with one
        steps = self.steps(lesson)
        self.rehearse(steps)
        told = []
        for number, family in enumerate(self.assistants):
            made, accuracy = yield from self.step(steps[number], f"assistant{number + 1}")
            epochs = steps[number].epochs
            told.append({"model": plugins.name_of(family), "epochs": epochs, "accuracy": accuracy})
            steps[number + 1] = taught_by(steps[number + 1], made)
        lesson.note("assistants", told)
        return (yield from self.base.teach(steps[-1]))

    def steps(self, lesson: Lesson) -> list[Lesson]:
        """A lesson for each assistant, and the student's. The first has the teachers; the others find theirs later."""
        count = len(self.assistants)
        each = max(1, int(self.share * lesson.epochs / count))
        if each * count >= lesson.epochs:
            raise ConfigError(
                f"{lesson.epochs} epochs leave none for the student after {count} assistants",
                hint="give more epochs, or fewer assistants",
            )
        steps = [
            dataclasses.replace(
                lesson, student=lesson.build(family), epochs=each, note=prefixed(lesson.note, f"assistant{number}")
            )
            for number, family in enumerate(self.assistants, 1)
        ]
        for step in steps:
            freeze(step)
        return [*steps, dataclasses.replace(lesson, epochs=lesson.epochs - each * count)]

    def rehearse(self, steps: list[Lesson]) -> None:
        """Play each step up to its first phase, on copies: what `base` refuses is refused before any training."""
        for number, step in enumerate(steps):
            trial = taught_by(step, steps[number - 1].student) if number else step
            trial = dataclasses.replace(trial, student=copy.deepcopy(step.student), note=lambda key, value: None)
            script = self.base.teach(trial)
            next(script, None)
            script.close()

    def step(self, lesson: Lesson, name: str) -> Generator[Phase, Outcome, tuple[nn.Module, float | None]]:
        """Teach one assistant; the network that was made of it, and the accuracy after the last phase."""
        script, accuracy = self.base.teach(lesson), None
        advance = partial(next, script)
        while True:
            try:
                phase = advance()
            except StopIteration as end:
                made = end.value.get("student", lesson.student)
                return made.requires_grad_(False).eval(), accuracy
            freeze(lesson)  # the trainer knows of the student's lesson only, and freezes that
            outcome = yield shown(phase, lesson.student, name)
            losses = dict(outcome.losses)
            accuracy = losses.pop(SHOWN, None)
            advance = partial(script.send, Outcome(losses, accuracy))


def taught_by(lesson: Lesson, network: nn.Module) -> Lesson:
    """The lesson with one teacher, which knows the lesson's classes."""
    return dataclasses.replace(lesson, teachers=(network,), knows=())


def shown(phase: Phase, assistant: nn.Module, name: str) -> Phase:
    """An assistant's phase under its name. If it trains the assistant, validation measures how accurate that is."""
    taught = any(module is assistant for module in phase.trains)

    def loss(batch: Batch) -> Losses:
        losses = dict(phase.loss(batch))
        if taught and not torch.is_grad_enabled():  # no part of what is minimised
            share = right(assistant(batch.x).float(), batch.y)
            losses[SHOWN] = torch.tensor(share, dtype=torch.float64)
        return losses

    return dataclasses.replace(phase, name=f"{name} {phase.name}", loss=loss)


def prefixed(note: Callable[[str, Any], None], name: str) -> Callable[[str, Any], None]:
    return lambda key, value: note(f"{name}.{key}", value)


PLUGIN = Assistant
