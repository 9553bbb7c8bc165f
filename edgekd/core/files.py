"""Arrays on disk, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


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
