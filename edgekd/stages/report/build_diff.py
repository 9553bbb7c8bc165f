"""One table of measurements in two builds: what changed for each model in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edgekd.core.artifact import size
from edgekd.core.bench_result import BenchResult, Interval, Measurement
from edgekd.core.task import primary_metrics
from edgekd.stages.bench import gates
from edgekd.stages.bench.cold_start import TIMES as STARTS
from edgekd.stages.bench.intervals import accuracy_lost
from edgekd.stages.bench.statistics import NOISY
from edgekd.stages.report import change as change_module
from edgekd.stages.report.change import SHARE, SIZE, TIME, Change, Outcome, Tolerance, judge
from edgekd.stages.report.tables import percentages, scored

# of a protocol: what a call holds and how calls follow each other, and the state that the machine was set to
PROTOCOL = (
    *(
        "batch",
        "scope",
        "rounds",
        "calls_per_round",
        "calls_due_per_s",
        "processes",
        "warmup_s",
        "warmup_calls",
        "runtime",
    ),
    *("power_mode", "locked_clocks", "l4t"),
)
CONDITIONS = ("affinity", "cpu_quota", "governor")
LITTLE_MB = 0.001  # of memory, below which shares of it mean nothing
# warnings after which two runs do not compare: one had the machine to itself
DOUBTS = (*gates.DOUBTS, "contended", "steal")


@dataclass(frozen=True)
class TablePair:
    """The table in both builds."""

    old: BenchResult
    new: BenchResult
    tolerance: Tolerance
    same_images: bool  # that were tested on
    right: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # model -> which of them it got right, (images,) bool

    @property
    def differing(self) -> list[str]:
        """Why absolute times do not compare."""
        return list(condition_differences(self.old, self.new))

    @staticmethod
    def same_file(old: Measurement, new: Measurement) -> bool:
        return old.model.file.sha256 == new.model.file.sha256

    @property
    def noise(self) -> float:
        return change_module.aa_noise((self.old, self.new))

    @property
    def doubt(self) -> str:
        """A warning that leaves latencies undecided."""
        return next((w for bench in (self.new, self.old) for w in bench.warnings if w.startswith(DOUBTS)), "")

    @property
    def teachers(self) -> list[Measurement | None]:
        """What the ratios of each build are to."""
        return [next((m for m in bench.measurements if m.speedup is None), None) for bench in (self.old, self.new)]


def condition_differences(old: BenchResult, new: BenchResult) -> Iterator[str]:
    """What is not equal of machine, runtime and protocol, in words."""
    for kind in ("machine", "runtime"):
        a, b = getattr(old, kind), getattr(new, kind)
        if not (a and b):
            yield f"the {kind} is not known"
            continue
        for name, x in vars(a).items():
            if x != getattr(b, name):
                yield f"{kind}: {name} {x} before, {getattr(b, name)} now"
    for name in (*PROTOCOL, *CONDITIONS):
        x, y = (setting(bench.protocol, name) for bench in (old, new))
        if x != y:
            yield f"{name} {x} before, {y} now"


def setting(protocol: dict[str, Any], name: str) -> Any:
    conditions = protocol.get("conditions")
    return conditions.get(name) if name in CONDITIONS and isinstance(conditions, dict) else protocol.get(name)


def remarks(pair: TablePair) -> Iterator[str]:
    """What a reader must know of the table."""
    if pair.differing:
        yield (
            f"not under the same conditions ({'; '.join(pair.differing)}): absolute times do not compare; ratios to "
            "the teacher are each of their own machine, and one that fell is undecided"
        )
    names = [[m.model.name for m in bench.measurements] for bench in (pair.old, pair.new)]
    for there, other, words in ((*names, "no longer there"), (*names[::-1], "new")):
        if some := [name for name in there if name not in other]:
            yield f"{words}: {', '.join(some)}"
    if all(pair.teachers) and not same_teacher(pair):
        yield "the teacher is another network, so ratios to it do not compare"


def same_teacher(pair: TablePair) -> bool:
    """Whether ratios are to files that take equally long, as far as their size says; their weights may be others."""
    entries = [m.model if m else None for m in pair.teachers]
    a, b = ((c.macs, c.parameters, c.precision, c.compute_precision) if c else None for c in entries)
    return a is not None and a == b


def table(pair: TablePair, old_selected: str, new_selected: str) -> Iterator[Change]:
    """Yield the changes of the selected model, which are judged, and those of all others, which are only reported."""
    old, new = ({m.model.name: m for m in bench.measurements} for bench in (pair.old, pair.new))
    if old_selected in old and new_selected in new:
        name = new_selected if old_selected == new_selected else f"{old_selected}, now {new_selected}"
        yield from model(pair, name, old[old_selected], new[new_selected])
    elif old_selected in old:
        text = (
            f"{new_selected} is selected now, which is not in this table"
            if new_selected
            else "no file is selected any more"
        )
        outcome: Outcome = "undecided" if new_selected else "regression"
        yield Change(pair.old.title, old_selected, "selected", outcome, text)
    for name in old:
        if name in new and not name == old_selected == new_selected:
            changes = (change for change in model(pair, name, old[name], new[name]) if change.by)
            yield from (replace(change, outcome="not judged") for change in changes)


def model(pair: TablePair, name: str, old: Measurement, new: Measurement) -> Iterator[Change]:
    of = partial(Change, pair.old.title, name)
    yield from latency(pair, of, old, new)
    for key in (scored(pair.old), "agreement"):
        if key in old.metrics:
            yield percentage_change(pair, of, key, old, new)
    if not pair.old.scenario:
        yield from sizes(pair, of, old, new)


def latency(pair: TablePair, of: partial[Change], old: Measurement, new: Measurement) -> Iterator[Change]:
    """The ratio to the teacher decides. The median must not contradict a regression, where it compares."""
    ratio, median = by_ratio(pair, of, old, new), by_median(pair, of, old, new)
    decided = ratio or median
    if decided is None:
        yield from untimed(pair, of, old, new)
        return
    slower = decided.outcome == "regression"
    why, outcome, words = "", decided.outcome, decided.description
    if pair.same_file(old, new) and not pair.differing:
        why, outcome = "the same file", "held"
        if slower and not pair.doubt:
            why, outcome = "the same file, so it is the machine that moved", "undecided"
    elif pair.doubt:
        words, why, outcome = f"{NOISY}: {pair.doubt}", f"measured: {words}", "undecided"
    elif slower and pair.differing:
        why, outcome = "not under the same conditions", "undecided"
    elif slower and ratio and median and median.outcome == "held":
        why, outcome = "its own median held, so it is the teacher's that moved", "undecided"
    yield replace(decided, outcome=outcome, description="; ".join(filter(None, (words, why))))
    if ratio and median:
        yield replace(median, outcome="not judged")


def untimed(pair: TablePair, of: partial[Change], old: Measurement, new: Measurement) -> Iterator[Change]:
    """Where nothing says how much slower a call became. Starts are few, and told only."""
    if old.speedup or latency_key(old):
        reason = "neither times nor ratios compare" if latency_key(new) else new.verdict or "is not measured any more"
        yield of("latency", "undecided", reason)
    for key in (key for key in STARTS if key in old.intervals and key in new.intervals and not pair.differing):
        a, b = old.intervals[key], new.intervals[key]
        change = of(key.removesuffix("_ms"), "not judged", "", a.estimate, b.estimate, "ms")
        by = change_module.to_percent(change_module.quotient(b, a))
        yield replace(judge(change, by, pair.tolerance.percent, TIME), outcome="not judged")


def latency_key(m: Measurement) -> str:
    """The reading that says how long a call takes; empty where none does."""
    return next((key for key in ("p50_ms", "images_per_s") if key in m.intervals), "")


def by_ratio(pair: TablePair, of: partial[Change], old: Measurement, new: Measurement) -> Change | None:
    if not (old.speedup and new.speedup and same_teacher(pair)):
        return None
    change = of("speed-up", "not judged", "", old.speedup.estimate, new.speedup.estimate, "×")
    by = change_module.to_percent(change_module.quotient(old.speedup, new.speedup, pair.noise))
    return judge(change, by, pair.tolerance.percent, TIME)


def by_median(pair: TablePair, of: partial[Change], old: Measurement, new: Measurement) -> Change | None:
    key = latency_key(old)
    if pair.differing or not key or key not in new.intervals:
        return None
    a, b = old.intervals[key], new.intervals[key]
    if key == "p50_ms":
        factor, change = (
            change_module.quotient(b, a, pair.noise),
            of("median", "not judged", "", a.estimate, b.estimate, "ms"),
        )
    else:
        factor, change = (
            change_module.quotient(a, b, pair.noise),
            of("images", "not judged", "", a.estimate, b.estimate, "per s"),
        )
    return judge(change, change_module.to_percent(factor), pair.tolerance.percent, TIME)


def percentage_change(pair: TablePair, of: partial[Change], key: str, old: Measurement, new: Measurement) -> Change:
    """Of images that are answered rightly, or as the float original answers; in points."""
    a, b = old.metrics[key], new.metrics.get(key)
    change = of(percentages()[key][0], "undecided", "is not measured any more", a, b, "%")
    if b is None:
        return change
    if pair.same_images and pair.same_file(old, new) and a == b:
        return replace(
            change, outcome="held", by=Interval(0.0, 0.0, 0.0), description="the same file on the same images"
        )
    rights = [known.get(m.model.name) for known, m in zip(pair.right, (old, new), strict=True)]
    if key in primary_metrics() and rights[0] is not None and rights[1] is not None:
        by, basis = accuracy_lost(rights[0], rights[1]), f"paired over {len(rights[0]):,} images"
    elif key in old.intervals and key in new.intervals:
        by, basis = change_module.minus(old.intervals[key], new.intervals[key]), "from the two intervals"
    else:
        return replace(change, description="has no interval")
    judged = judge(change, by, pair.tolerance.points, SHARE)
    return replace(judged, description=f"{judged.description}, {basis}")


def sizes(pair: TablePair, of: partial[Change], old: Measurement, new: Measurement) -> Iterator[Change]:
    """Of the file; and the memory of a start, where machines are the same."""
    bytes_ = [size(m.model.file) for m in (old, new)]
    if bytes_[0] and bytes_[1]:
        factor = bytes_[1] / bytes_[0]
        by = change_module.to_percent(Interval(factor, factor, factor))
        yield judge(
            of("file", "not judged", "", *map(float, filter(None, bytes_)), "B"), by, pair.tolerance.percent, SIZE
        )
    a, b = (m.intervals.get("memory_mb") for m in (old, new))
    if a is None or b is None:
        return
    change = of("memory", "not judged", "not compared: not under the same conditions", a.estimate, b.estimate, "MB")
    if not pair.differing and min(a.low, b.low) > LITTLE_MB:
        change = judge(change, change_module.to_percent(change_module.quotient(b, a)), pair.tolerance.percent, SIZE)
    yield change
