"""The interface of a distillation method: a generator that yields the phases to train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from edgekd.core.artifact import LearnedRange
from edgekd.core.model import Model
from edgekd.core.quant_spec import QuantSpec
from edgekd.core.settings import Plugin
from edgekd.core.task import Task
from edgekd.errors import EdgekdError

if TYPE_CHECKING:  # core never imports torch when it runs: `edgekd bench` works without it
    from torch import Tensor, nn

Losses: TypeAlias = "Mapping[str, Tensor]"  # the objective is their sum; weights are inside
Students: TypeAlias = "Mapping[str, nn.Module]"  # name -> plain module, nothing of the method left in it


@dataclass(frozen=True)
class Batch:
    """A mini-batch on the training device."""

    images: Tensor  # (N, C, H, W) float32
    labels: Tensor  # targets as the task has them: of a classification (N,) int64, -1 where unlabelled
    index: Tensor  # (N,) position of each sample in its split, for memory banks
    progress: float  # completed fraction of the phase, 0 to 1, for warm-ups and fading weights


@dataclass(frozen=True)
class Phase:
    """A training phase: minimise the sum of the losses over the parameters of the modules in `trains`.

    `loss` is also evaluated on validation data, under no_grad and with `trains` in eval mode.
    """

    name: str
    trains: tuple[nn.Module, ...]  # only these change; everything else is frozen and in eval mode
    loss: Callable[[Batch], Losses]
    epochs: int
    lr_span: tuple[float, float] = (0.0, 1.0)  # the part of the learning-rate schedule that it uses
    weight_decay: Mapping[nn.Module, float] = field(default_factory=dict)  # by module, where it is not the trainer's
    samples: Sequence[int] | None = None  # train on these images only (Batch.index); None: on all


@dataclass(frozen=True)
class PhaseResult:
    """The result of a phase, measured on validation data; it is sent to the generator."""

    losses: dict[str, float]  # mean of each named loss
    accuracy: float | None  # of ctx.student, 0 to 1; None if the phase does not train it


def refuse_build(model: Model) -> nn.Module:
    """Raise EdgekdError: the context was created without `build`."""
    raise EdgekdError(f"this context cannot build a network ({type(model).__name__})", hint="give it a `build`")


@dataclass(frozen=True)
class TrainingContext:
    """The student, its teachers, the epoch budget, and what a method may ask of the build."""

    student: nn.Module
    teachers: tuple[nn.Module, ...]
    epochs: int  # a method may use fewer, never more
    num_classes: int  # or values that are predicted
    first_batches: Callable[
        [int], Iterator[Batch]
    ]  # training batches, not augmented, in a fixed order; at most so many
    task: Task  # what is learnt: it has the losses
    # by teacher and class: the column of its logits, None if it lacks the class; (): all have the student's classes
    class_columns: tuple[tuple[int | None, ...], ...] = ()
    build: Callable[[Model], nn.Module] = refuse_build  # a network for this data set, with random weights
    latency_ms: Callable[[nn.Module], float] | None = None  # measured on the first target; None: it cannot be measured
    quant_spec: Callable[[nn.Module], QuantSpec] | None = (
        None  # of the INT8 file for the first target; None: it has none
    )
    log_choice: Callable[[str, Any], None] = lambda key, value: None  # for the report; the value is plain JSON
    save_ranges: Callable[[str, tuple[LearnedRange, ...]], None] = lambda student, ranges: None  # for its INT8 file


PhaseGenerator: TypeAlias = "Generator[Phase, PhaseResult, Students]"


@dataclass(frozen=True)
class Method(Plugin, ABC):
    """A distillation method. Fields are its settings; its state lives in the locals of `phases`."""

    FOLDER: ClassVar[str] = "methods"
    LABELS_ONLY: ClassVar[bool] = False  # it cannot use unlabelled images; labelled ones are repeated instead
    LEARNS_RANGES: ClassVar[bool] = False  # of its students' INT8 files; they fit the exported weights only

    @property
    def needs_target(self) -> bool:
        """Whether `phases` uses the first target: `ctx.latency_ms` or `ctx.quant_spec`."""
        return False

    @abstractmethod
    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        """Yield each phase, receive its result, return the students to deploy.

        Raises:
            ConfigError: if the method does not fit the networks or the budget; before the first phase, if possible.
        """


def run_phases(phases: PhaseGenerator, run: Callable[[Phase], PhaseResult]) -> Students:
    """Run every phase of a method and return its students."""
    step = partial(next, phases)
    while True:
        try:
            phase = step()
        except StopIteration as end:
            students: Students = end.value
            return students
        step = partial(phases.send, run(phase))
