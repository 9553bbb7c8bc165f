"""Fingerprints: statistics of a tensor's values for one fixed input, which identify it in any exported graph.

Names do not survive: torch's two exporters name tensors differently, optimisers rename and fuse. Values do. Two tensors
with one fingerprint hold the same numbers (a view of a map, a maximum that changes nothing), so they share a range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.core.artifact import Fingerprint

NUM_PROBES = 4  # images in the fixed input
TOLERANCE = 1e-3  # relative to the largest magnitude: difference between two computations of one tensor


def probe_images(shape: tuple[int, ...]) -> np.ndarray:
    """Return the fixed input for images of `shape` (C, H, W): (4, C, H, W) float32, standard normal."""
    return np.random.default_rng(0).standard_normal((NUM_PROBES, *shape), np.float32)


def compute_fingerprint(values: np.ndarray) -> Fingerprint:
    """Return the fingerprint of a tensor that holds `values`; their order does not matter."""
    numbers = values.astype(np.float64)
    return float(numbers.min()), float(numbers.max()), float(numbers.mean()), float(numbers.std())


def nearest_fingerprint(query: Fingerprint, fingerprints: Sequence[Fingerprint]) -> int | None:
    """Return the index of the fingerprint that is nearest to `query`; None if none is within the tolerance."""
    if not fingerprints:
        return None
    gaps = np.abs(np.asarray(fingerprints) - query).max(1)
    best = int(gaps.argmin())
    return best if gaps[best] <= TOLERANCE * max(abs(query[0]), abs(query[1])) else None
