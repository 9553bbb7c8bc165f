"""The task: images and labels in three named splits, and where they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.core.artifact import File
from edgekd.core.settings import Plugin, Settings

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Arrays:
    """One split in memory: images (N, H, W, C) in uint8, labels (N,) in int64.

    Labels of a dense task are maps (N, K, H, W) in float32, NaN where a pixel's value is not known.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Content:
    """What a source reads: its three splits and the names of the classes; of a dense task, of the values of a pixel."""

    train: Arrays
    valid: Arrays
    test: Arrays
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Augment:
    """Random changes to training images: shift by up to `crop` pixels (zero padding), mirror."""

    crop: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Source(Plugin, ABC):
    """A kind of data set, with its settings."""

    FOLDER: ClassVar[str] = "data"

    @property
    @abstractmethod
    def augment(self) -> Augment: ...

    @abstractmethod
    def read(self, limit: int | None) -> Content:
        """The images, decoded; at most `limit` of each class in each of training and test data.

        Validation is cut from training data, never from test data.
        """


@dataclass(frozen=True)
class Scale(Settings):
    """What a network's inputs are scaled by, per channel: (image / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Split:
    images: File  # .npy, (N, H, W, C) uint8
    labels: File  # .npy, (N,) int64; of a dense task (N, K, H, W) float32

    def load(self) -> Arrays:
        import numpy as np

        return Arrays(np.load(self.images.path), np.load(self.labels.path))


@dataclass(frozen=True)
class Task:
    """A decoded data set on disk. A network's input is (image / 255 - mean) / std, as (N, C, H, W) float32."""

    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    dense: bool = False  # an answer is a map (N, len(classes), H, W), not logits (N, len(classes))

    def answer(self, count: int) -> tuple[int, ...]:
        """The shape of a network's answer to `count` images."""
        return (count, len(self.classes), *(self.shape[1:] if self.dense else ()))

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) uint8 to the network's input, (N, C, H, W) float32."""
        import numpy as np

        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
        return np.array(scaled.transpose(0, 3, 1, 2), order="C")  # a copy: with one channel a view would pass for it
