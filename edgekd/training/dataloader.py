"""Training batches from images in memory: shuffled, augmented, normalized, reproducible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekd.core.augment import Augment
from edgekd.core.dataset import PreparedDataset, SplitArrays


class ArrayLoader:
    """One split as tensors. Images stay in uint8 (N, H, W, C), which is channels-last already."""

    def __init__(self, arrays: SplitArrays, dataset: PreparedDataset, augment: Augment, device: torch.device) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(arrays.images)).to(device)
        self.labels = torch.from_numpy(arrays.labels).to(device)
        self.augment, self.task = augment, dataset.task
        self.mean = 255 * torch.tensor(dataset.mean, device=device)
        self.scale = 1 / (255 * torch.tensor(dataset.std, device=device))

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch: int, samples: Sequence[int] | None = None) -> int:
        """Batches of an epoch, over all images or some."""
        count = len(self) if samples is None else len(samples)
        return max(1, min(-(-count // batch), count // 2))

    def shuffled(
        self, batch: int, seed: int, samples: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One epoch of (x, y, index): every image once, in batches of like size; none is too small for BatchNorm."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self) if samples is None else np.asarray(samples))
        for index in np.array_split(order, self.steps(batch, samples)):
            yield self.gather(index, random)

    def ordered(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return all images once, in order and as they are."""
        for index in np.array_split(np.arange(len(self)), self.steps(batch)):
            yield self.gather(index, None)

    def gather(self, index: np.ndarray, random: np.random.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.from_numpy(index).to(self.labels.device)
        images, labels = self.images[rows], self.labels[rows]
        if random is not None:
            images, labels = self.task.transform(images, labels, self.augment, random)
        x = ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
        return x, labels, rows


@dataclass(frozen=True)
class Shift:
    """Where the pixels of augmented images come from, in the images padded by `padding` on all sides."""

    padding: int
    rows: Tensor  # (N, H)
    columns: Tensor  # (N, W)


def draw_shift(images: Tensor, augment: Augment, random: np.random.Generator) -> Shift:
    """Draw for each of (N, H, W, C) images a shift by up to `crop` pixels, and whether it is mirrored."""
    count, height, width, _ = images.shape
    device, padding = images.device, augment.crop
    top = torch.from_numpy(random.integers(0, 2 * padding + 1, count)).to(device)
    left = torch.from_numpy(random.integers(0, 2 * padding + 1, count)).to(device)
    mirrored = torch.from_numpy(random.random(count) < 0.5 * augment.flip).to(device)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = left[:, None] + torch.where(mirrored[:, None], width - 1 - columns, columns)
    return Shift(padding, rows, columns)


def shift_pixels(pixels: Tensor, shift: Shift, fill: float = 0) -> Tensor:
    """Move (N, H, W, C) images, or maps of their size; `fill` comes in from outside."""
    padded = torch.nn.functional.pad(pixels, (0, 0, *(shift.padding,) * 4), value=fill)
    index = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[index, shift.rows[:, :, None], shift.columns[:, None, :]]
