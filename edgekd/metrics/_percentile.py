"""The percentiles that the latency metrics share: always a value that was really measured."""

from __future__ import annotations

import math
from functools import cache

import numpy as np


def nearest_rank(values: np.ndarray, percent: float) -> float:
    """The smallest of `values` that at least `percent` of them do not exceed. No interpolation, as in trtexec."""
    rank = max(math.ceil(percent / 100 * len(values)), 1) - 1
    return float(np.partition(values, rank)[rank])


CONFIDENCE = 0.99  # of MLPerf's early stopping


def at_most(values: np.ndarray, percent: float) -> float:
    """What that percentile of the source of `values` does not exceed, with 99 % confidence: MLPerf's early stopping.

    The t-th largest value, t being the most for which so few of as many calls would lie beyond the percentile in 1 % of
    cases at most. Raises ValueError for fewer values than that needs: 64 for 90 percent, 662 for 99.
    """
    allowed = over_latency(len(values), percent)
    if not allowed:
        raise ValueError(f"{len(values)} values say nothing of the {percent:g}th percentile with {CONFIDENCE:.0%}")
    return float(np.partition(values, len(values) - allowed)[len(values) - allowed])


@cache
def over_latency(n: int, percent: float) -> int:
    """How many of `n` calls may lie beyond: the largest t with P(X <= t) <= 1 %, X binomial of n and 1 - percent."""
    p = 1 - percent / 100
    seen, t = 0.0, 0
    while t <= n:
        log = math.lgamma(n + 1) - math.lgamma(t + 1) - math.lgamma(n - t + 1)
        seen += math.exp(log + t * math.log(p) + (n - t) * math.log1p(-p))
        if seen > 1 - CONFIDENCE:
            break
        t += 1
    return max(t - 1, 0)
