"""Calibration sets: training images as network inputs, with a manifest of which; or the user's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.dataset import PreparedDataset
from edgekd.core.settings import Settings
from edgekd.core.splits import stratified_split
from edgekd.errors import ConfigError, DataError
from edgekd.onnx.inputs import load_calibration, missing_file


@dataclass(frozen=True)
class CalibrationConfig(Settings):
    images: int = 256
    seed: int = 0  # of the choice
    file: str = ""  # network inputs (.npz or .npy), of which the first `images` are used; empty: training images

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"calibration.images is {self.images}", hint="use 1 or more; 256 serve most networks")


@dataclass(frozen=True)
class CalibrationSet:
    images: File  # .npz with one array, `image`: network inputs, (N, C, H, W) float32
    manifest: File  # where they come from


def collect_calibration_set(
    out: Path, dataset: PreparedDataset, config: CalibrationConfig, source: str
) -> CalibrationSet:
    """Choose training images, every class with its share, and write `images.npz` and `manifest.json`.

    images.npz holds one array, `image`: network inputs, (N, C, H, W) float32; equal choices give equal bytes.
    `source` is the name of the data set, for the manifest. Raises DataError if there are fewer images than asked for,
    or if a file of the user's holds other than training images.
    """
    if config.file:
        return copy_user_file(out, dataset, config)
    train = dataset.train.load()
    if len(train.labels) < config.images:
        raise DataError(
            f"calibration.images is {config.images}, but the training split has {len(train.labels)}",
            hint=f"set `calibration.images` to {len(train.labels)} or less",
        )
    indices, _ = stratified_split(dataset.task.strata(train.labels), config.images, config.seed)
    inputs = dataset.inputs(np.asarray(train.images[indices]))
    chosen = dataset.task.sample_classes(train.labels[indices])
    counts = [] if chosen is None else np.bincount(chosen, minlength=len(dataset.classes)).tolist()
    classes = dict(zip(dataset.classes, counts, strict=False))
    return write_set(out, dataset, inputs, Origin(source, config.seed, classes, indices.tolist()))


def copy_user_file(out: Path, dataset: PreparedDataset, config: CalibrationConfig) -> CalibrationSet:
    """Use the first images of the user's file. Raises DataError if it does not fit, or holds test images."""
    path = Path(config.file)
    inputs = load_calibration(path, TensorSpec("image", (0, *dataset.shape)))
    if len(inputs) < config.images:
        raise DataError(
            f"calibration.images is {config.images}, but `{path}` holds {len(inputs)}",
            hint=f"set `calibration.images` to {len(inputs)} or less",
        )
    inputs = np.asarray(inputs[: config.images])
    train, test = (set(image_digests(split.load().images)) for split in (dataset.train, dataset.test))
    num_test = sum(digest in test and digest not in train for digest in image_digests(pixels(dataset, inputs)))
    if num_test:
        raise DataError(
            f"`{path}` holds {num_test} image{'s' * (num_test > 1)} of the test split, which must not decide anything",
            hint="calibrate on training images; leave out `calibration.file` to have them drawn",
        )
    return write_set(out, dataset, inputs, Origin(path.name))


def user_file(config: CalibrationConfig) -> File | None:
    """Return the file to use instead of training images, if there is one. Raises DataError if it is not there."""
    path = Path(config.file)
    if config.file and not path.is_file():
        raise missing_file(path)
    return File.of(path) if config.file else None


def pixels(dataset: PreparedDataset, inputs: np.ndarray) -> np.ndarray:
    """Return the (N, H, W, C) uint8 images of network inputs."""
    scaled = inputs.transpose(0, 2, 3, 1) * np.array(dataset.std, np.float32) + np.array(dataset.mean, np.float32)
    return np.asarray(np.clip(np.rint(scaled * 255), 0, 255), np.uint8)


def image_digests(images: np.ndarray) -> Iterator[bytes]:
    """Yield a hash of each image."""
    return (hashlib.sha256(image.tobytes()).digest() for image in images)


@dataclass(frozen=True)
class Origin:
    """Where the images of a calibration set come from."""

    source: str  # the name of the data set or file
    seed: int | None = None
    per_class: dict[str, int] = field(default_factory=dict)
    indices: list[int] | None = None  # in the training split


def write_set(out: Path, dataset: PreparedDataset, inputs: np.ndarray, origin: Origin) -> CalibrationSet:
    """Write `inputs`, (N, C, H, W), and their manifest into `out`."""
    with (out / "images.npz").open("wb") as stream:
        np.savez(stream, image=inputs)  # uncompressed: bytes that no version of zlib changes, and that can be mapped
    images = File.of(out / "images.npz")
    manifest = {
        "source": origin.source,
        "split": "train",
        "seed": origin.seed,
        "count": len(inputs),
        "shape": list(inputs.shape),
        "dtype": str(inputs.dtype),
        "per_class": origin.per_class,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "input": "(pixel / 255 - mean) / std, channels first",
        "file": {"name": images.path.name, "sha256": images.sha256},
        "indices": origin.indices,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return CalibrationSet(images, File.of(out / "manifest.json"))
