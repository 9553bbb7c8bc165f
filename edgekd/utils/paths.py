"""Check that names of files from outside stay in their folder."""

from __future__ import annotations

import os
from pathlib import Path

LONGEST, DEEPEST = 255, 40  # letters of a name, names of a path: of what file systems take


def escapes_folder(folder: Path, name: str) -> bool:
    """Return whether a name is not that of a file in `folder`: absolute, with `..`, too long, or behind a link."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts:
        return True
    if max(map(len, parts)) > LONGEST or len(parts) > DEEPEST:
        return True
    home = os.path.realpath(folder)  # not Path.resolve, which a circle of links ends
    return os.path.commonpath([home, os.path.realpath(folder / name)]) != home
