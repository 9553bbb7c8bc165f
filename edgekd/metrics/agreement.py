"""agreement: share of images on which the file and its float original answer the same class, in percent."""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial


class Agreement:
    unit = "%"
    better: Literal["higher", "lower"] = "higher"
    needs = 0
    reads = ("logits", "reference")
    maps: bool | None = False

    def __call__(self, trial: Trial) -> float:
        return 100 * float((trial.logits.argmax(1) == trial.reference.argmax(1)).mean())


PLUGIN = Agreement
