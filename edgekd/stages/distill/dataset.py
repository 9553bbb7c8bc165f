"""Stage 1: decode a data set once, into arrays with hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.dataset import SPLITS, Dataset, DatasetSplits, Normalization, PreparedDataset, Split, SplitArrays
from edgekd.core.task import Task, task_named
from edgekd.errors import DataError
from edgekd.utils.arrays import save_array


def prepare_dataset(
    out: Path,
    source: Dataset,
    limit: int | None,
    normalize: Normalization | None = None,
    task: Task | None = None,
) -> PreparedDataset:
    """Write the splits of `source` as .npy files; at most `limit` images of each class.

    Inputs are normalized by the mean and deviation of the training images, or by `normalize`, which a teacher may need.
    `task` is what is learned; None: the task of the data set.
    """
    task = task or task_named(source.task)
    content = source.read(limit)
    check_shapes(content)
    splits = {}
    for name in SPLITS:
        arrays: SplitArrays = getattr(content, name)
        task.check_targets(name, arrays.labels, arrays.images, content.classes)
        splits[name] = write_split(out, name, arrays)
    height, width, channels = content.train.images.shape[1:]
    normalize = normalize or measure_normalization(content.train.images)
    if len(normalize.mean) != channels:
        raise DataError(
            f"the images have {channels} channels, `normalize` has {len(normalize.mean)}",
            hint="teacher and student need images with the same channels",
        )
    return PreparedDataset(
        **splits,
        classes=content.classes,
        shape=(channels, height, width),
        mean=normalize.mean,
        std=normalize.std,
        task=task,
    )


def measure_normalization(images: np.ndarray) -> Normalization:
    """Return mean and standard deviation of each channel of (N, H, W, C) images, divided by 255."""
    pixels = images.reshape(-1, images.shape[-1])
    mean, std = pixels.mean(0, dtype=np.float64) / 255, pixels.std(0, dtype=np.float64) / 255
    # a constant channel must not divide by zero
    return Normalization(tuple(float(m) for m in mean), tuple(float(max(s, 1e-3)) for s in std))


def check_shapes(content: DatasetSplits) -> None:
    """Raise DataError unless the images of all splits have one shape."""
    train = content.train.images.shape[1:]
    for name in SPLITS:
        shape = getattr(content, name).images.shape[1:]
        if shape != train:
            if shape[:2] == train[:2]:
                channels = f"train images have {train[2]} channels, {name} images {shape[2]}"
                raise DataError(channels, hint="give all splits the same channels")
            sizes = f"{train[1]}x{train[0]}", f"{shape[1]}x{shape[0]}"
            raise DataError(f"train images are {sizes[0]}, {name} images {sizes[1]}", hint="set data.size")


def write_split(out: Path, name: str, arrays: SplitArrays) -> Split:
    """Write the arrays of a split as .npy files."""
    save_array(out / f"{name}-images.npy", np.ascontiguousarray(arrays.images))
    save_array(out / f"{name}-labels.npy", arrays.labels)
    return Split(File.of(out / f"{name}-images.npy"), File.of(out / f"{name}-labels.npy"))


def export_test_inputs(out: Path, dataset: PreparedDataset) -> File:
    """Return the test images as a network takes them: .npy, (N, C, H, W) float32."""
    save_array(out / "inputs.npy", dataset.inputs(dataset.test.load().images))
    return File.of(out / "inputs.npy")
