"""p50_ms: the median latency of a call, in milliseconds.

MLPerf's early stopping (confidence 0.99, tolerance 0) asks for 11 calls before it speaks of this percentile.
"""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial
from edgekd.metrics._percentile import nearest_rank


class P50Ms:
    unit = "ms"
    better: Literal["higher", "lower"] = "lower"
    needs = 11
    reads = ("ns",)
    maps: bool | None = None

    def __call__(self, trial: Trial) -> float:
        return nearest_rank(trial.ns, 50) / 1e6


PLUGIN = P50Ms
