"""assistant: a chain of networks of decreasing size, each taught by the previous one; wraps any method.

Teacher assistants (Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh, 2020, arXiv 1902.03393): where the gap
between teacher and student is too wide, teacher -> assistant -> ... -> student. Every step is a distillation by the
method `base`; with `kd` it minimises (1 - kd_weight) CE + kd_weight T^2 KL. The chain may mix network families
(Dastidar et al., 2021, arXiv 2102.10335: an assistant with an LSTM). The best assistant has an accuracy midway between
the teacher's and the student's; the report lists the validation accuracy of each.

Deviations from the paper, and why:
- The steps share the budget of one student: `assistants_fraction` of it is divided equally among the assistants, the
  student has the rest. In the paper each network has all epochs.
- The first assistant may have several teachers, if `base` needs them; every later network has one.
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
from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, PhaseResult, TrainingContext
from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.training.teachers import get_teacher
from edgekd.training.trainer import freeze

ACCURACY = "assistant accuracy"  # key beside the losses on validation data


@dataclass(frozen=True)
class Assistant(Method):
    """Settings of teacher assistants."""

    assistants: tuple[Model, ...]  # from the largest to the smallest
    base: Method  # distils each network of the chain
    assistants_fraction: float = 0.5  # of the budget, for all assistants together

    def __post_init__(self) -> None:
        if not self.assistants:
            raise ConfigError("assistants is empty", hint="name at least one network, or use `base` alone")
        if not 0 < self.assistants_fraction < 1:
            raise ConfigError(
                f"assistants_fraction is {self.assistants_fraction}", hint="use a fraction between 0 and 1"
            )

    @property
    def needs_target(self) -> bool:
        return self.base.needs_target

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        get_teacher(ctx)  # the chain starts with a teacher
        steps = self.steps(ctx)
        self.dry_run(steps)
        summary = []
        for number, family in enumerate(self.assistants):
            network, accuracy = yield from self.distil_assistant(steps[number], f"assistant{number + 1}")
            epochs = steps[number].epochs
            summary.append({"model": plugins.name_of(family), "epochs": epochs, "accuracy": accuracy})
            steps[number + 1] = with_teacher(steps[number + 1], network)
        ctx.log_choice("assistants", summary)
        return (yield from self.base.phases(steps[-1]))

    def steps(self, ctx: TrainingContext) -> list[TrainingContext]:
        """Return a context for each assistant, and the student's. Only the first has its teachers already."""
        count = len(self.assistants)
        each = max(1, int(self.assistants_fraction * ctx.epochs / count))
        if each * count >= ctx.epochs:
            raise ConfigError(
                f"{ctx.epochs} epochs leave none for the student after {count} assistants",
                hint="increase the epochs, or use fewer assistants",
            )
        steps = [
            dataclasses.replace(
                ctx, student=ctx.build(family), epochs=each, log_choice=prefixed(ctx.log_choice, f"assistant{number}")
            )
            for number, family in enumerate(self.assistants, 1)
        ]
        for step in steps:
            freeze(step)
        return [*steps, dataclasses.replace(ctx, epochs=ctx.epochs - each * count)]

    def dry_run(self, steps: list[TrainingContext]) -> None:
        """Run each step up to its first phase, on copies, so that errors of `base` are raised before any training."""
        for number, step in enumerate(steps):
            trial = with_teacher(step, steps[number - 1].student) if number else step
            trial = dataclasses.replace(trial, student=copy.deepcopy(step.student), log_choice=lambda key, value: None)
            phases = self.base.phases(trial)
            next(phases, None)
            phases.close()

    def distil_assistant(
        self, ctx: TrainingContext, name: str
    ) -> Generator[Phase, PhaseResult, tuple[nn.Module, float | None]]:
        """Train one assistant; return its network, and the validation accuracy after the last phase."""
        phases, accuracy = self.base.phases(ctx), None
        step = partial(next, phases)
        while True:
            try:
                phase = step()
            except StopIteration as end:
                network = end.value.get("student", ctx.student)
                return network.requires_grad_(False).eval(), accuracy
            freeze(ctx)  # the trainer only knows the student's context, and freezes that
            result = yield named_phase(phase, ctx, name)
            losses = dict(result.losses)
            accuracy = losses.pop(ACCURACY, None)
            step = partial(phases.send, PhaseResult(losses, accuracy))


def with_teacher(ctx: TrainingContext, network: nn.Module) -> TrainingContext:
    """Return the context with one teacher, which has the student's classes."""
    return dataclasses.replace(ctx, teachers=(network,), class_columns=())


def named_phase(phase: Phase, ctx: TrainingContext, name: str) -> Phase:
    """Return an assistant's phase under its name; if it trains the assistant, validation measures its accuracy, too."""
    trains_assistant = any(module is ctx.student for module in phase.trains)

    def loss(batch: Batch) -> Losses:
        losses = dict(phase.loss(batch))
        if trains_assistant and not torch.is_grad_enabled():  # it is not minimised
            accuracy = ctx.task.accuracy(ctx.student(batch.images).float(), batch.labels)
            losses[ACCURACY] = torch.tensor(accuracy, dtype=torch.float64)
        return losses

    return dataclasses.replace(phase, name=f"{name} {phase.name}", loss=loss)


def prefixed(log_choice: Callable[[str, Any], None], name: str) -> Callable[[str, Any], None]:
    """Return `log_choice` with a prefix before its keys."""
    return lambda key, value: log_choice(f"{name}.{key}", value)


PLUGIN = Assistant
