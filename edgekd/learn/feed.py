"""Images in memory to training batches: shuffled, augmented, normalised, reproducible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from edgekd.core.task import Arrays, Augment, Task


class Feed:
    """One split as tensors. Images stay in uint8 (N, H, W, C), which is channels-last already."""

    def __init__(self, arrays: Arrays, task: Task, augment: Augment, device: torch.device) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(arrays.images)).to(device)
        self.labels = torch.from_numpy(arrays.labels).to(device)
        self.augment = augment
        self.mean = 255 * torch.tensor(task.mean, device=device)
        self.scale = 1 / (255 * torch.tensor(task.std, device=device))

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
        """All images once, in order and as they are."""
        for index in np.array_split(np.arange(len(self)), self.steps(batch)):
            yield self.gather(index, None)

    def gather(self, index: np.ndarray, random: np.random.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.from_numpy(index).to(self.labels.device)
        images = self.images[rows]
        if random is not None:
            images = augmented(images, self.augment, random)
        x = ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
        return x, self.labels[rows], rows


def augmented(images: Tensor, augment: Augment, random: np.random.Generator) -> Tensor:
    """Shift each image by up to `crop` pixels over zero padding, and mirror half of them."""
    count, height, width, _ = images.shape
    device, pad = images.device, augment.crop
    top = torch.from_numpy(random.integers(0, 2 * pad + 1, count)).to(device)
    left = torch.from_numpy(random.integers(0, 2 * pad + 1, count)).to(device)
    mirrored = torch.from_numpy(random.random(count) < 0.5 * augment.flip).to(device)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = left[:, None] + torch.where(mirrored[:, None], width - 1 - columns, columns)
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    which = torch.arange(count, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]
