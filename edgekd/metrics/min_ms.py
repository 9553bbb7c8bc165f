"""min_ms: the fastest call, in milliseconds; what the machine can do when nothing disturbs it.

Chen and Revels, "Robust benchmarking in noisy environments", https://arxiv.org/abs/1608.04295
"""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial


class MinMs:
    unit = "ms"
    better: Literal["higher", "lower"] = "lower"
    needs = 1
    reads = ("ns",)
    maps: bool | None = None

    def __call__(self, trial: Trial) -> float:
        return float(trial.ns.min()) / 1e6


PLUGIN = MinMs
