"""Calibration sets: real training images as network inputs, with a manifest that says which; or the user's own file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.dataset import Task
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError, DataError
from edgekd.onnx.inputs import load_calibration, missing
from edgekd.utils.splits import stratified


@dataclass(frozen=True)
class CalibConfig(Settings):
    images: int = 256
    seed: int = 0  # of the choice
    file: str = ""  # own network inputs (.npz or .npy), of which the first `images` serve; empty: training images

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"calib.images is {self.images}", hint="use 1 or more; 256 serve most networks")


@dataclass(frozen=True)
class CalibrationSet:
    images: File  # .npz with one array, `image`: network inputs, (N, C, H, W) float32
    manifest: File  # where they come from


def collect(out: Path, task: Task, config: CalibConfig, source: str) -> CalibrationSet:
    """Choose training images, every class with its share, and write `images.npz` and `manifest.json`.

    images.npz holds one array, `image`: network inputs, (N, C, H, W) float32; equal choices give equal bytes.
    `source` is the name of the data set, for the manifest. Raises DataError if there are fewer images than asked for,
    or if a file of the user's holds other than training images.
    """
    if config.file:
        return own(out, task, config)
    train = task.train.load()
    if len(train.labels) < config.images:
        raise DataError(
            f"calib.images is {config.images}, but the training split has {len(train.labels)}",
            hint=f"set `calib.images` to {len(train.labels)} or less",
        )
    kinds = np.zeros(len(train.labels), np.int64) if task.dense else train.labels
    indices, _ = stratified(kinds, config.images, config.seed)
    inputs = task.inputs(np.asarray(train.images[indices]))
    counts = [] if task.dense else np.bincount(kinds[indices], minlength=len(task.classes)).tolist()
    classes = dict(zip(task.classes, counts, strict=False))
    return written(out, task, inputs, source, config.seed, classes, indices.tolist())


def own(out: Path, task: Task, config: CalibConfig) -> CalibrationSet:
    """The first images of the user's file. Raises DataError if it does not fit, or holds images of the test split."""
    path = Path(config.file)
    inputs = load_calibration(path, TensorSpec("image", (0, *task.shape)))
    if len(inputs) < config.images:
        raise DataError(
            f"calib.images is {config.images}, but `{path}` holds {len(inputs)}",
            hint=f"set `calib.images` to {len(inputs)} or less",
        )
    inputs = np.asarray(inputs[: config.images])
    train, test = (set(prints(split.load().images)) for split in (task.train, task.test))
    strange = sum(one in test and one not in train for one in prints(pixels(task, inputs)))
    if strange:
        raise DataError(
            f"`{path}` holds {strange} image{'s' * (strange > 1)} of the test split, which must not decide anything",
            hint="calibrate on training images; leave out `calib.file` to have them drawn",
        )
    return written(out, task, inputs, path.name, None, {}, None)


def own_file(config: CalibConfig) -> File | None:
    """What the user named instead of training images. Raises DataError if it is not there."""
    path = Path(config.file)
    if config.file and not path.is_file():
        raise missing(path)
    return File.of(path) if config.file else None


def pixels(task: Task, inputs: np.ndarray) -> np.ndarray:
    """The (N, H, W, C) uint8 images that network inputs were made from."""
    scaled = inputs.transpose(0, 2, 3, 1) * np.array(task.std, np.float32) + np.array(task.mean, np.float32)
    return np.asarray(np.clip(np.rint(scaled * 255), 0, 255), np.uint8)


def prints(images: np.ndarray) -> Iterator[bytes]:
    return (hashlib.sha256(image.tobytes()).digest() for image in images)


def written(
    out: Path,
    task: Task,
    inputs: np.ndarray,
    source: str,
    seed: int | None,
    per_class: dict[str, int],
    indices: list[int] | None,
) -> CalibrationSet:
    with (out / "images.npz").open("wb") as stream:
        np.savez(stream, image=inputs)  # uncompressed: bytes that no version of zlib changes, and that can be mapped
    images = File.of(out / "images.npz")
    manifest = {
        "source": source,
        "split": "train",
        "seed": seed,
        "count": len(inputs),
        "shape": list(inputs.shape),
        "dtype": str(inputs.dtype),
        "per_class": per_class,
        "mean": list(task.mean),
        "std": list(task.std),
        "input": "(pixel / 255 - mean) / std, channels first",
        "file": {"name": images.path.name, "sha256": images.sha256},
        "indices": indices,  # in the training split
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return CalibrationSet(images, File.of(out / "manifest.json"))
