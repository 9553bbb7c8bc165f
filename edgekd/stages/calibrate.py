"""Calibration sets: real training images as network inputs, with a manifest that says which; or the user's own file."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.errors import ConfigError, DataError
from edgekd.core.settings import Settings
from edgekd.core.splits import stratified
from edgekd.core.task import Task


@dataclass(frozen=True)
class CalibConfig(Settings):
    images: int = 256
    seed: int = 0  # of the choice

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
    `source` is the name of the data set, for the manifest. Raises DataError if there are fewer images than asked for.
    """
    train = task.train.load()
    if len(train.labels) < config.images:
        raise DataError(
            f"calib.images is {config.images}, but the training split has {len(train.labels)}",
            hint=f"set `calib.images` to {len(train.labels)} or less",
        )
    kinds = np.zeros(len(train.labels), np.int64) if task.dense else train.labels
    indices, _ = stratified(kinds, config.images, config.seed)
    inputs = task.inputs(np.asarray(train.images[indices]))
    with (out / "images.npz").open("wb") as stream:
        np.savez(stream, image=inputs)  # uncompressed: bytes that no version of zlib changes
    images = File.of(out / "images.npz")
    counts = [] if task.dense else np.bincount(kinds[indices], minlength=len(task.classes)).tolist()
    manifest: dict[str, Any] = {
        "source": source,
        "split": "train",
        "seed": config.seed,
        "count": len(indices),
        "shape": list(inputs.shape),
        "dtype": str(inputs.dtype),
        "per_class": dict(zip(task.classes, counts, strict=False)),
        "mean": list(task.mean),
        "std": list(task.std),
        "input": "(pixel / 255 - mean) / std, channels first",
        "file": {"name": images.path.name, "sha256": images.sha256},
        "indices": indices.tolist(),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return CalibrationSet(images, File.of(out / "manifest.json"))


def load_calibration(path: Path, spec: TensorSpec) -> np.ndarray:
    """The network inputs in an .npz or .npy file, (N, ...), fit for the input `spec`; its batch size does not matter.

    Of an .npz with several arrays, the one that is called like the input. Raises DataError if the file cannot serve.
    """
    array = read(path, spec)
    check_inputs(array, spec, f"`{path}`")
    return array


def check_inputs(array: np.ndarray, spec: TensorSpec, where: str) -> None:
    """Raises DataError unless `array` holds finite inputs for `spec`; `where` names it in the sentence."""
    wanted = f"(N, {', '.join(str(size or 'any') for size in spec.shape[1:])})"
    if str(array.dtype) != spec.dtype:
        raise DataError(
            f"{where} holds {array.dtype}, but the model's input `{spec.name}` is {spec.dtype}",
            hint="save what the network takes: scaled and normalised inputs, not pixels",
        )
    if not fits(array.shape, spec):
        turned = array.ndim == 4 and fits(tuple(array.shape[i] for i in (0, 3, 1, 2)), spec)
        raise DataError(
            f"{where} has shape {array.shape}, but the model's input `{spec.name}` needs {wanted}",
            hint="put the channels first: array.transpose(0, 3, 1, 2)" if turned else f"save inputs of shape {wanted}",
        )
    if not len(array):
        raise DataError(f"{where} holds no inputs", hint="save at least one; 256 serve most networks")
    if not np.isfinite(array).all():
        raise DataError(
            f"{where} holds numbers that are not finite", hint="look for a division by a standard deviation of 0"
        )


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        size in (found, 0) for found, size in zip(shape[1:], spec.shape[1:], strict=True)
    )


def read(path: Path, spec: TensorSpec) -> np.ndarray:
    """The array in the file. Raises DataError if it is missing, unreadable, or not clear which one it is."""
    if not path.is_file():
        raise DataError(f"there is no calibration file `{path}`", hint="give an .npz or .npy file of network inputs")
    try:
        with path.open("rb") as stream:
            found: Any = np.load(stream)
            if isinstance(found, np.ndarray):
                return found
            names = list(found)
            name = names[0] if len(names) == 1 else spec.name
            if name in names:
                array: np.ndarray = found[name]
                return array
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"`{path}` is not a readable .npz or .npy file of numbers: {error}",
            hint="write it with numpy.savez(path, image=inputs)",
        ) from error
    raise DataError(
        f"`{path}` holds the arrays {', '.join(names) or 'none'}, but none called `{spec.name}`",
        hint=f"keep one array, or call it `{spec.name}` like the model's input",
    )
