"""The task: images and labels in three named splits, and where they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.core.artifact import File
from edgekd.core.augment import Augment
from edgekd.core.settings import Plugin, Settings
from edgekd.core.task import OutputSpec, Task

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitArrays:
    """One split in memory: images (N, H, W, C) in uint8, and targets as their task has them.

    Classification: labels (N,) in int64. Regression: maps (N, K, H, W) in float32, NaN where a value is unknown.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class DatasetSplits:
    """What a source reads: its three splits and the names of the classes, or of the values that are predicted."""

    train: SplitArrays
    valid: SplitArrays
    test: SplitArrays
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Dataset(Plugin, ABC):
    """A kind of data set, with its settings."""

    FOLDER: ClassVar[str] = "data"

    @property
    @abstractmethod
    def task(self) -> str:
        """What its targets are of: the name of a file in tasks/, such as `classification`."""

    @property
    @abstractmethod
    def augment(self) -> Augment: ...

    @abstractmethod
    def read(self, limit: int | None) -> DatasetSplits:
        """Return the images, decoded; at most `limit` of each class in each of training and test data.

        Validation is cut from training data, never from test data.
        """


@dataclass(frozen=True)
class Normalization(Settings):
    """What a network's inputs are scaled by, per channel: (image / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Split:
    images: File  # .npy, (N, H, W, C) uint8
    labels: File  # .npy, as the task has its targets

    def load(self) -> SplitArrays:
        import numpy as np

        return SplitArrays(np.load(self.images.path), np.load(self.labels.path))


@dataclass(frozen=True)
class PreparedDataset:
    """A decoded data set on disk. A network's input is (image / 255 - mean) / std, as (N, C, H, W) float32."""

    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    task: Task  # what is learnt from it

    def outputs(self, num_classes: int | None = None) -> tuple[OutputSpec, ...]:
        """Return what a network answers one image with: for the classes of the data set, or for so many others."""
        return self.task.outputs(len(self.classes) if num_classes is None else num_classes, self.shape)

    @property
    def num_strata(self) -> int:
        """Groups of images that have labels of their own: the classes, or 1 where images have none."""
        return self.task.num_strata(len(self.classes))

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) uint8 to the network's input, (N, C, H, W) float32."""
        import numpy as np

        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
        return np.array(scaled.transpose(0, 3, 1, 2), order="C")  # a copy: with one channel a view would pass for it
