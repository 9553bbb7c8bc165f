"""p99_ms: the latency that 99 of 100 calls stay within, in milliseconds.

MLPerf's early stopping (confidence 0.99, tolerance 0) asks for 662 calls before it speaks of this percentile.
"""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial
from edgekd.metrics._percentile import nearest_rank


class P99Ms:
    unit = "ms"
    better: Literal["higher", "lower"] = "lower"
    needs = 662
    reads = ("ns",)
    maps: bool | None = None

    def __call__(self, trial: Trial) -> float:
        return nearest_rank(trial.ns, 99) / 1e6


PLUGIN = P99Ms
