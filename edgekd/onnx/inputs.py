"""Read calibration inputs from a file."""

from __future__ import annotations

import json
import mmap
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgekd.core.artifact import TensorSpec
from edgekd.errors import DataError
from edgekd.utils.external import external_code

LARGEST = 4 << 30  # bytes of a compressed array: others are mapped, and read as they are needed


PORTION = 16  # inputs of a mapped file that are in memory at once


def load_calibration(path: Path, spec: TensorSpec) -> np.ndarray:
    """Read the network inputs in an .npz or .npy file, (N, ...), for the input `spec`; its batch size does not matter.

    Of an .npz with several arrays, the one with the name of the input. What is not compressed is mapped, not loaded.
    Raises DataError if the file cannot serve, or if the manifest beside it says that it is not of a training split.
    """
    array = read(path, spec)
    check_split(path)
    check_inputs(array, spec, f"`{path}`")
    return array


def check_split(path: Path) -> None:
    """Raise DataError if a manifest beside the file, as `collect` writes it, names another split than `train`."""
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
    """Raise DataError unless `array` holds finite inputs for `spec`; `where` names it in the sentence."""
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
    if not all(np.isfinite(part).all() for part in batches(array, PORTION)):
        raise DataError(
            f"{where} holds numbers that are not finite", hint="look for a division by a standard deviation of 0"
        )


def batches(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield an array in parts of that length. Of a mapped file, no more than a few are in memory."""
    for start in range(0, len(array), size):
        yield array[start : start + size]
        if start // PORTION != (start + size) // PORTION:
            release(array)


def release(array: np.ndarray) -> None:
    """Release the pages of a mapped file, which would stay in memory until others need the room."""
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        size in (length, 0) for length, size in zip(shape[1:], spec.shape[1:], strict=True)
    )


def read(path: Path, spec: TensorSpec) -> np.ndarray:
    """Return the array in the file. Raises DataError if it is missing, unreadable, or not clear which one it is."""
    if not path.is_file():
        raise missing_file(path)
    names: list[str] = []
    readable = "write it with numpy.savez(path, image=inputs)"
    with external_code(f"`{path}` is not a readable .npz or .npy file of numbers", readable, DataError):
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


def missing_file(path: Path) -> DataError:
    return DataError(f"there is no calibration file `{path}`", hint="give an .npz or .npy file of network inputs")


def member(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Return an array in an .npz file: mapped where it is stored uncompressed, else loaded."""
    if info.compress_type != zipfile.ZIP_STORED:
        if info.file_size > LARGEST:
            raise DataError(
                f"`{path}` unpacks to {info.file_size / 1e9:.0f} GB", hint="write it with numpy.savez, not compressed"
            )
        with np.load(path, allow_pickle=False) as archive:
            array: np.ndarray = archive[info.filename.removesuffix(".npy")]
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
