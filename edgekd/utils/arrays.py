"""Arrays on disk, written whole or not at all, and read without trusting what is in them; noise and its power."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgekd.utils.external import external_code

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
LARGEST = 1 << 30  # bytes of what an archive from outside unpacks to
MAX_DB = 120.0  # no noise at all


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy. An error of the system keeps its number, which numpy loses."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, array)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # half an array would fill a full disk


def load_array(path: Path) -> np.ndarray:
    """Return the array in an .npy file from outside. Raise ConfigError if it is not one of numbers or text."""

    def load() -> np.ndarray:
        from numpy.lib import format as npy

        with path.open("rb") as stream:
            array: np.ndarray = npy.read_array(stream, allow_pickle=False)
        return array

    return read_external(path, load)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return standard normal noise of that shape, float32: network inputs where only latency is wanted."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def power_ratio_db(signal: float, noise: float) -> float:
    """Return the ratio of two powers in dB, at most MAX_DB; 0 for noise without a signal."""
    if not noise:
        return MAX_DB
    return min(MAX_DB, 10 * math.log10(signal / noise)) if signal else 0.0


def load_arrays(path: Path, names: Iterable[str]) -> list[np.ndarray]:
    """Return arrays of an .npz file from outside. Raise ConfigError if one is missing, or not of numbers or text."""
    import numpy as np

    def load() -> list[np.ndarray]:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST:
                raise ValueError(f"it would unpack to more than {LARGEST >> 20} MiB")
        with np.load(path, allow_pickle=False) as stored:
            arrays = [stored[name] for name in names]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("a part of it is no array")
        return arrays

    return read_external(path, load)


def read_external(path: Path, load: Callable[[], T]) -> T:
    """Return what `load` returns. Raise ConfigError if it fails."""
    with external_code(f"`{path}` holds no arrays that can be read", "it was changed, or cut off"):
        return load()
