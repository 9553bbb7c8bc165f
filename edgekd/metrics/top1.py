"""top1: share of images whose highest logit is the right class, in percent."""

from __future__ import annotations

from typing import Literal

from edgekd.core.bench_result import Trial


class Top1:
    unit = "%"
    better: Literal["higher", "lower"] = "higher"
    needs = 0
    reads = ("logits", "labels")
    maps: bool | None = False

    def __call__(self, trial: Trial) -> float:
        return 100 * float((trial.logits.argmax(1) == trial.labels).mean())


PLUGIN = Top1
