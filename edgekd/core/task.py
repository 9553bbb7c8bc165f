"""The task: images and labels in three named splits, and where they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.core.artifact import File
from edgekd.core.settings import Plugin

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Arrays:
    """One split in memory: images (N, H, W, C) in uint8, labels (N,) in int64."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Content:
    """What a source reads: its three splits and the names of the classes."""

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
class Split:
    images: File  # .npy, (N, H, W, C) uint8
    labels: File  # .npy, (N,) int64

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
    mean: tuple[float, ...]  # per channel, of the training split
    std: tuple[float, ...]

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) uint8 to the network's input, (N, C, H, W) float32."""
        import numpy as np

        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
        return np.array(scaled.transpose(0, 3, 1, 2), order="C")  # a copy: with one channel a view would pass for it
