"""p99_at_most_ms: what MLPerf's early stopping says of p99: with 99 % confidence it is at most this, in milliseconds.

As MLPerf's LoadGen: https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc
"""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial
from edgekd.metrics._percentile import at_most


class P99AtMostMs:
    unit = "ms"
    better: Literal["higher", "lower"] = "lower"
    needs = 662
    reads = ("ns",)
    maps: bool | None = None

    def __call__(self, trial: Trial) -> float:
        return at_most(trial.ns, 99) / 1e6


PLUGIN = P99AtMostMs
