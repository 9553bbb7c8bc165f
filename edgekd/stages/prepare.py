"""Stage 1: decode a data set once, into arrays with hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.errors import DataError
from edgekd.core.task import SPLITS, Arrays, Source, Split, Task


def prepare(out: Path, source: Source, limit: int | None) -> Task:
    """Write the splits of `source` as .npy files; at most `limit` images of each class."""
    content = source.read(limit)
    splits = {}
    for name in SPLITS:
        arrays: Arrays = getattr(content, name)
        lacking = set(range(len(content.classes))) - set(np.unique(arrays.labels).tolist())
        if lacking:
            named = ", ".join(content.classes[i] for i in sorted(lacking))
            raise DataError(f"the {name} split has no image of {named}", hint="give every class more images")
        splits[name] = write(out, name, arrays)
    pixels = content.train.images.reshape(-1, content.train.images.shape[-1])
    mean, std = pixels.mean(0, dtype=np.float64) / 255, pixels.std(0, dtype=np.float64) / 255
    height, width, channels = content.train.images.shape[1:]
    return Task(
        **splits,
        classes=content.classes,
        shape=(channels, height, width),
        mean=tuple(float(m) for m in mean),
        std=tuple(float(max(s, 1e-3)) for s in std),  # a constant channel must not divide by zero
    )


def write(out: Path, name: str, arrays: Arrays) -> Split:
    np.save(out / f"{name}-images.npy", np.ascontiguousarray(arrays.images))
    np.save(out / f"{name}-labels.npy", arrays.labels)
    return Split(File.of(out / f"{name}-images.npy"), File.of(out / f"{name}-labels.npy"))


def exam(out: Path, task: Task) -> File:
    """The test images as a network takes them: .npy, (N, C, H, W) float32."""
    np.save(out / "inputs.npy", task.inputs(task.test.load().images))
    return File.of(out / "inputs.npy")
