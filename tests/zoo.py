"""Toy networks and data that are small enough for a laptop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from edgekd.core.artifact import File
from edgekd.core.dataset import Arrays, Augment, Content, Source, Task
from edgekd.core.model import Model
from edgekd.core.quant_scheme import DIALECTS
from edgekd.pipelines.target_probe import draft
from edgekd.stages.distill.dataset import prepare
from edgekd.stages.export.export import ExportConfig
from edgekd.stages.quantize.ranges import QuantizeConfig

CLASSES = 3


def conv(entering: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(entering, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


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
class Blobs(Source):
    """Noisy copies of one random picture for each class."""

    count: int = 48
    noise: float = 60.0

    @property
    def augment(self) -> Augment:
        return Augment(crop=1, flip=True)

    def read(self, limit: int | None) -> Content:
        random = np.random.default_rng(0)
        centres = random.integers(60, 196, (CLASSES, 8, 8, 1))

        def some(count: int) -> Arrays:
            labels = np.arange(count) % CLASSES
            noisy = centres[labels] + random.normal(0, self.noise, (count, 8, 8, 1))
            return Arrays(noisy.clip(0, 255).astype(np.uint8), labels.astype(np.int64))

        return Content(some(self.count), some(24), some(30), ("a", "b", "c"))


def blobs_task(folder) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    return prepare(folder, Blobs(), None)


def drafted(folder, network, dialect=DIALECTS["ort-x86"], inputs=None):
    """What the INT8 file of a toy network rounds; `inputs` calibrate, (N, 1, 8, 8) unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = np.random.default_rng(0).standard_normal((16, 1, 8, 8), np.float32) if inputs is None else inputs
    np.savez(folder / "images.npz", image=inputs)
    images = File.of(folder / "images.npz")
    return draft(folder / "work", network, dialect, images, ExportConfig(opset=17), QuantizeConfig())
