"""How much worse a number became between two builds: an interval, an outcome, and words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from edgekd.core.bench_result import BenchResult, Interval
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError
from edgekd.stages.bench import statistics

Outcome = Literal["regression", "undecided", "held", "not judged"]


@dataclass(frozen=True)
class Tolerance(Settings):
    """What is not yet a regression."""

    percent: float = 5.0  # that latency, memory and file may grow by
    points: float = 1.0  # of accuracy and agreement that may be lost

    def __post_init__(self) -> None:
        for name, value in (("--tolerance", self.percent), ("--max-drop", self.points)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}", hint="give a number, 0 or more")


@dataclass(frozen=True)
class Scale:
    """How a difference is said."""

    unit: str
    worse: str
    better: str
    unsure: str
    least: float = 0.0  # what is not told


TIME = Scale(" %", "slower", "faster", statistics.NOISY, 100 * statistics.SMALLEST)
SIZE = Scale(" %", "larger", "smaller", statistics.NOISY)
SHARE = Scale(" points", "worse", "better", "too few images to say")


@dataclass(frozen=True)
class Change:
    """One number of one model in one table, in both builds."""

    table: str  # cpu; cpu, batch 8
    model: str
    metric: str
    outcome: Outcome
    description: str  # "6.2 % slower (5.1 to 7.3)"
    old: float | None = None
    new: float | None = None
    unit: str = ""  # of both: "×", "ms", "%", "MB", "B", "per s"
    by: Interval | None = None  # how much worse, in percent of the old or in points, with its 95 %; None: not known


def quotient(a: Interval, b: Interval, noise: float = 1.0) -> Interval:
    """`a` by `b`, which were measured apart; both are above 0. `noise` is a factor that both runs may be off by.

    Errors of logarithms add as squares, on either side of the middle (MOVER: Zou and Donner, Statistics in Medicine
    27, 2008).
    """
    mid, spare = a.estimate / b.estimate, math.log(noise)
    below = math.hypot(math.log(a.estimate / a.low), math.log(b.high / b.estimate), spare)
    above = math.hypot(math.log(a.high / a.estimate), math.log(b.estimate / b.low), spare)
    return Interval(mid * math.exp(-below), mid, mid * math.exp(above))


def minus(a: Interval, b: Interval) -> Interval:
    """`a` less `b`, as if they were independent (MOVER; of Wilson's intervals: Newcombe, Statistics in Medicine 17,
    1998). Of the same images it is too wide rather than too narrow: what is hard for one is for the other."""
    mid = a.estimate - b.estimate
    return Interval(
        mid - math.hypot(a.estimate - a.low, b.high - b.estimate),
        mid,
        mid + math.hypot(a.high - a.estimate, b.estimate - b.low),
    )


def to_percent(factor: Interval) -> Interval:
    """Percent, of a factor."""
    return Interval(*(100 * (value - 1) for value in (factor.low, factor.estimate, factor.high)))


def aa_noise(benches: Iterable[BenchResult]) -> float:
    """By what factor runs are off beyond their intervals, by their A/A controls: in logarithms, a root of squares."""
    return math.exp(math.hypot(*(math.log(band(bench)) for bench in benches)))


def band(bench: BenchResult) -> float:
    """Return the factor by which one run is off beyond its intervals.

    Intervals over several processes include how much those differ. On a device, processes are the parts of an
    interrupted run, and intervals do not include their difference.
    """
    if bench.aa_ratio is None:
        return 1 + statistics.PROCESSES_DIFFER
    if bench.protocol.get("processes", 1) != 1 and "locked_clocks" not in bench.protocol:
        return max(bench.aa_ratio.estimate, 1 / bench.aa_ratio.estimate)
    return max(bench.aa_ratio.high, 1 / bench.aa_ratio.low, 1 + statistics.PROCESSES_DIFFER)


def judge(of: Change, by: Interval, limit: float, scale: Scale) -> Change:
    """`of` with what `by`, how much worse it became, means: held where it is surely within the limit, a regression
    where it is surely beyond."""
    outcome: Outcome = "held" if by.high <= limit else "regression" if by.low > limit else "undecided"
    return replace(of, by=by, outcome=outcome, description=format_change(by, limit, scale))


def format_change(by: Interval, limit: float, scale: Scale) -> str:
    unit = scale.unit
    if by.low == by.high:
        way = scale.worse if by.estimate > 0 else scale.better
        much = f"{abs(by.estimate):.1f}" if abs(by.estimate) >= 0.05 else "less than 0.1"
        return f"{much}{unit} {way}" if by.estimate else "the same"
    if by.low > scale.least:
        return f"{by.estimate:.1f}{unit} {scale.worse} ({by.low:.1f} to {by.high:.1f})"
    if by.high < -scale.least:
        return f"{-by.estimate:.1f}{unit} {scale.better} ({-by.high:.1f} to {-by.low:.1f})"
    verdict = "no measurable difference" if by.high <= limit else scale.unsure
    return f"{verdict} ({by.low:+.1f} to {by.high:+.1f}{unit})"
