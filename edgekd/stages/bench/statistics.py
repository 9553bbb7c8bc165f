"""What raw samples say: ratios with intervals, verdicts, and reasons to doubt them."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.core.bench_result import Interval
from edgekd.metrics.latency import nearest_rank

RESAMPLES = 2000
AA_TOLERANCE = 0.01  # by how much an A/A interval may miss 1
# two processes with one file differ by their memory placement: 24 of them spread from 0.984 to 1.008
PROCESSES_DIFFER = 0.02
NOISY = "too noisy to say"
SMALLEST = (
    0.005  # difference that is reported, where there are several processes and the interval includes their spread
)
BLURRED = 0.05  # half of an interval, from which on it says too little to call a difference absent
DRIFT_TOLERANCE = 0.03  # between the medians of the first and the last third
OTHERS_PERCENT = 25.0  # of all processor time, spent by other processes
STEAL_PERCENT = 1.0
LOAD_PER_CORE = 0.5


def ratio(base: np.ndarray, other: np.ndarray, seed: int, processes: int = 1) -> Interval:
    """Return how many times faster `other` is: the median over rounds of the ratios of medians, with a 95 % interval.

    A machine that has two speeds, depending on its neighbours, has one of them in most rounds, so ratios within a round
    are right where a ratio of overall medians compares one speed with the other. Rounds are resampled: a percentile
    bootstrap (Efron). With several processes, it is the geometric mean of their ratios; the interval is no narrower
    than Student's of the processes, which differ by more than rounds of one do: by memory placement.

    Args:
        base: (rounds, calls) nanoseconds.
        other: (rounds, calls) nanoseconds; round r of both was measured at the same time.
        seed: Of the bootstrap.
        processes: How many there were, with consecutive rounds each.
    """
    rounds = np.median(base, axis=1) / np.median(other, axis=1)
    random, ratios, estimates = np.random.default_rng(seed), np.ones(RESAMPLES), []
    for part in np.array_split(rounds, processes):
        picks = random.integers(len(part), size=(RESAMPLES, len(part)))
        ratios *= np.median(part[picks], axis=1) ** (1 / processes)
        estimates.append(float(np.median(part)))
    estimate = estimates[0] if processes == 1 else float(np.exp(np.mean(np.log(estimates))))
    low, high = min(nearest_rank(ratios, 2.5), estimate), max(nearest_rank(ratios, 97.5), estimate)
    spread = process_spread(estimates)
    return Interval(min(low, estimate / spread), estimate, max(high, estimate * spread))


def process_spread(values: list[float]) -> float:
    """Return the factor by which the mean of one value per process is off, with 95 % (Student's t of logarithms).

    It is 1 for a single process.
    """
    if len(values) == 1:
        return 1.0
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    error = np.log(values).std(ddof=1) / np.sqrt(len(values))
    return float(np.exp(stdtrit(len(values) - 1, 0.975) * error))


def median_ci(ns: np.ndarray, seed: int, processes: int = 1) -> Interval:
    """Return the median of (rounds, calls) nanoseconds with a 95 % interval, by a bootstrap of rounds.

    It is no narrower than the spread of several processes.
    """
    picks = np.random.default_rng(seed).integers(len(ns), size=(RESAMPLES, len(ns)))
    medians = np.array([median(ns[rounds]) for rounds in picks])
    return widened(Interval(nearest_rank(medians, 2.5), median(ns), nearest_rank(medians, 97.5)), ns, processes)


def widened(interval: Interval, ns: np.ndarray, processes: int) -> Interval:
    """Return `interval` made no narrower than the spread of the medians of processes in (rounds, calls) nanoseconds.

    A process that is slower is so in all of its calls, and has too few of them for a percentile of its own.
    """
    spread, estimate = process_spread([median(part) for part in np.array_split(ns, processes)]), interval.estimate
    return Interval(min(interval.low, estimate / spread), estimate, max(interval.high, estimate * spread))


def median(values: np.ndarray) -> float:
    return nearest_rank(values.ravel(), 50)


def verdict(speedup: Interval, aa_ratio: Interval, processes: int = 1) -> str:
    """Return whether a model is faster or slower, as a phrase.

    A difference counts if its interval lies beyond what two processes with the same file show, here and usually. With
    several processes the interval includes already how much they differ: beyond the A/A ratio itself is enough.
    """
    band = max(aa_ratio.high, 1 / aa_ratio.low, 1 + PROCESSES_DIFFER)
    if processes > 1:
        band = max(aa_ratio.estimate, 1 / aa_ratio.estimate, 1 + SMALLEST)
    if speedup.low > band:
        return times("faster", speedup)
    if speedup.high < 1 / band:
        return times("slower", Interval(1 / speedup.high, 1 / speedup.estimate, 1 / speedup.low))
    if moved(aa_ratio):
        return f"{NOISY}: A/A moved {100 * abs(aa_ratio.estimate - 1):.0f} %"
    if speedup.high / speedup.low > (1 + BLURRED) ** 2:
        return f"{NOISY}: between {speedup.low:.2f} and {speedup.high:.2f} times as fast"
    return "no measurable difference"


def times(direction: str, factor: Interval) -> str:
    digits = 1 if factor.estimate >= 2 else 2
    return f"{factor.estimate:.{digits}f} times {direction} ({factor.low:.{digits}f}-{factor.high:.{digits}f})"


def moved(aa_ratio: Interval) -> bool:
    """Return whether the A/A control excludes 1: then the machine was not steady."""
    return aa_ratio.low > 1 + AA_TOLERANCE or aa_ratio.high < 1 - AA_TOLERANCE


def drift(ns: np.ndarray, processes: int = 1) -> float:
    """Return the fraction by which the median moved from the first third of (rounds, calls) nanoseconds to the last.

    With several processes it is the mean of theirs.
    """
    parts = [ns[part] for part in np.array_split(np.arange(len(ns)), processes)]
    moves = [median(part[-(len(part) // 3) :]) / median(part[: len(part) // 3]) - 1 for part in parts]
    return float(np.mean(moves))


def find_warnings(
    aa_ratio: Interval | None, ns: dict[str, np.ndarray], result: dict[str, Any], processes: int = 1
) -> tuple[str, ...]:
    """Return the reasons to doubt a comparison.

    Args:
        aa_ratio: The A/A control.
        ns: Name of an entry -> (rounds, calls) nanoseconds.
        result: The runner's.
        processes: How many there were, with consecutive rounds each.
    """
    warnings = contention(result["conditions"], result["machine"]["cores"])
    if aa_ratio and moved(aa_ratio):
        warnings.append(
            f"A/A: two sessions of the same file differ by {100 * abs(aa_ratio.estimate - 1):.1f} % "
            f"({aa_ratio.low:.3f}-{aa_ratio.high:.3f})"
        )
    changes = {name: drift(part, processes) for name, part in ns.items() if part.size}
    if drifted := {name: change for name, change in changes.items() if abs(change) > DRIFT_TOLERANCE}:
        listed = ", ".join(f"{name} {100 * change:+.1f} %" for name, change in drifted.items())
        warnings.append(f"drift: medians moved from the first to the last third of the rounds: {listed}")
    unsteady = [model["name"] for model in result["models"] if not model.get("warmup", {}).get("steady", True)]
    if unsteady:
        warnings.append(f"warm-up: {', '.join(unsteady)} had not become steady when timing began")
    return tuple(warnings)


def contention(conditions: dict[str, Any], cores: int) -> list[str]:
    """Return who else used the processor. Load averages include the build's own training: they are the last resort."""
    warnings = []
    others, load = conditions["others_percent"], conditions["load_before"]
    if others is not None and others > OTHERS_PERCENT:
        warnings.append(f"contended: other processes used {others:.0f} % of the processor time")
    if others is None and load is not None and load[0] / cores > LOAD_PER_CORE:
        warnings.append(f"contended: the load was {load[0] / cores:.1f} per core at the start")
    steal = conditions["steal_percent"]
    if steal is not None and steal > STEAL_PERCENT:
        warnings.append(f"steal: the hypervisor took {steal:.0f} % of the processor time")
    if conditions["throttled"]:
        warnings.append(f"throttled: the processor slowed itself {conditions['throttled']} times")
    return warnings
