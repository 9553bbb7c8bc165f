"""What a distillation method is: a script that yields the phases to train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from edgekd.core.artifact import Learnt
from edgekd.core.model import Model
from edgekd.core.quant_spec import Blueprint
from edgekd.core.settings import Plugin
from edgekd.errors import EdgekdError

if TYPE_CHECKING:  # core never imports torch when it runs: `edgekd bench` works without it
    from torch import Tensor, nn

Losses: TypeAlias = "Mapping[str, Tensor]"  # the objective is their sum; weights are inside
Students: TypeAlias = "Mapping[str, nn.Module]"  # name -> plain module, nothing of the method left in it


@dataclass(frozen=True)
class Batch:
    """One mini-batch, already on the training device."""

    x: Tensor  # (N, C, H, W) float32
    y: Tensor  # (N,) int64, -1 where unlabelled; of a dense task (N, K, H, W) float32, NaN where unknown
    index: Tensor  # (N,) position of each sample in its split, for memory banks
    progress: float  # how much of the phase is over, 0 to 1, for warm-ups and fading weights


@dataclass(frozen=True)
class Phase:
    """One stretch of training: minimise the sum of `loss` over everything in `trains`.

    `loss` is also read on validation data, under no-grad and with `trains` in eval mode.
    """

    name: str
    trains: tuple[nn.Module, ...]  # only these change; all else is frozen and in eval mode
    loss: Callable[[Batch], Losses]
    epochs: int
    span: tuple[float, float] = (0.0, 1.0)  # the stretch of the learning-rate schedule that it runs through
    decay: Mapping[nn.Module, float] = field(default_factory=dict)  # weight decay, where not the trainer's
    samples: Sequence[int] | None = None  # learn from these training images only (Batch.index); None: from all


@dataclass(frozen=True)
class Outcome:
    """What a finished phase tells the script, measured on validation data."""

    losses: dict[str, float]  # mean of each named loss
    accuracy: float | None  # of lesson.student, 0 to 1; None if the phase does not train it


def not_here(model: Model) -> nn.Module:
    raise EdgekdError(f"this lesson builds no networks, here a {type(model).__name__}", hint="give it a `build`")


@dataclass(frozen=True)
class Lesson:
    """One student, its teachers, and the budget to teach it in."""

    student: nn.Module
    teachers: tuple[nn.Module, ...]
    epochs: int  # a method may spend fewer, never more
    classes: int  # of a dense task: values of each pixel
    sample: Callable[[int], Iterator[Batch]]  # the first training batches, unaugmented, in a fixed order
    dense: bool = False  # answers are maps (N, classes, H, W), not logits (N, classes)
    knows: tuple[tuple[int | None, ...], ...] = ()  # each teacher's column for each class; (): the same classes
    build: Callable[[Model], nn.Module] = not_here  # a network of a family for this task, with random weights
    price: Callable[[nn.Module], float] | None = None  # measured latency on the first target, ms; None: not measured
    note: Callable[[str, Any], None] = lambda key, value: None  # tell the report what was chosen; plain JSON
    blueprint: Callable[[nn.Module], Blueprint] | None = None  # of its INT8 file for the first target; None: not made
    learnt: Callable[[str, tuple[Learnt, ...]], None] = lambda student, ranges: None  # for that student's INT8 file


Script: TypeAlias = "Generator[Phase, Outcome, Students]"


@dataclass(frozen=True)
class Method(Plugin, ABC):
    """A distillation method. Fields are its settings; its state lives in `teach`."""

    FOLDER: ClassVar[str] = "methods"
    LABELS_ONLY: ClassVar[bool] = False  # it has no use for images without labels; it sees the others more often
    LEARNS_RANGES: ClassVar[bool] = False  # of its students' INT8 files: these belong to the weights as they are

    @property
    def priced(self) -> bool:
        """Whether `teach` asks what networks are on the first target: `lesson.price`, `lesson.blueprint`."""
        return False

    @abstractmethod
    def teach(self, lesson: Lesson) -> Script:
        """Yield each phase, be sent its outcome, return the students to deploy."""


def play(script: Script, run: Callable[[Phase], Outcome]) -> Students:
    """Run every phase of a script and hand back its students."""
    step = partial(next, script)
    while True:
        try:
            phase = step()
        except StopIteration as end:
            students: Students = end.value
            return students
        step = partial(script.send, run(phase))
