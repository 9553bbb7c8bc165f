"""Load metrics by name, and compute them."""

from __future__ import annotations

from collections.abc import Iterable

from edgekd.core import plugins
from edgekd.core.bench_result import Samples
from edgekd.core.metric import Metric
from edgekd.core.task import Task


def applicable_metrics(samples: Samples, names: Iterable[str], task: Task | None = None) -> dict[str, Metric]:
    """Return those of the named metrics that can be computed from `samples`: of the task, or of times."""
    of_task = task.metrics() if task else {}
    metrics: dict[str, Metric] = {name: of_task.get(name) or plugins.load("metrics", name) for name in names}
    return {
        name: metric
        for name, metric in metrics.items()
        if (name in of_task or "outputs" not in metric.inputs) and metric.applies_to(samples)
    }


def compute_metrics(samples: Samples, names: Iterable[str], task: Task | None = None) -> dict[str, float]:
    """Return name -> value of those of the named metrics that can be computed from `samples`."""
    return {name: metric.compute(samples) for name, metric in applicable_metrics(samples, names, task).items()}
