"""Calls at a fixed rate, and several calls at once: waiting, capacity, images a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.core.bench_result import BenchmarkEntry, Interval, Measurement
from edgekd.metrics._compute import compute_metrics
from edgekd.stages.bench import statistics
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.entries import Entries
from edgekd.stages.bench.intervals import intervals
from edgekd.stages.bench.measurements import Baseline, find_baseline, summarize, timing_samples
from edgekd.stages.bench.processes import Timings

GROWN = 0.05  # of a round's time: what the last call waits, if the queue grows all the while


def at_rate(
    out: Path, entries: Entries, timings: Timings, config: BenchConfig, rate: float
) -> tuple[Interval | None, tuple[Measurement, ...]]:
    """Return the A/A control, and of each model the time from when a call was due to its answer, waiting included.

    `late_percent` of the calls were due before the call before them was over. A model whose queue grew, or that was
    not called since a call takes longer than the time between two, has no latency: its verdict says so.
    """
    base = find_baseline(entries)
    served = [ns.size > 0 and not queue_grew(late, rate) for ns, late in zip(timings.ns, timings.late_ns, strict=True)]
    baseline = Baseline(base, timings.ns, config.seed, timings.processes, usable=served[base] and served[-1])

    def read(index: int, entry: BenchmarkEntry) -> Measurement:
        facts = timings.result["models"][index]
        if not served[index]:
            took, due = facts["warmup"]["median_ns"] / 1e6, 1000 / rate
            verdict = f"cannot keep up: a call takes {took:.3g} ms, one is due every {due:.3g} ms"
            return Measurement(entry, {}, None, verdict, facts["compute_precision"])
        samples = timing_samples(timings.ns[index])
        late = {"late_percent": 100 * float((timings.late_ns[index] > 0).mean())}
        return Measurement(
            entry,
            compute_metrics(samples, config.metrics) | late,
            *baseline.compare(index),
            facts["compute_precision"],
            intervals=intervals(samples, (), config.metrics, config.seed),
        )

    return baseline.aa_ratio, summarize(out, entries, read)


def queue_grew(late_ns: np.ndarray, rate: float) -> bool:
    """Return whether calls waited longer and longer: (rounds, calls) nanoseconds that they began late."""
    return bool(np.median(late_ns[:, -1]) > GROWN * late_ns.shape[1] / rate * 1e9)


def throughput(
    out: Path, entries: Entries, timings: Timings, config: BenchConfig
) -> tuple[Interval | None, tuple[Measurement, ...]]:
    """Return the A/A control, and of each model the images a second, with several calls under way."""
    baseline = Baseline(find_baseline(entries), timings.ns, config.seed, timings.processes)

    def read(index: int, entry: BenchmarkEntry) -> Measurement:
        ns = statistics.median_ci(timings.ns[index], config.seed, timings.processes)
        images = Interval(1e9 / ns.high, 1e9 / ns.estimate, 1e9 / ns.low)
        return Measurement(
            entry,
            {"images_per_s": images.estimate},
            *baseline.compare(index),
            timings.result["models"][index]["compute_precision"],
            intervals={"images_per_s": images},
        )

    return baseline.aa_ratio, summarize(out, entries, read)
