"""What a metric is: a number derived from the samples of one benchmark entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgekd.core.bench_result import Samples

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Metric:
    """A pure function of samples: it runs no model."""

    summary: str
    """One line for `edgekd list metrics`."""
    unit: str
    better: Literal["higher", "lower"]
    compute: Callable[[Samples], float]
    inputs: tuple[str, ...]
    """The fields of Samples that it reads; the metric is left out where one of them is empty."""
    min_calls: int = 0
    """Timed calls below which the number would mean nothing."""
    title: str = ""
    """Its name for readers; empty: that of the configuration."""
    hits: Callable[[Samples], np.ndarray] | None = None
    """(images,) bool, where the metric is the percentage of images that count: intervals are exact then, and those of
    two files on the same images are paired. None: intervals are by jackknife, so `compute` must do with some images."""

    def applies_to(self, samples: Samples) -> bool:
        """Whether `samples` have all that it reads."""
        return all(samples.has(name) for name in self.inputs)


def hit_rate(
    summary: str, title: str, unit: str, inputs: tuple[str, ...], hits: Callable[[Samples], np.ndarray]
) -> Metric:
    """Return the metric that is the percentage of images that count."""
    return Metric(summary, unit, "higher", lambda samples: 100 * float(hits(samples).mean()), inputs, 0, title, hits)
