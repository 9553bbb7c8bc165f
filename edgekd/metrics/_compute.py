"""Compute metrics by name."""

from __future__ import annotations

from edgekd.core import plugins
from edgekd.core.bench_result import Metric, Trial


def readings(trial: Trial, names: tuple[str, ...]) -> dict[str, float]:
    """What the metrics say; one whose part of the trial is empty, or of another kind, says nothing."""
    metrics: dict[str, Metric] = {name: plugins.load("metrics", name)() for name in names}
    return {
        name: metric(trial)
        for name, metric in metrics.items()
        if metric.maps in (None, trial.logits.ndim > 2) and all(getattr(trial, part).size for part in metric.reads)
    }
