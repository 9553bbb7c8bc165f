"""Stage: run every contestant in its target's runtime, for its answers and its latency. Works without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.artifact import File, Floats
from edgekd.core.bench_result import BenchResult, Contestant, Interval, Measurement, Runtime
from edgekd.core.dataset import Scale
from edgekd.core.target import Target
from edgekd.stages.bench import cold_start, load, sessions, statistics
from edgekd.stages.bench import config as config_module
from edgekd.stages.bench.config import BenchConfig, Scenario
from edgekd.stages.bench.entries import check, computed
from edgekd.stages.bench.measurements import judged, trials
from edgekd.stages.bench.runner import job, machine, run
from edgekd.utils.arrays import save_array

RUNTIME = ("name", "version", "threads")  # what is told of every runtime; other facts are its own
STARTS = ("load", "compile", "cached_compile", "first")  # times of a model before its second call


def answer(out: Path, model: File, target: Target, inputs: File) -> File:
    """What `model` answers in the target's runtime: .npy, (images, classes) or (images, K, H, W) float32.

    `inputs` is .npy, (N, C, H, W) float32. Raises EdgekdError with what the runner says if the file does not run.
    """
    return answers(out, {model.path.name: model}, target, inputs)[0]


def answers(
    out: Path, models: dict[str, File], target: Target, inputs: File, floats: Mapping[str, Floats] | None = None
) -> list[File]:
    """`answer` for several models, in one process; messages call them by their keys."""
    total = len(np.load(inputs.path, mmap_mode="r")) * len(models)
    run("answer", out, job(models, target, inputs, floats=floats), f"answers on {target.runtime}", total)
    return [File.of(out / f"logits-{index}.npy") for index in range(len(models))]


def benchmark(
    out: Path,
    contestants: tuple[Contestant, ...],
    target_name: str,
    target: Target,
    inputs: File,
    labels: File | None,
    reference: str,
    config: BenchConfig,
    called: Scenario | None = None,
    scale: Scale | None = None,
) -> BenchResult:
    """Compare the contestants on one target; the baseline is the first teacher, or else the first of them.

    A float file is measured in every precision that the target computes floats in, each a contestant of its own.
    `inputs` is .npy, (N, C, H, W) float32, of test data; `labels` is .npy, (N,) int64. Without labels only the latency
    is taken. `reference` names the float file that agreement is measured against. `called` is how models are called;
    the main scenario of `config` if it is not given. `scale` turns pictures into inputs; they are divided by 255 alone
    if it is not given. Files of the contestants are linked into `out`, so that the result stands beside what it was
    measured on.
    """
    called = called or config_module.scenarios(config)[0]
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    reason = target.missing()
    if reason:
        return BenchResult(
            target_name, reason, None, None, protocol(called, target, config), None, (), (), None, started, 0.0
        )
    check(contestants, inputs, labels, reference)
    contestants = computed(contestants, target)
    label = f"bench on {' '.join(filter(None, (target_name, called.title)))}"
    samples, aa, seen, count = None, None, None, 1
    if called.scope == "cold":
        result, measurements = cold_start.started(out, contestants, target, inputs, label)
        more: dict[str, Any] = dict(cold_start.PROTOCOL)
    else:
        seen, aa, measurements = timed(
            out, contestants, target, inputs, labels, reference, config, called, scale, label
        )
        result, samples, count = seen.result, seen.samples, seen.sessions
        more = {"sessions": count} | read_back(result)
    ns = {} if seen is None else dict(zip((m["name"] for m in result["models"]), seen.ns, strict=True))
    return BenchResult(
        target=target_name,
        not_measured="",
        machine=machine(result["machine"]),
        runtime=Runtime(**{key: result["runtime"][key] for key in RUNTIME}),
        protocol=protocol(called, target, config) | more | environment(result) | files(contestants, called),
        aa=aa,
        warnings=(*statistics.doubts(aa, ns, result, count), *fewer(target, result)),
        measurements=measurements,
        samples=samples,
        started=started,
        seconds=round(time.perf_counter() - clock, 3),
        scenario=called.title,
    )


def timed(
    out: Path,
    contestants: tuple[Contestant, ...],
    target: Target,
    inputs: File,
    labels: File | None,
    reference: str,
    config: BenchConfig,
    called: Scenario,
    scale: Scale | None,
    label: str,
) -> tuple[sessions.Timed, Interval | None, tuple[Measurement, ...]]:
    """What was seen, the A/A control, and what that says of each contestant."""
    models = {c.name: c.file for c in contestants}
    floats = {c.name: c.floats for c in contestants}
    logits = [np.zeros((0, 0), np.float32)] * len(contestants)
    if labels is not None:
        logits = [np.load(file.path) for file in answers(out / "answers", models, target, inputs, floats)]
    base = next((i for i, c in enumerate(contestants) if c.role == "teacher"), 0)
    again = f"{contestants[base].name} again"
    models, floats = models | {again: contestants[base].file}, floats | {again: contestants[base].floats}
    scaled = {"scale": {"mean": scale.mean, "std": scale.std}} if scale else {}
    seen = sessions.timed(out, models, target, inputs, config, floats, called, scaled, label)
    if called.rate:
        return seen, *load.at_rate(out, contestants, base, seen, config, called.rate)
    if called.throughput:
        return seen, *load.throughput(out, contestants, base, seen, config)
    known = trials(contestants, seen.ns, logits, labels, reference)
    in_force = [model["precision"] for model in seen.result["models"]]
    aa, found = judged(out, contestants, base, known, seen.ns, in_force, config, seen.sessions)
    return seen, aa, found


def protocol(called: Scenario, target: Target, config: BenchConfig) -> dict[str, Any]:
    """What was asked for."""
    told: dict[str, Any] = {"batch": called.batch, "scope": called.holds(target.runtime)}
    if called.scope == "cold":
        return told
    told |= {"blocks": called.rounds(config), "calls": config.calls, "seed": config.seed}
    if called.rate:
        told |= {"calls_due_per_s": called.rate, "calls": called.protocol(config)["calls"]}
    if called.throughput:
        told["calls"] = "as many as take about 0.2 s, several under way at once; images a second are of whole blocks"
    return told


def files(contestants: tuple[Contestant, ...], called: Scenario) -> dict[str, Any]:
    """Which files were timed, where those are not the ones that ship."""
    return {} if called.batch == 1 else {"files": {c.name: c.file.path.name for c in contestants}}


def fewer(target: Target, result: dict[str, Any]) -> list[str]:
    """What to say where a runtime took other threads than it was asked for: it may see fewer cores."""
    taken = result["runtime"]["threads"]
    return [] if taken == target.threads else [f"threads: {target.threads} were asked for, {taken} in force"]


def read_back(result: dict[str, Any]) -> dict[str, Any]:
    """What the runner says of timed calls beyond what was asked for."""
    found = {
        "warmup_s": result["protocol"]["warmup_s"],
        "warmup_calls": result["protocol"]["warmup_calls"],
        "percentiles": "nearest rank",
        "ratios": "median over rounds of the ratios of block medians; of several sessions, their geometric mean",
        "intervals": f"95 %, bootstrap of rounds, {statistics.RESAMPLES} resamples; of ratios over several "
        "sessions no narrower than Student's of their logarithms",
        "cold_start_ms": {m["name"]: {k: m[f"{k}_ms"] for k in STARTS if f"{k}_ms" in m} for m in result["models"]},
    }
    under_way = {m["name"]: m["under_way"] for m in result["models"] if m.get("under_way", 1) > 1}
    found |= {"calls_under_way": under_way} if under_way else {}
    return found | ({"overhead_of_the_loop_ns": result["overhead_ns"]} if "overhead_ns" in result else {})


def environment(result: dict[str, Any]) -> dict[str, Any]:
    """What the runner says of its runtime, and of the machine beside what `Machine` holds."""
    return {
        "runtime": {key: value for key, value in result["runtime"].items() if key not in RUNTIME},
        "conditions": result["conditions"] | {k: result["machine"][k] for k in ("affinity", "cpu_quota", "governor")},
    }


def noise(out: Path, shape: tuple[int, ...], seed: int, count: int = 64) -> File:
    """Random inputs of a model, where only its latency is wanted: .npy, (count, *shape) float32."""
    save_array(out / "noise.npy", np.random.default_rng(seed).standard_normal((count, *shape), np.float32))
    return File.of(out / "noise.npy")
