"""Toy networks and data that are small enough for a laptop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from edgekd.core.artifact import File
from edgekd.core.augment import Augment
from edgekd.core.dataset import Dataset, DatasetSplits, PreparedDataset, SplitArrays
from edgekd.core.model import Model
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.core.task import OutputSpec
from edgekd.pipelines.target_probe import build_quant_spec
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.stages.export.export import ExportConfig
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.tasks.classification import Classification

CLASSES = 3


def conv(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Toy(nn.Module):
    """Three convolutions; (N, 1, 8, 8) to (N, 3)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stage1, self.stage2 = conv(1, width, 1), conv(width, 2 * width, 2)
        self.stage3 = conv(2 * width, 4 * width, 1)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


class Residual(nn.Module):
    """(N, width, H, W) to the same shape, linear past its branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Staged(nn.Module):
    """Two stages that end in residual blocks: three, and two behind a convolution; (N, 1, 8, 8) to (N, 3)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = conv(1, width, 1)
        self.stage1 = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.stage2 = nn.Sequential(conv(width, 2 * width, 2), *(Residual(2 * width) for _ in range(2)))
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


@dataclass(frozen=True)
class ToyFamily(Model):
    width: int = 4

    def build(self, classes: int, channels: int) -> nn.Module:
        return Toy(self.width)


@dataclass(frozen=True)
class Blobs(Dataset):
    """Noisy copies of one random picture for each class."""

    count: int = 48
    noise: float = 60.0

    @property
    def task(self) -> str:
        return "classification"

    @property
    def augment(self) -> Augment:
        return Augment(crop=1, flip=True)

    def read(self, limit: int | None) -> DatasetSplits:
        random = np.random.default_rng(0)
        centres = random.integers(60, 196, (CLASSES, 8, 8, 1))

        def some(count: int) -> SplitArrays:
            labels = np.arange(count) % CLASSES
            noisy = centres[labels] + random.normal(0, self.noise, (count, 8, 8, 1))
            return SplitArrays(noisy.clip(0, 255).astype(np.uint8), labels.astype(np.int64))

        return DatasetSplits(some(self.count), some(24), some(30), ("a", "b", "c"))


def logits(classes: int) -> tuple[OutputSpec, ...]:
    """What a classifier answers one image with."""
    return Classification().outputs(classes, (1, 8, 8))


def blobs_dataset(folder) -> PreparedDataset:
    folder.mkdir(parents=True, exist_ok=True)
    return prepare_dataset(folder, Blobs(), None)


def drafted(folder, network, scheme=QUANT_SCHEMES["ort-x86"], inputs=None):
    """What the INT8 file of a toy network rounds; `inputs` calibrate, (N, 1, 8, 8) unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = np.random.default_rng(0).standard_normal((16, 1, 8, 8), np.float32) if inputs is None else inputs
    np.savez(folder / "images.npz", image=inputs)
    images = File.of(folder / "images.npz")
    return build_quant_spec(folder / "work", network, scheme, images, ExportConfig(opset=17), QuantizeConfig())
