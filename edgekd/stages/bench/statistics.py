"""What raw samples say: ratios with intervals, the verdict in words, and what a sceptic should know."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.core.bench_result import Interval
from edgekd.metrics._percentile import nearest_rank

RESAMPLES = 2000
AA_TOLERANCE = 0.01  # by how much an A/A interval may miss 1
SESSIONS_DIFFER = 0.02  # two sessions of one file do, by where their memory lies: 24 of them spread from 0.984 to 1.008
NOISY = "too noisy to say"
SMALLEST = 0.005  # difference that is told, where sessions are several and their spread is in the interval
BLURRED = 0.05  # half of an interval, from which on it says too little to call a difference absent
DRIFT_TOLERANCE = 0.03  # between the medians of the first and the last third
OTHERS_PERCENT = 25.0  # of all processor time, spent by other processes
STEAL_PERCENT = 1.0
LOAD_PER_CORE = 0.5


def ratio(base: np.ndarray, other: np.ndarray, seed: int, sessions: int = 1) -> Interval:
    """How many times faster `other` is: the median over rounds of the ratios of block medians, with a 95 % interval.

    Both are (blocks, calls) nanoseconds; block b of both was measured within one round. A machine that has two speeds,
    by what its neighbours do, has one of them in most rounds, so their ratios hold where ratios of overall medians
    compare one speed with the other. Rounds are resampled: a percentile bootstrap (Efron).
    Of several sessions, consecutive blocks each, it is the geometric mean of their ratios; the interval is no narrower
    than Student's of the sessions, for they differ by more than blocks of one do: by where memory lies.
    """
    rounds = np.median(base, axis=1) / np.median(other, axis=1)
    random, ratios, own_ratios = np.random.default_rng(seed), np.ones(RESAMPLES), []
    for own in np.array_split(rounds, sessions):
        picks = random.integers(len(own), size=(RESAMPLES, len(own)))
        ratios *= np.median(own[picks], axis=1) ** (1 / sessions)
        own_ratios.append(float(np.median(own)))
    mid = own_ratios[0] if sessions == 1 else float(np.exp(np.mean(np.log(own_ratios))))
    low, high = min(nearest_rank(ratios, 2.5), mid), max(nearest_rank(ratios, 97.5), mid)
    spread = between(own_ratios)
    return Interval(min(low, mid / spread), mid, max(high, mid * spread))


def between(ratios: list[float]) -> float:
    """By what factor the mean of so many sessions is off, with 95 %: Student's t of their logarithms. 1 of one."""
    if len(ratios) == 1:
        return 1.0
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    error = np.log(ratios).std(ddof=1) / np.sqrt(len(ratios))
    return float(np.exp(stdtrit(len(ratios) - 1, 0.975) * error))


def middle(ns: np.ndarray, seed: int, sessions: int = 1) -> Interval:
    """The median of (blocks, calls) with a 95 % interval, by a bootstrap of blocks; no narrower than the spread of
    several sessions."""
    picks = np.random.default_rng(seed).integers(len(ns), size=(RESAMPLES, len(ns)))
    seen, mid = np.array([median(ns[blocks]) for blocks in picks]), median(ns)
    return widened(Interval(nearest_rank(seen, 2.5), mid, nearest_rank(seen, 97.5)), ns, sessions)


def widened(found: Interval, ns: np.ndarray, sessions: int) -> Interval:
    """Around its middle, and no narrower than what the sessions of (blocks, calls) differ by, in their medians: a
    process that is slower is so in all of its calls, and has too few of them for a percentile of its own."""
    spread = between([median(part) for part in np.array_split(ns, sessions)])
    return Interval(min(found.low, found.mid / spread), found.mid, max(found.high, found.mid * spread))


def median(values: np.ndarray) -> float:
    return nearest_rank(values.ravel(), 50)


def verdict(speedup: Interval, aa: Interval, sessions: int = 1) -> str:
    """A difference counts when its interval lies beyond what two sessions of the same file show, here and usually.

    Of several sessions the interval holds already how much they differ: beyond the A/A ratio itself is enough.
    """
    band = max(aa.high, 1 / aa.low, 1 + SESSIONS_DIFFER)
    if sessions > 1:
        band = max(aa.mid, 1 / aa.mid, 1 + SMALLEST)
    if speedup.low > band:
        return times("faster", speedup)
    if speedup.high < 1 / band:
        return times("slower", Interval(1 / speedup.high, 1 / speedup.mid, 1 / speedup.low))
    if moved(aa):
        return f"{NOISY}: A/A moved {100 * abs(aa.mid - 1):.0f} %"
    if speedup.high / speedup.low > (1 + BLURRED) ** 2:
        return f"{NOISY}: between {speedup.low:.2f} and {speedup.high:.2f} times as fast"
    return "no measurable difference"


def times(way: str, by: Interval) -> str:
    digits = 1 if by.mid >= 2 else 2
    return f"{by.mid:.{digits}f} times {way} ({by.low:.{digits}f}-{by.high:.{digits}f})"


def moved(aa: Interval) -> bool:
    """Whether two sessions of the same file seem to differ: then the machine was not steady."""
    return aa.low > 1 + AA_TOLERANCE or aa.high < 1 - AA_TOLERANCE


def drift(ns: np.ndarray, sessions: int = 1) -> float:
    """By what share the median moved from the first third of (blocks, calls) nanoseconds to the last; the mean of
    several sessions."""
    parts = [ns[part] for part in np.array_split(np.arange(len(ns)), sessions)]
    moves = [median(own[-(len(own) // 3) :]) / median(own[: len(own) // 3]) - 1 for own in parts]
    return float(np.mean(moves))


def doubts(
    aa: Interval | None, samples: dict[str, np.ndarray], result: dict[str, Any], sessions: int = 1
) -> tuple[str, ...]:
    """What in the samples (name -> (blocks, calls) nanoseconds) and the runner's result speaks against the numbers."""
    found = contention(result["conditions"], result["machine"]["cores"])
    if aa and moved(aa):
        found.append(
            f"A/A: two sessions of the same file differ by {100 * abs(aa.mid - 1):.1f} % ({aa.low:.3f}-{aa.high:.3f})"
        )
    changes = {name: drift(ns, sessions) for name, ns in samples.items() if ns.size}
    if drifted := {name: change for name, change in changes.items() if abs(change) > DRIFT_TOLERANCE}:
        told = ", ".join(f"{name} {100 * change:+.1f} %" for name, change in drifted.items())
        found.append(f"drift: medians moved from the first to the last third of the rounds: {told}")
    unsteady = [model["name"] for model in result["models"] if not model.get("warmup", {}).get("steady", True)]
    if unsteady:
        found.append(f"warm-up: {', '.join(unsteady)} had not become steady when timing began")
    return tuple(found)


def contention(conditions: dict[str, Any], cores: int) -> list[str]:
    """Who else used the processor. Load averages still hold the build's own training: they only stand in."""
    found = []
    others, load = conditions["others_percent"], conditions["load_before"]
    if others is not None and others > OTHERS_PERCENT:
        found.append(f"contended: other processes used {others:.0f} % of the processor time")
    if others is None and load is not None and load[0] / cores > LOAD_PER_CORE:
        found.append(f"contended: the load was {load[0] / cores:.1f} per core at the start")
    steal = conditions["steal_percent"]
    if steal is not None and steal > STEAL_PERCENT:
        found.append(f"steal: the hypervisor took {steal:.0f} % of the processor time")
    if conditions["throttled"]:
        found.append(f"throttled: the processor slowed itself {conditions['throttled']} times")
    return found
