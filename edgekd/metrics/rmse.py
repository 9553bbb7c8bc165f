"""rmse: root of the mean squared error over known pixels, in the unit of the labels."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgekd.core.bench_result import Trial


class Rmse:
    unit = "as the labels"
    better: Literal["higher", "lower"] = "lower"
    needs = 0
    reads = ("logits", "labels")
    maps: bool | None = True

    def __call__(self, trial: Trial) -> float:
        known = ~np.isnan(trial.labels)
        return float(np.sqrt(np.mean((trial.logits[known] - trial.labels[known]) ** 2)))


PLUGIN = Rmse
