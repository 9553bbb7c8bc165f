"""Arrays on disk, whole or not at all; those from outside are read without running or believing anything in them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgekd.utils.external import foreign

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
LARGEST = 1 << 30  # bytes of what an archive from outside unpacks to


def save_array(path: Path, array: np.ndarray) -> None:
    """Write `array` to `path` as .npy. An error of the system comes with its number, which numpy's own loses."""
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
    """What is in an .npy file from outside. Raises ConfigError where that is no array of numbers or text."""

    def load() -> np.ndarray:
        from numpy.lib import format as npy

        with path.open("rb") as stream:
            array: np.ndarray = npy.read_array(stream, allow_pickle=False)
        return array

    return unpacked(path, load)


def load_arrays(path: Path, names: Iterable[str]) -> list[np.ndarray]:
    """Those of an .npz file from outside. Raises ConfigError where one is not there, or no array of numbers or text."""
    import numpy as np

    def load() -> list[np.ndarray]:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST:
                raise ValueError(f"it would unpack to more than {LARGEST >> 20} MiB")
        with np.load(path, allow_pickle=False) as stored:
            found = [stored[name] for name in names]
        if not all(isinstance(array, np.ndarray) for array in found):
            raise ValueError("a part of it is no array")
        return found

    return unpacked(path, load)


def unpacked(path: Path, load: Callable[[], T]) -> T:
    """What `load` makes of the file, or whatever is wrong with it in a ConfigError."""
    with foreign(f"`{path}` holds no arrays that can be read", "it was changed, or cut off"):
        return load()
