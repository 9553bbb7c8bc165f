"""Cold starts: time to the first answer and memory, each in a fresh process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry, Interval, Measurement
from edgekd.core.target import Target
from edgekd.stages.bench import runner
from edgekd.stages.bench.entries import Entries
from edgekd.stages.bench.measurements import summarize

if TYPE_CHECKING:
    from edgekd.core.bench_result import BenchResult

TIMES = ("load_ms", "compile_ms", "first_ms")
STARTS = 6  # of each model, as the runner has it
PROTOCOL = {
    "processes": STARTS,
    "intervals": "the range of 6 fresh processes, which includes the median with 97 %",
    "memory": "peak of the process, above that of one with the runtime alone (median of 6)",
}


def cold_start(
    out: Path, entries: Entries, target: Target, inputs: File, label: str
) -> tuple[dict[str, Any], tuple[Measurement, ...]]:
    """Return the runner's result, and the median time of each part of a start with its range, and `memory_mb`.

    Raises what `runner.run` raises, and StaleArtifact if a file is not the recorded one.
    """
    models = {entry.name: entry.file for entry in entries}
    precisions = {entry.name: entry.compute_precision for entry in entries}
    job = runner.job(models, target, inputs, compute_precisions=precisions)
    result = runner.run("cold-start", out, job, label, STARTS * (len(models) + 1))
    runner.check_same_files(models, result)
    bare = [start["peak_kib"] for start in result["runtime_only"]]

    def read(index: int, entry: BenchmarkEntry) -> Measurement:
        facts = result["models"][index]
        starts = facts["starts"]
        values = {name: [start[name] for start in starts] for name in TIMES if name in starts[0]}
        peaks = [start["peak_kib"] for start in starts]
        if None not in (*peaks, *bare):  # not every system reports it
            values["memory_mb"] = [1024e-6 * (peak - median(bare)) for peak in peaks]
        ranges = {name: Interval(min(v), median(v), max(v)) for name, v in values.items()}
        metrics = {name: interval.estimate for name, interval in ranges.items()}
        return Measurement(entry, metrics, None, "", facts["compute_precision"], intervals=ranges)

    return result, summarize(out, entries, read)


def with_memory(main: BenchResult, cold: BenchResult) -> BenchResult:
    """Return the main table with the memory of each model from that of cold starts, for gates to look at."""
    starts = {m.model.name: m for m in cold.measurements if "memory_mb" in m.metrics}

    def add(m: Measurement) -> Measurement:
        start = starts.get(m.model.name)
        if start is None:
            return m
        memory, interval = start.metrics["memory_mb"], start.intervals["memory_mb"]
        return replace(m, metrics=m.metrics | {"memory_mb": memory}, intervals=m.intervals | {"memory_mb": interval})

    return replace(main, measurements=tuple(map(add, main.measurements)))
