"""p90_ms: the latency that 90 of 100 calls stay within, in milliseconds.

MLPerf's early stopping (confidence 0.99, tolerance 0) asks for 64 calls before it speaks of this percentile.
"""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial
from edgekd.metrics._percentile import nearest_rank


class P90Ms:
    unit = "ms"
    better: Literal["higher", "lower"] = "lower"
    needs = 64
    reads = ("ns",)
    maps: bool | None = None

    def __call__(self, trial: Trial) -> float:
        return nearest_rank(trial.ns, 90) / 1e6


PLUGIN = P90Ms
