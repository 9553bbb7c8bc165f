"""Stage 1: decode a data set once, into arrays with hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.dataset import SPLITS, Arrays, Content, Scale, Source, Split, Task
from edgekd.errors import DataError
from edgekd.utils.arrays import save_array


def prepare(out: Path, source: Source, limit: int | None, scale: Scale | None = None) -> Task:
    """Write the splits of `source` as .npy files; at most `limit` images of each class.

    Inputs are scaled by the mean and deviation of the training images, or by `scale`, which a teacher may demand.
    """
    content = source.read(limit)
    check_shapes(content)
    dense = np.issubdtype(content.train.labels.dtype, np.floating)
    splits = {}
    for name in SPLITS:
        arrays: Arrays = getattr(content, name)
        if not dense:
            check_classes(name, arrays, content.classes)
        splits[name] = write(out, name, arrays)
    height, width, channels = content.train.images.shape[1:]
    scale = scale or measured(content.train.images)
    if len(scale.mean) != channels:
        raise DataError(
            f"the images have {channels} channels, their scale {len(scale.mean)}",
            hint="teacher and student need images with the same channels",
        )
    return Task(
        **splits, classes=content.classes, shape=(channels, height, width), mean=scale.mean, std=scale.std, dense=dense
    )


def measured(images: np.ndarray) -> Scale:
    """Mean and standard deviation of each channel of (N, H, W, C) images, as shares of 255."""
    pixels = images.reshape(-1, images.shape[-1])
    mean, std = pixels.mean(0, dtype=np.float64) / 255, pixels.std(0, dtype=np.float64) / 255
    # a constant channel must not divide by zero
    return Scale(tuple(float(m) for m in mean), tuple(float(max(s, 1e-3)) for s in std))


def check_classes(name: str, arrays: Arrays, classes: tuple[str, ...]) -> None:
    """Raises DataError unless every class has an image."""
    lacking = set(range(len(classes))) - set(np.unique(arrays.labels).tolist())
    if lacking:
        named = ", ".join(classes[i] for i in sorted(lacking))
        raise DataError(f"the {name} split has no image of {named}", hint="give every class more images")


def check_shapes(content: Content) -> None:
    """Raises DataError unless the images of all splits have one shape."""
    train = content.train.images.shape[1:]
    for name in SPLITS:
        found = getattr(content, name).images.shape[1:]
        if found != train:
            if found[:2] == train[:2]:
                what = f"train images have {train[2]} channels, {name} images {found[2]}"
                raise DataError(what, hint="give all splits the same channels")
            sizes = f"{train[1]}x{train[0]}", f"{found[1]}x{found[0]}"
            raise DataError(f"train images are {sizes[0]}, {name} images {sizes[1]}", hint="set data.size")


def write(out: Path, name: str, arrays: Arrays) -> Split:
    save_array(out / f"{name}-images.npy", np.ascontiguousarray(arrays.images))
    save_array(out / f"{name}-labels.npy", arrays.labels)
    return Split(File.of(out / f"{name}-images.npy"), File.of(out / f"{name}-labels.npy"))


def exam(out: Path, task: Task) -> File:
    """The test images as a network takes them: .npy, (N, C, H, W) float32."""
    save_array(out / "inputs.npy", task.inputs(task.test.load().images))
    return File.of(out / "inputs.npy")
