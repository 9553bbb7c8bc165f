"""Calibration sets: real training images as network inputs, with a manifest that says which; or the user's own file."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.errors import ConfigError, DataError
from edgekd.core.foreign import foreign
from edgekd.core.settings import Settings
from edgekd.core.splits import stratified
from edgekd.core.task import Task

LARGEST = 4 << 30  # bytes of a compressed array: others are mapped, and read as they are needed
PORTION = 16  # inputs of a mapped file that are in memory at once


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


def load_calibration(path: Path, spec: TensorSpec) -> np.ndarray:
    """The network inputs in an .npz or .npy file, (N, ...), fit for the input `spec`; its batch size does not matter.

    Of an .npz with several arrays, the one that is called like the input. What is not compressed is mapped, not loaded.
    Raises DataError if the file cannot serve, or if the manifest beside it says that it is not of a training split.
    """
    array = read(path, spec)
    check_split(path)
    check_inputs(array, spec, f"`{path}`")
    return array


def check_split(path: Path) -> None:
    """Raises DataError if a manifest beside the file, as `collect` writes it, names another split than `train`."""
    beside = path.with_name("manifest.json")
    try:
        manifest = json.loads(beside.read_bytes()) if beside.is_file() else None
    except (OSError, ValueError, RecursionError):  # somebody else's
        return
    if not isinstance(manifest, dict) or manifest.get("split", "train") == "train":
        return
    file = manifest.get("file")
    if isinstance(file, dict) and file.get("name") == path.name:
        raise DataError(
            f"`{path}` is of the split `{manifest['split']}`, as `{beside}` says, which must not decide anything",
            hint="calibrate on training images",
        )


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
    if not all(np.isfinite(part).all() for part in portions(array, PORTION)):
        raise DataError(
            f"{where} holds numbers that are not finite", hint="look for a division by a standard deviation of 0"
        )


def portions(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The parts of an array that are so long. Of a mapped file, no more than a few are in memory."""
    for start in range(0, len(array), size):
        yield array[start : start + size]
        if start // PORTION != (start + size) // PORTION:
            release(array)


def release(array: np.ndarray) -> None:
    """Let go of what was read of a mapped file; it would stay in memory until others need the room."""
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        size in (found, 0) for found, size in zip(shape[1:], spec.shape[1:], strict=True)
    )


def read(path: Path, spec: TensorSpec) -> np.ndarray:
    """The array in the file. Raises DataError if it is missing, unreadable, or not clear which one it is."""
    if not path.is_file():
        raise missing(path)
    names: list[str] = []
    readable = "write it with numpy.savez(path, image=inputs)"
    with foreign(f"`{path}` is not a readable .npz or .npy file of numbers", readable, DataError):
        if path.suffix == ".npy" or not zipfile.is_zipfile(path):
            array: np.ndarray = np.lib.format.open_memmap(path, mode="c")
            return array
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            name = names[0] if len(names) == 1 else spec.name
            if name in names:
                return member(path, archive.getinfo(f"{name}.npy"))
    raise DataError(
        f"`{path}` holds the arrays {', '.join(names) or 'none'}, but none called `{spec.name}`",
        hint=f"keep one array, or call it `{spec.name}` like the model's input",
    )


def missing(path: Path) -> DataError:
    return DataError(f"there is no calibration file `{path}`", hint="give an .npz or .npy file of network inputs")


def member(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """An array in an .npz file: mapped where it is stored as it is, else loaded."""
    if info.compress_type != zipfile.ZIP_STORED:
        if info.file_size > LARGEST:
            raise DataError(
                f"`{path}` unpacks to {info.file_size / 1e9:.0f} GB", hint="write it with numpy.savez, not compressed"
            )
        with np.load(path, allow_pickle=False) as found:
            array: np.ndarray = found[info.filename.removesuffix(".npy")]
            return array
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)  # of the lengths of the name and of what follows it, before the content
        name, extra = np.frombuffer(stream.read(4), "<u2").tolist()
        stream.seek(name + extra, os.SEEK_CUR)
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, turned, dtype = header(stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        # a private map: torch takes no arrays that it may not write
        return np.memmap(path, dtype, "c", stream.tell(), shape, "F" if turned else "C")
