"""delta1: share of known pixels within a factor of 1.25 of the truth, in percent (Eigen et al., 2014)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgekd.core.bench_result import Trial


class Delta1:
    unit = "%"
    better: Literal["higher", "lower"] = "higher"
    needs = 0
    reads = ("logits", "labels")
    maps: bool | None = True

    def __call__(self, trial: Trial) -> float:
        known = ~np.isnan(trial.labels)
        answer, truth = trial.logits[known], trial.labels[known]
        return 100 * float(((answer > truth / 1.25) & (answer < truth * 1.25)).mean())


PLUGIN = Delta1
