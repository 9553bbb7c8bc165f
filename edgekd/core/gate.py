"""A gate: what the file that ships must reach on its target, and what was decided."""

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
    """One limit. `measure` is a metric, or `drop` and `teacher_drop` (points of top-1 lost against the float original
    and the teacher), `speedup` (the teacher's median latency over the file's), `kilobytes`, `macs`, `parameters`,
    `memory_mb` (that a process needs more with the file than without; with the scope `cold`)."""

    measure: str
    at_most: float | None = None
    at_least: float | None = None
    target: str = ""  # empty: every target

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.at_most, self.at_least) if limit is not None]
        if len(limits) != 1:
            raise ConfigError(
                f"the gate `{self.measure}` has {len(limits)} limits", hint="give `at_most` or `at_least`, one of them"
            )
        if not math.isfinite(limits[0]):
            raise ConfigError(f"the limit of the gate `{self.measure}` is {limits[0]}", hint="give a number")

    @property
    def words(self) -> str:
        """drop at most 0.5"""
        way, limit = ("at least", self.at_least) if self.at_most is None else ("at most", self.at_most)
        return f"{self.measure} {way} {limit:g}"


@dataclass(frozen=True)
class Decision:
    """What came of one gate on one target."""

    target: str
    gate: Gate
    contestant: str  # the file that it is about; "" if none was measured
    outcome: Outcome
    found: Interval | None  # the number with its 95 % interval; None: there is none
    reason: str  # in words
