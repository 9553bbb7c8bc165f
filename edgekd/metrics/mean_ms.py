"""mean_ms: the mean latency of a call, in milliseconds; one slow call moves it, so read it beside p50_ms."""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial


class MeanMs:
    unit = "ms"
    better: Literal["higher", "lower"] = "lower"
    needs = 1
    reads = ("ns",)
    maps: bool | None = None

    def __call__(self, trial: Trial) -> float:
        return float(trial.ns.mean()) / 1e6


PLUGIN = MeanMs
