"""What a task is: what a network learns, what its outputs mean, and how they are judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from edgekd.core import plugins
from edgekd.core.artifact import TensorSpec
from edgekd.core.augment import Augment
from edgekd.core.metric import Metric
from edgekd.core.settings import Plugin

if TYPE_CHECKING:  # core never imports torch when it runs: `edgekd bench` works without it
    import numpy as np
    from torch import Tensor

Outputs: TypeAlias = Any  # what a network returns: one tensor, or a tuple of them in the order of `Task.outputs`


@dataclass(frozen=True)
class OutputSpec:
    """One output of a network."""

    name: str  # of the tensor in the ONNX file
    shape: tuple[int, ...]  # for one image


@dataclass(frozen=True)
class Task(Plugin, ABC):
    """What is learnt. Fields are its settings.

    `outputs` and `targets` of training are torch tensors of a batch, those of metrics and of `agreement` NumPy arrays;
    a sample without a label has a target that the task tells from all others.
    """

    FOLDER: ClassVar[str] = "tasks"
    # outputs are class logits, (N, classes), and a sample has one class: for methods that compare probabilities of
    # classes, and for programs on a device that compare top classes
    class_logits: ClassVar[bool] = False

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the mean loss over labelled samples, a scalar; 0 if there are none."""

    @abstractmethod
    def distill_loss(
        self, outputs: Outputs, teacher_outputs: Outputs, temperature: float = 1.0, standardize: bool = False
    ) -> Tensor:
        """Return how far outputs are from a teacher's, a scalar, smallest where they are equal.

        Args:
            temperature: softens class logits, where the task has such.
            standardize: bring class logits to mean 0 and deviation 1 first, where the task has such.
        """

    @abstractmethod
    def sample_losses(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the loss of each sample, (N,); infinite for an unlabelled one."""

    @abstractmethod
    def accuracy(self, outputs: Outputs, targets: Tensor) -> float:
        """Return the fraction of a batch that is right, 0 to 1, as the primary metric counts it."""

    def chance(self, num_classes: int) -> float | None:
        """Return the accuracy of guessing, 0 to 1; None where it is not known."""
        return None

    @abstractmethod
    def unlabelled(self, targets: Tensor) -> Tensor:
        """Return where targets are unknown, bool in the shape of `targets`."""

    @abstractmethod
    def fill_targets(self, targets: Tensor, teacher_outputs: Outputs) -> Tensor:
        """Return the targets, those that are unknown taken from a teacher's outputs."""

    @abstractmethod
    def transform(
        self, images: Tensor, targets: Tensor, augment: Augment, random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch: (N, H, W, C) uint8 images, and the targets that move with them."""

    @abstractmethod
    def check_targets(self, split: str, targets: np.ndarray, images: np.ndarray, classes: tuple[str, ...]) -> None:
        """Check the targets of a split, of (N, H, W, C) images. Raises DataError where they are none of this task."""

    @abstractmethod
    def hide_targets(self, targets: np.ndarray) -> np.ndarray:
        """Return an array like `targets`, in which every sample is unlabelled."""

    def sample_classes(self, targets: np.ndarray) -> np.ndarray | None:
        """Return the class of each sample, (N,) int64; None where a sample has no single class."""
        return None

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the group of each sample, (N,) int64, of which a random choice keeps the fractions."""
        import numpy as np

        classes = self.sample_classes(targets)
        return np.zeros(len(targets), np.int64) if classes is None else classes

    def num_strata(self, num_classes: int) -> int:
        """Return how many groups `strata` makes of a data set."""
        return num_classes if self.class_logits else 1

    @abstractmethod
    def outputs(self, num_classes: int, shape: tuple[int, int, int]) -> tuple[OutputSpec, ...]:
        """Return what a network answers one image with; `shape` is the image's: channels, height, width."""

    @abstractmethod
    def matches(self, outputs: Sequence[TensorSpec]) -> bool:
        """Tell whether the outputs of an ONNX file, by their number and dimensions, may be those of this task."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Return the metrics by name, the primary one first: it is a percentage, and more is better.

        They are the table METRICS of the task's file, so that every metric has one name.
        """

    @property
    def primary_metric(self) -> str:
        """The name of the metric that is a network's accuracy."""
        return next(iter(self.metrics()))

    @abstractmethod
    def agreement(self, outputs: tuple[np.ndarray, ...], reference: tuple[np.ndarray, ...]) -> float:
        """Return how alike two files answer the same images, in percent; 100 for equal outputs."""


def output_tensors(outputs: Outputs) -> tuple[Any, ...]:
    """Return a network's outputs as a tuple, whether it returns one tensor or several."""
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def task_named(name: str) -> Task:
    """Return the task of that name with its default settings. Raises ConfigError if there is none."""
    task: Task = plugins.load("tasks", name)()
    return task


def matching_task(outputs: Sequence[TensorSpec]) -> Task | None:
    """Return the task that an ONNX file of unknown origin may be of; None where no task has such outputs."""
    return next((task for task in map(task_named, plugins.names("tasks")) if task.matches(outputs)), None)


def primary_metrics() -> tuple[str, ...]:
    """Return the name of each task's primary metric: one of them is the accuracy of a network."""
    return tuple(dict.fromkeys(task_named(name).primary_metric for name in plugins.names("tasks")))
