"""Latency of a call in milliseconds: percentiles and their upper bounds, mean and minimum; always of single calls.

Percentiles are the nearest rank: a value that was measured, no interpolation, as trtexec gives them. The upper bounds
and the number of calls that each percentile needs are MLPerf's early stopping (confidence 99 %, tolerance 0):
https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from edgekd.core.bench_result import Samples
from edgekd.core.metric import Metric

CONFIDENCE = 0.99


def nearest_rank(values: np.ndarray, percent: float) -> float:
    """Return the smallest of `values`, (n,), that at least `percent` of them do not exceed."""
    rank = max(math.ceil(percent / 100 * len(values)), 1) - 1
    return float(np.partition(values, rank)[rank])


def upper_bound(values: np.ndarray, percent: float) -> float:
    """Return what that percentile of the source of `values`, (n,), does not exceed, with 99 % confidence.

    It is the t-th largest value, t being the most for which so few of n calls would exceed the percentile in 1 % of
    cases at most. Raises ValueError for fewer values than that needs: 64 for 90 percent, 662 for 99.
    """
    allowed = over_latency(len(values), percent)
    if not allowed:
        raise ValueError(f"{len(values)} values cannot bound the {percent:g}th percentile with {CONFIDENCE:.0%}")
    return float(np.partition(values, len(values) - allowed)[len(values) - allowed])


@cache
def over_latency(n: int, percent: float) -> int:
    """Return how many of `n` calls may exceed it: the largest t with P(X <= t) <= 1 %, X ~ binomial(n, 1 - percent)."""
    p = 1 - percent / 100
    cumulative, t = 0.0, 0
    while t <= n:
        log = math.lgamma(n + 1) - math.lgamma(t + 1) - math.lgamma(n - t + 1)
        cumulative += math.exp(log + t * math.log(p) + (n - t) * math.log1p(-p))
        if cumulative > 1 - CONFIDENCE:
            break
        t += 1
    return max(t - 1, 0)


def latency(summary: str, min_calls: int, statistic: Callable[[np.ndarray], float]) -> Metric:
    """Return the metric that is a statistic of the nanoseconds of all calls."""

    def compute(samples: Samples) -> float:
        return float(statistic(samples.ns)) / 1e6

    return Metric(summary, "ms", "lower", compute, inputs=("ns",), min_calls=min_calls)


PLUGINS = {
    # Chen and Revels, "Robust benchmarking in noisy environments", https://arxiv.org/abs/1608.04295
    "min_ms": latency("the fastest call: what the machine can do when nothing disturbs it", 1, np.min),
    "mean_ms": latency("the mean of all calls; one slow call moves it, so read it beside p50_ms", 1, np.mean),
    "p50_ms": latency("the median of all calls", 11, partial(nearest_rank, percent=50)),
    "p90_ms": latency("the latency that 90 of 100 calls do not exceed", 64, partial(nearest_rank, percent=90)),
    "p99_ms": latency("the latency that 99 of 100 calls do not exceed", 662, partial(nearest_rank, percent=99)),
    "p90_upper_ms": latency("upper bound of p90 with 99 % confidence", 64, partial(upper_bound, percent=90)),
    "p99_upper_ms": latency("upper bound of p99 with 99 % confidence", 662, partial(upper_bound, percent=99)),
}
