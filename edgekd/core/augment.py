"""Random changes to training images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Augment:
    """Shift by up to `crop` pixels (zero padding), mirror."""

    crop: int = 0
    flip: bool = False
