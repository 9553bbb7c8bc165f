"""Names of files that were read somewhere: whether they stay in their folder."""

from __future__ import annotations

import os
from pathlib import Path

LONGEST, DEEPEST = 255, 40  # letters of a name, names of a path: of what file systems take


def leads_out(folder: Path, name: str) -> bool:
    """Whether a name is none of a file in `folder`: absolute, with `..`, too long, or behind a link out of it."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts:
        return True
    if max(map(len, parts)) > LONGEST or len(parts) > DEEPEST:
        return True
    home = os.path.realpath(folder)  # not Path.resolve, which a circle of links ends
    return os.path.commonpath([home, os.path.realpath(folder / name)]) != home
