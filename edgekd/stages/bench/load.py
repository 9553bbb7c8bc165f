"""What calls at a fixed rate and several calls at once show: waiting, capacity, images a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.bench_result import Contestant, Interval, Measurement, Trial
from edgekd.metrics._compute import readings
from edgekd.stages.bench import statistics
from edgekd.stages.bench.entries import linked
from edgekd.stages.bench.intervals import intervals

if TYPE_CHECKING:
    from edgekd.stages.bench.config import BenchConfig
    from edgekd.stages.bench.sessions import Timed

GROWN = 0.05  # of a round's time: what the last call waits, where the queue grows all the while


def at_rate(
    out: Path, contestants: tuple[Contestant, ...], base: int, seen: Timed, config: BenchConfig, rate: float
) -> tuple[Interval | None, tuple[Measurement, ...]]:
    """The A/A control, and of each model the time from when a call was due to its answer, with the waiting in it.

    `late_percent` of the calls were due before the call before them was over. A model whose queue grew, or that was
    not called since it takes longer than the time between two calls, has no latency: its verdict says so.
    """
    served = [ns.size > 0 and not grew(late, rate) for ns, late in zip(seen.ns, seen.late_ns, strict=True)]
    aa = None
    if served[base] and served[-1]:
        aa = statistics.ratio(seen.ns[base], seen.ns[-1], config.seed, seen.sessions)
    found = []
    for index, contestant in enumerate(contestants):
        kept = replace(contestant, file=linked(out, index, contestant))
        fact = seen.result["models"][index]
        if not served[index]:
            said = f"cannot keep up: a call takes {fact['warmup']['median_ns'] / 1e6:.3g} ms, one is due every "
            found.append(Measurement(kept, {}, None, f"{said}{1000 / rate:.3g} ms", fact["precision"]))
            continue
        trial = alone(seen.ns[index])
        late = {"late_percent": 100 * float((seen.late_ns[index] > 0).mean())}
        speedup, verdict = None, ""
        if aa and index != base:
            speedup = statistics.ratio(seen.ns[base], seen.ns[index], config.seed, seen.sessions)
            verdict = statistics.verdict(speedup, aa, seen.sessions)
        sure = intervals(trial, np.zeros(0), config.metrics, config.seed)
        read_off = readings(trial, config.metrics) | late
        found.append(Measurement(kept, read_off, speedup, verdict, fact["precision"], intervals=sure))
    return aa, tuple(found)


def grew(late_ns: np.ndarray, rate: float) -> bool:
    """Whether calls waited longer and longer: (rounds, calls) nanoseconds that they began late."""
    return bool(np.median(late_ns[:, -1]) > GROWN * late_ns.shape[1] / rate * 1e9)


def throughput(
    out: Path, contestants: tuple[Contestant, ...], base: int, seen: Timed, config: BenchConfig
) -> tuple[Interval, tuple[Measurement, ...]]:
    """The A/A control, and of each model the images a second, with several calls under way."""
    aa = statistics.ratio(seen.ns[base], seen.ns[-1], config.seed, seen.sessions)
    found = []
    for index, contestant in enumerate(contestants):
        kept = replace(contestant, file=linked(out, index, contestant))
        one = statistics.middle(seen.ns[index], config.seed, seen.sessions)
        images = Interval(1e9 / one.high, 1e9 / one.mid, 1e9 / one.low)
        speedup = None if index == base else statistics.ratio(seen.ns[base], seen.ns[index], config.seed, seen.sessions)
        verdict = statistics.verdict(speedup, aa, seen.sessions) if speedup else ""
        fact = seen.result["models"][index]
        read_off, sure = {"images_per_s": images.mid}, {"images_per_s": images}
        found.append(Measurement(kept, read_off, speedup, verdict, fact["precision"], intervals=sure))
    return aa, tuple(found)


def alone(ns: np.ndarray) -> Trial:
    """A trial of times only."""
    none = np.zeros((0, 0))
    return Trial(ns.ravel(), np.repeat(np.arange(len(ns)), ns.shape[1]), none, none, np.zeros(0))
