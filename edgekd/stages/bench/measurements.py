"""From what was observed of each entry to measurements: metrics with intervals, speed-ups, verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry, Interval, Measurement, Samples
from edgekd.core.task import Task
from edgekd.metrics._compute import compute_metrics
from edgekd.stages.bench import statistics
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.entries import Entries, fp32_twin, link
from edgekd.stages.bench.intervals import intervals

Read = Callable[[int, BenchmarkEntry], Measurement]


def summarize(out: Path, entries: Entries, read: Read) -> tuple[Measurement, ...]:
    """Return what `read` says of each entry, whose file is linked into `out`: the result is beside what it is of."""
    return tuple(read(i, replace(entry, file=link(out, i, entry))) for i, entry in enumerate(entries))


@dataclass(frozen=True)
class Baseline:
    """The entry that the others are compared with: the first teacher, or else the first entry."""

    index: int
    ns: list[np.ndarray]
    """(rounds, calls) nanoseconds of every entry; the last are those of the baseline's duplicate (A/A control)."""
    seed: int
    processes: int = 1
    usable: bool = True
    """Whether both the baseline and its duplicate were timed."""

    @cached_property
    def aa_ratio(self) -> Interval | None:
        return self.ratio(-1) if self.usable else None

    def ratio(self, index: int) -> Interval:
        return statistics.ratio(self.ns[self.index], self.ns[index], self.seed, self.processes)

    def compare(self, index: int) -> tuple[Interval | None, str]:
        """Return the speed-up of an entry over the baseline, and the verdict; None of the baseline itself."""
        if self.aa_ratio is None or index == self.index:
            return None, ""
        speedup = self.ratio(index)
        return speedup, statistics.verdict(speedup, self.aa_ratio, self.processes)


def find_baseline(entries: Entries) -> int:
    return next((i for i, entry in enumerate(entries) if entry.role == "teacher"), 0)


def timing_samples(ns: np.ndarray) -> Samples:
    """Return samples of (rounds, calls) nanoseconds alone."""
    rounds = np.repeat(np.arange(len(ns)), ns.shape[1])
    return Samples(ns.ravel(), rounds, (), (), np.zeros(0))


def collect_samples(
    entries: Entries,
    ns: list[np.ndarray],
    outputs: list[tuple[np.ndarray, ...]],
    labels: File | None,
    reference: str,
) -> list[Samples]:
    """Return the samples of each entry; outputs of one that were not observed are empty."""
    truth = np.zeros(0, np.int64) if labels is None else np.load(labels.path)
    collected = []
    for index, entry in enumerate(entries):
        twin = fp32_twin(entry, entries, reference)
        exact = () if twin is None else outputs[twin]
        known = truth if entry.predicts_labels else truth[:0]
        times = timing_samples(ns[index])
        collected.append(replace(times, outputs=outputs[index], reference=exact, labels=known))
    return collected


@dataclass(frozen=True)
class Observed:
    """What was observed of the entries of a comparison, in their order."""

    samples: list[Samples]
    compute_precisions: list[str]
    """As the runtime reports them."""
    baseline: Baseline


def measure_entries(
    out: Path, entries: Entries, observed: Observed, config: BenchConfig, task: Task | None
) -> tuple[Measurement, ...]:
    """Return the metrics of each entry, and how it compares with the baseline; files are linked into `out`."""
    samples, baseline = observed.samples, observed.baseline
    base = entries[baseline.index]
    teacher: tuple[np.ndarray, ...] = ()
    if base.role == "teacher" and base.predicts_labels:
        teacher = samples[baseline.index].outputs

    def read(index: int, entry: BenchmarkEntry) -> Measurement:
        speedup, verdict = baseline.compare(index)
        return Measurement(
            entry,
            compute_metrics(samples[index], config.metrics, task),
            speedup,
            verdict,
            observed.compute_precisions[index],
            intervals=intervals(samples[index], teacher, config.metrics, config.seed, baseline.processes, task),
        )

    return summarize(out, entries, read)
