"""Folders of small pictures whose classes can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(root: Path, classes: str, size: tuple[int, int] = (8, 8)) -> Path:
    """train/<class> and test/<class>: noisy copies of a random picture for each letter of `classes`."""
    random = np.random.default_rng(0)
    for name in classes:
        centre = random.integers(60, 196, (*size, 3))
        for part, count in (("train", 24), ("test", 10)):
            home = root / part / name
            home.mkdir(parents=True)
            for number in range(count):
                noisy = (centre + random.normal(0, 30, centre.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(home / f"{number:02d}.png")
    return root
