"""One table of measurements in two builds: what changed for each model in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edgekd.core.artifact import size
from edgekd.core.bench_result import BenchResult, Interval, Measurement
from edgekd.stages.bench import gates
from edgekd.stages.bench.cold_start import TIMES as STARTS
from edgekd.stages.bench.intervals import lost
from edgekd.stages.bench.statistics import NOISY
from edgekd.stages.report import change as change_module
from edgekd.stages.report.change import SHARE, SIZE, TIME, Change, Outcome, Tolerance, judged
from edgekd.stages.report.tables import PERCENT, scored

# of a protocol: what a call holds and how calls follow each other, and the state that the machine was set to
PROTOCOL = (
    *("batch", "scope", "blocks", "calls", "calls_due_per_s", "sessions", "warmup_s", "warmup_calls", "runtime"),
    *("power_mode", "locked_clocks", "l4t"),
)
CONDITIONS = ("affinity", "cpu_quota", "governor")
LITTLE_MB = 0.001  # of memory, below which shares of it mean nothing
# warnings after which two runs do not compare: one had the machine to itself
DOUBTS = (*gates.DOUBTS, "contended", "steal")


@dataclass(frozen=True)
class Pair:
    """The table in both builds."""

    old: BenchResult
    new: BenchResult
    tolerance: Tolerance
    same_images: bool  # that were tested on
    right: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # model -> which of them it got right, (images,) bool

    @property
    def differing(self) -> list[str]:
        """Why absolute times do not compare."""
        return list(unlike(self.old, self.new))

    @staticmethod
    def same_file(old: Measurement, new: Measurement) -> bool:
        return old.contestant.file.sha256 == new.contestant.file.sha256

    @property
    def noise(self) -> float:
        return change_module.noise((self.old, self.new))

    @property
    def doubt(self) -> str:
        """A warning that leaves latencies undecided."""
        return next((w for bench in (self.new, self.old) for w in bench.warnings if w.startswith(DOUBTS)), "")

    @property
    def teachers(self) -> list[Measurement | None]:
        """What the ratios of each build are to."""
        return [next((m for m in bench.measurements if m.speedup is None), None) for bench in (self.old, self.new)]


def unlike(old: BenchResult, new: BenchResult) -> Iterator[str]:
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


def remarks(pair: Pair) -> Iterator[str]:
    """What a reader must know of the table."""
    if pair.differing:
        yield (
            f"not under the same conditions ({'; '.join(pair.differing)}): absolute times do not compare; ratios to "
            "the teacher are each of their own machine, and one that fell is undecided"
        )
    names = [[m.contestant.name for m in bench.measurements] for bench in (pair.old, pair.new)]
    for there, other, words in ((*names, "no longer there"), (*names[::-1], "new")):
        if some := [name for name in there if name not in other]:
            yield f"{words}: {', '.join(some)}"
    if all(pair.teachers) and not same_teacher(pair):
        yield "the teacher is another network, so ratios to it do not compare"


def same_teacher(pair: Pair) -> bool:
    """Whether ratios are to files that take equally long, as far as their size says; their weights may be others."""
    known = [m.contestant if m else None for m in pair.teachers]
    a, b = ((c.macs, c.parameters, c.precision, c.floats) if c else None for c in known)
    return a is not None and a == b


def table(pair: Pair, old_ships: str, new_ships: str) -> Iterator[Change]:
    """What ships against what shipped, judged; other models against themselves, told."""
    old, new = ({m.contestant.name: m for m in bench.measurements} for bench in (pair.old, pair.new))
    if old_ships in old and new_ships in new:
        name = new_ships if old_ships == new_ships else f"{old_ships}, now {new_ships}"
        yield from model(pair, name, old[old_ships], new[new_ships])
    elif old_ships in old:
        said = f"{new_ships} ships now, which is not in this table" if new_ships else "no file ships any more"
        outcome: Outcome = "undecided" if new_ships else "regression"
        yield Change(pair.old.title, old_ships, "what ships", outcome, said)
    for name in old:
        if name in new and not name == old_ships == new_ships:
            found = (change for change in model(pair, name, old[name], new[name]) if change.by)
            yield from (replace(change, outcome="told") for change in found)


def model(pair: Pair, name: str, old: Measurement, new: Measurement) -> Iterator[Change]:
    of = partial(Change, pair.old.title, name)
    yield from latency(pair, of, old, new)
    for key in (scored(pair.old), "agreement"):
        if key in old.readings:
            yield share(pair, of, key, old, new)
    if not pair.old.scenario:
        yield from sizes(pair, of, old, new)


def latency(pair: Pair, of: partial[Change], old: Measurement, new: Measurement) -> Iterator[Change]:
    """The ratio to the teacher decides. The median must not contradict a regression, where it compares."""
    ratio, median = by_ratio(pair, of, old, new), by_median(pair, of, old, new)
    decided = ratio or median
    if decided is None:
        yield from untimed(pair, of, old, new)
        return
    slower = decided.outcome == "regression"
    why, outcome, words = "", decided.outcome, decided.words
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
    yield replace(decided, outcome=outcome, words="; ".join(filter(None, (words, why))))
    if ratio and median:
        yield replace(median, outcome="told")


def untimed(pair: Pair, of: partial[Change], old: Measurement, new: Measurement) -> Iterator[Change]:
    """Where nothing says how much slower a call became. Starts are few, and told only."""
    if old.speedup or timed(old):
        reason = "neither times nor ratios compare" if timed(new) else new.verdict or "is not measured any more"
        yield of("latency", "undecided", reason)
    for key in (key for key in STARTS if key in old.intervals and key in new.intervals and not pair.differing):
        a, b = old.intervals[key], new.intervals[key]
        found = of(key.removesuffix("_ms"), "told", "", a.mid, b.mid, "ms")
        by = change_module.grown(change_module.quotient(b, a))
        yield replace(judged(found, by, pair.tolerance.percent, TIME), outcome="told")


def timed(m: Measurement) -> str:
    """The reading that says how long a call takes; empty where none does."""
    return next((key for key in ("p50_ms", "images_per_s") if key in m.intervals), "")


def by_ratio(pair: Pair, of: partial[Change], old: Measurement, new: Measurement) -> Change | None:
    if not (old.speedup and new.speedup and same_teacher(pair)):
        return None
    found = of("speed-up", "told", "", old.speedup.mid, new.speedup.mid, "×")
    by = change_module.grown(change_module.quotient(old.speedup, new.speedup, pair.noise))
    return judged(found, by, pair.tolerance.percent, TIME)


def by_median(pair: Pair, of: partial[Change], old: Measurement, new: Measurement) -> Change | None:
    key = timed(old)
    if pair.differing or not key or key not in new.intervals:
        return None
    a, b = old.intervals[key], new.intervals[key]
    if key == "p50_ms":
        factor, found = change_module.quotient(b, a, pair.noise), of("median", "told", "", a.mid, b.mid, "ms")
    else:
        factor, found = change_module.quotient(a, b, pair.noise), of("images", "told", "", a.mid, b.mid, "per s")
    return judged(found, change_module.grown(factor), pair.tolerance.percent, TIME)


def share(pair: Pair, of: partial[Change], key: str, old: Measurement, new: Measurement) -> Change:
    """Of images that are answered rightly, or as the float original answers; in points."""
    a, b = old.readings[key], new.readings.get(key)
    found = of(PERCENT[key][0], "undecided", "is not measured any more", a, b, "%")
    if b is None:
        return found
    if pair.same_images and pair.same_file(old, new) and a == b:
        return replace(found, outcome="held", by=Interval(0.0, 0.0, 0.0), words="the same file on the same images")
    rights = [known.get(m.contestant.name) for known, m in zip(pair.right, (old, new), strict=True)]
    if key == "top1" and rights[0] is not None and rights[1] is not None:
        by, basis = lost(rights[0], rights[1]), f"paired over {len(rights[0]):,} images"
    elif key in old.intervals and key in new.intervals:
        by, basis = change_module.minus(old.intervals[key], new.intervals[key]), "from the two intervals"
    else:
        return replace(found, words="has no interval")
    made = judged(found, by, pair.tolerance.points, SHARE)
    return replace(made, words=f"{made.words}, {basis}")


def sizes(pair: Pair, of: partial[Change], old: Measurement, new: Measurement) -> Iterator[Change]:
    """Of the file; and the memory of a start, where machines are the same."""
    bytes_ = [size(m.contestant.file) for m in (old, new)]
    if bytes_[0] and bytes_[1]:
        factor = bytes_[1] / bytes_[0]
        by = change_module.grown(Interval(factor, factor, factor))
        yield judged(of("file", "told", "", *map(float, filter(None, bytes_)), "B"), by, pair.tolerance.percent, SIZE)
    a, b = (m.intervals.get("memory_mb") for m in (old, new))
    if a is None or b is None:
        return
    found = of("memory", "told", "not compared: not under the same conditions", a.mid, b.mid, "MB")
    if not pair.differing and min(a.low, b.low) > LITTLE_MB:
        found = judged(found, change_module.grown(change_module.quotient(b, a)), pair.tolerance.percent, SIZE)
    yield found
