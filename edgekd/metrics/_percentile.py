"""The nearest-rank percentile that the latency metrics share: always a value that was really measured."""

from __future__ import annotations

import math

import numpy as np


def nearest_rank(values: np.ndarray, percent: float) -> float:
    """The smallest of `values` that at least `percent` of them do not exceed. No interpolation, as in trtexec."""
    rank = max(math.ceil(percent / 100 * len(values)), 1) - 1
    return float(np.partition(values, rank)[rank])
