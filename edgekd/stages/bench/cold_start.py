"""Cold starts: how long until the first answer, and how much memory that takes, each in a fresh process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edgekd.core.artifact import File
from edgekd.core.bench_result import Contestant, Interval, Measurement
from edgekd.core.target import Target
from edgekd.stages.bench import runner
from edgekd.stages.bench.entries import linked

if TYPE_CHECKING:
    from edgekd.core.bench_result import BenchResult

TIMES = ("load_ms", "compile_ms", "first_ms")
STARTS = 6  # of each model, as the runner has it
PROTOCOL = {
    "processes": STARTS,
    "intervals": "the range of 6 fresh processes, which holds the median with 97 %",
    "memory": "peak of the process, above that of one with the runtime alone (median of 6)",
}


def started(
    out: Path, contestants: tuple[Contestant, ...], target: Target, inputs: File, label: str
) -> tuple[dict[str, Any], tuple[Measurement, ...]]:
    """What the runner says, and the median time of each part of a start with the range, and `memory_mb`.

    Raises what `runner.run` raises, and StaleArtifact where a file is not the recorded one.
    """
    models = {c.name: c.file for c in contestants}
    job = runner.job(models, target, inputs, None, {c.name: c.floats for c in contestants})
    result = runner.run("start", out, job, label, STARTS * (len(models) + 1))
    runner.same_files(models, result)
    bare = [one["peak_kib"] for one in result["runtime_only"]]
    found = []
    for index, (contestant, fact) in enumerate(zip(contestants, result["models"], strict=True)):
        seen = {name: [one[name] for one in fact["starts"]] for name in TIMES if name in fact["starts"][0]}
        peaks = [one["peak_kib"] for one in fact["starts"]]
        if None not in (*peaks, *bare):  # not told by every system
            seen["memory_mb"] = [1024e-6 * (peak - median(bare)) for peak in peaks]
        sure = {name: Interval(min(values), median(values), max(values)) for name, values in seen.items()}
        kept = replace(contestant, file=linked(out, index, contestant))
        read_off = {name: own.mid for name, own in sure.items()}
        found.append(Measurement(kept, read_off, None, "", fact["precision"], intervals=sure))
    return result, tuple(found)


def with_memory(main: BenchResult, cold: BenchResult) -> BenchResult:
    """The main table with the memory of each model, for gates to look at."""
    known = {m.contestant.name: m for m in cold.measurements if "memory_mb" in m.readings}

    def added(m: Measurement) -> Measurement:
        own = known.get(m.contestant.name)
        if own is None:
            return m
        more, sure = {"memory_mb": own.readings["memory_mb"]}, {"memory_mb": own.intervals["memory_mb"]}
        return replace(m, readings=m.readings | more, intervals=m.intervals | sure)

    return replace(main, measurements=tuple(map(added, main.measurements)))
