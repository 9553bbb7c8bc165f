"""Marks: statistics of a tensor's values for one fixed input, by which it is found again in whatever an exporter wrote.

Names do not last: torch's two exporters give tensors other names, optimisers rename and fuse. Values do. Two tensors
with one mark hold the same numbers (a view of a map, a maximum that changes nothing), so they also share a range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.core.artifact import Mark

PROBES = 4  # images that are looked at
NEAR = 1e-3  # of the largest magnitude: how far the statistics of two computations of one tensor are apart


def probe(shape: tuple[int, ...]) -> np.ndarray:
    """The fixed input for images of `shape`, (C, H, W): (4, C, H, W) float32, standard normal."""
    return np.random.default_rng(0).standard_normal((PROBES, *shape), np.float32)


def mark(values: np.ndarray) -> Mark:
    """The mark of a tensor that holds `values`, in any order."""
    numbers = values.astype(np.float64)
    return float(numbers.min()), float(numbers.max()), float(numbers.mean()), float(numbers.std())


def nearest(wanted: Mark, known: Sequence[Mark]) -> int | None:
    """The position among `known` of the mark that is nearest to `wanted`; None if there is none within tolerance."""
    if not known:
        return None
    gaps = np.abs(np.asarray(known) - wanted).max(1)
    best = int(gaps.argmin())
    return best if gaps[best] <= NEAR * max(abs(wanted[0]), abs(wanted[1])) else None
