"""Stage: run every model file in its target's runtime, for its outputs and its latency. Works without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.artifact import ComputePrecision, File
from edgekd.core.bench_result import BenchResult, Interval, Measurement, Runtime
from edgekd.core.dataset import Normalization
from edgekd.core.target import Target
from edgekd.core.task import Task, matching_task
from edgekd.onnx import inspect
from edgekd.stages.bench import cold_start, load, statistics
from edgekd.stages.bench.config import BenchConfig, Scenario, scenarios
from edgekd.stages.bench.entries import Entries, check, expand_precisions
from edgekd.stages.bench.measurements import Baseline, Observed, collect_samples, find_baseline, measure_entries
from edgekd.stages.bench.processes import Timings, run_processes
from edgekd.stages.bench.runner import job, machine, run
from edgekd.utils.arrays import noise, save_array

RUNTIME = ("name", "version", "threads")  # what every runtime reports; other facts are specific to one
STARTS = ("load", "compile", "cached_compile", "first")  # times of a model before its second call


@dataclass(frozen=True)
class BenchmarkRequest:
    """Models to compare on one target, the data for it, and how they are called."""

    entries: Entries
    target_name: str
    target: Target
    inputs: File
    """.npy, (N, C, H, W) float32, of test data."""
    labels: File | None
    """.npy, the targets of the task; without labels only latency is measured."""
    reference: str
    """Name of the FP32 entry that agreement is measured against."""
    config: BenchConfig
    scenario: Scenario | None = None
    """None: the main scenario of `config`."""
    normalize: Normalization | None = None
    """Turns pictures into inputs; None: they are divided by 255 alone."""
    task: Task | None = None
    """What the models' outputs mean; None: what the outputs of the first file look like."""

    @property
    def resolved_scenario(self) -> Scenario:
        return self.scenario or scenarios(self.config)[0]


def run_on_target(out: Path, model: File, target: Target, inputs: File) -> File:
    """Return the outputs of `model` in the target's runtime: .npy, (images, classes) or (images, K, H, W) float32.

    `inputs` is .npy, (N, C, H, W) float32. Raises EdgekdError with the runner's message if the file does not run.
    """
    return run_all_on_target(out, {model.path.name: model}, target, inputs)[0]


def run_all_on_target(
    out: Path,
    models: dict[str, File],
    target: Target,
    inputs: File,
    compute_precisions: Mapping[str, ComputePrecision] | None = None,
) -> list[File]:
    """Return what `run_on_target` does for several models, in one process; messages call them by their keys."""
    total = len(np.load(inputs.path, mmap_mode="r")) * len(models)
    content = job(models, target, inputs, compute_precisions=compute_precisions)
    run("predict", out, content, f"answers on {target.runtime}", total)
    return [File.of(out / f"logits-{index}.npy") for index in range(len(models))]


def benchmark(out: Path, request: BenchmarkRequest) -> BenchResult:
    """Compare models on one target; the baseline is the first teacher, or else the first of them.

    An FP32 file is measured in every precision that the target computes float operators in, each as an entry of its
    own. The files are linked into `out`, so that the result is beside what was measured.
    """
    target, scenario = request.target, request.resolved_scenario
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    protocol = describe_protocol(scenario, target, request.config)
    if reason := target.unavailable_reason():
        return BenchResult(request.target_name, reason, None, None, protocol, None, (), (), None, started, 0.0)
    check(request.entries, request.inputs, request.labels, request.reference)
    entries = expand_precisions(request.entries, target)
    label = f"bench on {' '.join(filter(None, (request.target_name, scenario.title)))}"
    samples, aa_ratio, ns, processes = None, None, {}, 1
    if scenario.scope == "cold_start":
        result, measurements = cold_start.cold_start(out, entries, target, request.inputs, label)
        protocol |= cold_start.PROTOCOL
    else:
        outputs = evaluate_entries(out, entries, request)
        timings = time_entries(out, entries, request, label)
        aa_ratio, measurements = read_timings(out, entries, request, timings, outputs)
        result, samples, processes = timings.result, timings.samples, timings.processes
        ns = dict(zip((m["name"] for m in result["models"]), timings.ns, strict=True))
        protocol |= {"processes": processes} | read_back(result)
    return BenchResult(
        target=request.target_name,
        not_measured="",
        machine=machine(result["machine"]),
        runtime=Runtime(**{key: result["runtime"][key] for key in RUNTIME}),
        protocol=protocol | environment(result) | list_files(entries, scenario),
        aa_ratio=aa_ratio,
        warnings=(*statistics.find_warnings(aa_ratio, ns, result, processes), *other_threads(target, result)),
        measurements=measurements,
        samples=samples,
        started=started,
        seconds=round(time.perf_counter() - clock, 3),
        scenario=scenario.title,
    )


