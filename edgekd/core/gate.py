"""A gate: a limit that the selected file must keep on its target, and what was decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgekd.core.bench_result import Interval
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError

Outcome = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Gate(Settings):
    """One limit for the selected file."""

    metric: str
    """The name of a metric, or `accuracy_drop` and `accuracy_drop_vs_teacher` (points of top-1 lost against the FP32
    file and the teacher), `speedup` (the teacher's median latency divided by the file's), `kilobytes`, `macs`,
    `parameters`, `memory_mb` (what a process needs more with the file than without; needs the scope `cold_start`)."""
    max: float | None = None
    min: float | None = None
    target: str = ""
    """Empty: every target."""

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.max, self.min) if limit is not None]
        if len(limits) != 1:
            raise ConfigError(
                f"the gate `{self.metric}` has {len(limits)} limits", hint="give `max` or `min`, not both"
            )
        if not math.isfinite(limits[0]):
            raise ConfigError(f"the limit of the gate `{self.metric}` is {limits[0]}", hint="give a number")

    @property
    def description(self) -> str:
        """accuracy_drop at most 0.5"""
        relation, limit = ("at least", self.min) if self.max is None else ("at most", self.max)
        return f"{self.metric} {relation} {limit:g}"


@dataclass(frozen=True)
class Decision:
    """The outcome of one gate on one target."""

    target: str
    gate: Gate
    model: str
    """The benchmark entry that was judged; empty if none was measured."""
    outcome: Outcome
    value: Interval | None
    """The metric with its 95 % interval; null if there is none."""
    reason: str
