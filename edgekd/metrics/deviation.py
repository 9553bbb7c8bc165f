"""deviation: mean absolute difference of the file's maps from its float original's, in the unit of the labels."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgekd.core.bench_result import Trial


class Deviation:
    unit = "as the labels"
    better: Literal["higher", "lower"] = "lower"
    needs = 0
    reads = ("logits", "reference")
    maps: bool | None = True

    def __call__(self, trial: Trial) -> float:
        return float(np.abs(trial.logits - trial.reference).mean())


PLUGIN = Deviation