def evaluate_entries(out: Path, entries: Entries, request: BenchmarkRequest) -> list[tuple[np.ndarray, ...]]:
    """Return the outputs of each entry for all inputs; none if there are no labels to compare them with."""
    if request.labels is None:
        return [()] * len(entries)
    models = {entry.name: entry.file for entry in entries}
    precisions = {entry.name: entry.compute_precision for entry in entries}
    files = run_all_on_target(out / "answers", models, request.target, request.inputs, precisions)
    return [(np.load(file.path),) for file in files]


def time_entries(out: Path, entries: Entries, request: BenchmarkRequest, label: str) -> Timings:
    """Return the timings of all entries, and of a duplicate of the baseline."""
    base = entries[find_baseline(entries)]
    again = f"{base.name} again"
    models = {entry.name: entry.file for entry in entries} | {again: base.file}
    precisions = {entry.name: entry.compute_precision for entry in entries} | {again: base.compute_precision}
    content = job(models, request.target, request.inputs, request.config, precisions, request.resolved_scenario)
    if request.normalize:
        content["normalize"] = {"mean": request.normalize.mean, "std": request.normalize.std}
    return run_processes(out, models, content, request.config, request.resolved_scenario, label)


def read_timings(
    out: Path, entries: Entries, request: BenchmarkRequest, timings: Timings, outputs: list[tuple[np.ndarray, ...]]
) -> tuple[Interval | None, tuple[Measurement, ...]]:
    """Return the A/A control, and the measurement of each entry."""
    config, scenario = request.config, request.resolved_scenario
    if scenario.rate:
        return load.at_rate(out, entries, timings, config, scenario.rate)
    if scenario.throughput:
        return load.throughput(out, entries, timings, config)
    task = request.task
    if task is None and request.labels is not None:
        task = matching_task(inspect.facts(entries[0].file.path).outputs)
    samples = collect_samples(entries, timings.ns, outputs, request.labels, request.reference)
    baseline = Baseline(find_baseline(entries), timings.ns, config.seed, timings.processes)
    reported = [model["compute_precision"] for model in timings.result["models"]]
    return baseline.aa_ratio, measure_entries(out, entries, Observed(samples, reported, baseline), config, task)


def describe_protocol(scenario: Scenario, target: Target, config: BenchConfig) -> dict[str, Any]:
    """Return what was asked for."""
    protocol: dict[str, Any] = {"batch": scenario.batch, "scope": scenario.describe_call(target.runtime)}
    if scenario.scope == "cold_start":
        return protocol
    calls = scenario.calls_per_round(config)
    protocol |= {"rounds": scenario.rounds(config), "calls_per_round": calls, "seed": config.seed}
    if scenario.rate:
        protocol["calls_due_per_s"] = scenario.rate
    if scenario.throughput:
        text = "as many as take about 0.2 s, several under way at once; images a second are of whole rounds"
        protocol["calls_per_round"] = text
    return protocol


def list_files(entries: Entries, scenario: Scenario) -> dict[str, Any]:
    """Return which files were timed, where those are not the ones that are deployed."""
    return {} if scenario.batch == 1 else {"files": {entry.name: entry.file.path.name for entry in entries}}


def other_threads(target: Target, result: dict[str, Any]) -> list[str]:
    """Return a warning where a runtime took other threads than it was asked for: it may see fewer cores."""
    threads = result["runtime"]["threads"]
    return [] if threads == target.threads else [f"threads: {target.threads} were asked for, {threads} in force"]


def read_back(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the runner reports of timed calls beyond what was asked for."""
    protocol = {
        "warmup_s": result["protocol"]["warmup_s"],
        "warmup_calls": result["protocol"]["warmup_calls"],
        "percentiles": "nearest rank",
        "ratios": "median over rounds of the ratios of medians; of several processes, their geometric mean",
        "intervals": f"95 %, bootstrap of rounds, {statistics.RESAMPLES} resamples; of ratios over several "
        "processes no narrower than Student's of their logarithms",
        "cold_start_ms": {m["name"]: {k: m[f"{k}_ms"] for k in STARTS if f"{k}_ms" in m} for m in result["models"]},
    }
    in_flight = {m["name"]: m["calls_in_flight"] for m in result["models"] if m.get("calls_in_flight", 1) > 1}
    protocol |= {"calls_in_flight": in_flight} if in_flight else {}
    return protocol | ({"overhead_of_the_loop_ns": result["overhead_ns"]} if "overhead_ns" in result else {})


def environment(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the runner reports of its runtime, and of the machine beyond the fields of `Machine`."""
    return {
        "runtime": {key: value for key, value in result["runtime"].items() if key not in RUNTIME},
        "conditions": result["conditions"] | {k: result["machine"][k] for k in ("affinity", "cpu_quota", "governor")},
    }


def save_noise(out: Path, shape: tuple[int, ...], seed: int, count: int = 64) -> File:
    """Return random inputs of a model, where only its latency is wanted: .npy, (count, *shape) float32."""
    save_array(out / "noise.npy", noise((count, *shape), seed))
    return File.of(out / "noise.npy")
