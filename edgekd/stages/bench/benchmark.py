"""Stage: run every contestant in its target's runtime, for its answers and its latency. Works without torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import plugins
from edgekd.core.artifact import File, Floats
from edgekd.core.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.core.files import save_array
from edgekd.core.progress import bar
from edgekd.core.settings import Settings
from edgekd.core.target import Target
from edgekd.core.trial import BenchResult, Contestant, Machine, Runtime
from edgekd.stages.bench import statistics
from edgekd.stages.bench.judge import judged, trials
from edgekd.stages.bench.lineup import check, computed

WARMUP_CALLS = 50
SCOPE = "one image per call, from Python, with the runtime's own copies; no pre- or post-processing"
RUNTIME = ("name", "version", "threads")  # what is told of every runtime; other facts are its own
STARTS = ("load", "compile", "cached_compile", "first")  # times of a model before its second call
METRICS = ("top1", "agreement", "delta1", "rmse", "deviation", "min_ms", "p50_ms", "p90_ms", "p99_ms", "mean_ms")


@dataclass(frozen=True)
class BenchConfig(Settings):
    """How much is timed, and what is read from it."""

    blocks: int = 30  # rounds; in each, every contestant has one block
    calls: int = 35  # timed calls of a block
    warmup_s: float = 2.0  # at least, for each contestant
    seed: int = 0  # of the order within rounds, and of the intervals
    metrics: tuple[str, ...] = METRICS

    def __post_init__(self) -> None:
        if self.blocks < 3:
            raise ConfigError(f"bench.blocks is {self.blocks}", hint="use 3 or more: intervals come from whole blocks")
        if self.calls < 1:
            raise ConfigError(f"bench.calls is {self.calls}", hint="use 1 or more; 35 is usual")
        if self.warmup_s < 0:
            raise ConfigError(f"bench.warmup_s is {self.warmup_s}", hint="use 0 or more seconds; 2 is usual")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"bench.seed is {self.seed}", hint="use a number from 0 to 4294967295")
        total = self.blocks * self.calls
        for name in self.metrics:
            needs = plugins.load("metrics", name).needs
            if total < needs:
                raise ConfigError(
                    f"`{name}` needs {needs} timed calls; bench.blocks x bench.calls is {total}",
                    hint=f"set bench.blocks to {-(-needs // self.calls)}, or take `{name}` out of bench.metrics",
                )


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
) -> BenchResult:
    """Compare the contestants on one target; the baseline is the first teacher, or else the first of them.

    A float file is measured in every precision that the target computes floats in, each a contestant of its own.
    `inputs` is .npy, (N, C, H, W) float32, of test data; `labels` is .npy, (N,) int64. Without labels only the latency
    is taken. `reference` names the float file that agreement is measured against. Files of the contestants are
    linked into `out`, so that the result stands beside what it was measured on.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    protocol = {"batch": 1, "scope": SCOPE, "blocks": config.blocks, "calls": config.calls, "seed": config.seed}
    reason = target.missing()
    if reason:
        return BenchResult(target_name, reason, None, None, protocol, None, (), (), None, started, 0.0)
    check(contestants, inputs, labels, reference)
    contestants = computed(contestants, target)
    models = {c.name: c.file for c in contestants}
    floats = {c.name: c.floats for c in contestants}
    logits = [np.zeros((0, 0), np.float32)] * len(contestants)
    if labels is not None:
        logits = [np.load(file.path) for file in answers(out / "answers", models, target, inputs, floats)]
    base = next((i for i, c in enumerate(contestants) if c.role == "teacher"), 0)
    again = f"{contestants[base].name} again"
    timed = models | {again: contestants[base].file}
    asked = job(timed, target, inputs, config, floats | {again: contestants[base].floats})
    result = run("bench", out, asked, f"bench on {target_name}", config.blocks)
    same_files(timed, result)
    samples = File.of(out / "samples.npz")
    ns = nanoseconds(samples, len(timed), config.blocks)
    seen = trials(contestants, ns, logits, labels, reference)
    in_force = [model["precision"] for model in result["models"]]
    aa, measurements = judged(out, contestants, base, seen, ns, in_force, config)
    return BenchResult(
        target=target_name,
        not_measured="",
        machine=machine(result["machine"]),
        runtime=Runtime(**{key: result["runtime"][key] for key in RUNTIME}),
        protocol=protocol | read_back(result),
        aa=aa,
        warnings=(*statistics.doubts(aa, dict(zip(timed, ns, strict=True)), result), *fewer(target, result)),
        measurements=measurements,
        samples=samples,
        started=started,
        seconds=round(time.perf_counter() - clock, 3),
    )


def fewer(target: Target, result: dict[str, Any]) -> list[str]:
    """What to say where a runtime took other threads than it was asked for: it may see fewer cores."""
    taken = result["runtime"]["threads"]
    return [] if taken == target.threads else [f"threads: {target.threads} were asked for, {taken} in force"]


def same_files(models: dict[str, File], result: dict[str, Any]) -> None:
    """Raise StaleArtifact where the runner read other bytes than those that were recorded."""
    for file, ran in zip(models.values(), result["models"], strict=True):
        if ran["sha256"] != file.sha256:
            raise StaleArtifact(f"`{file.path}` changed since it was recorded", hint="make it again, then measure")


def nanoseconds(samples: File, models: int, blocks: int) -> list[np.ndarray]:
    """(blocks, calls) of each model."""
    with np.load(samples.path) as stored:
        ns, model = stored["ns"], stored["model"]
    return [ns[model == index].reshape(blocks, -1) for index in range(models)]


def machine(facts: dict[str, Any]) -> Machine:
    kept = {key: facts[key] for key in ("processor", "cores", "memory_gib", "system", "python")}
    return Machine(flags=tuple(facts["flags"]), **kept)


def read_back(result: dict[str, Any]) -> dict[str, Any]:
    """What the runner says of the run beyond what was asked for."""
    return {
        "warmup_s": result["protocol"]["warmup_s"],
        "warmup_calls": result["protocol"]["warmup_calls"],
        "percentiles": "nearest rank",
        "intervals": f"95 %, bootstrap of paired blocks, {statistics.RESAMPLES} resamples",
        "runtime": {key: value for key, value in result["runtime"].items() if key not in RUNTIME},
        "conditions": result["conditions"] | {k: result["machine"][k] for k in ("affinity", "cpu_quota", "governor")},
        "cold_start_ms": {m["name"]: {k: m[f"{k}_ms"] for k in STARTS if f"{k}_ms" in m} for m in result["models"]},
    }


def noise(out: Path, shape: tuple[int, ...], seed: int, count: int = 64) -> File:
    """Random inputs of a model, where only its latency is wanted: .npy, (count, *shape) float32."""
    save_array(out / "noise.npy", np.random.default_rng(seed).standard_normal((count, *shape), np.float32))
    return File.of(out / "noise.npy")


def job(
    models: dict[str, File],
    target: Target,
    inputs: File,
    config: BenchConfig | None = None,
    floats: Mapping[str, Floats] | None = None,
) -> dict[str, Any]:
    """What the runner is asked to do; with a protocol when calls are to be timed.

    `floats` says of models what their float operations are computed in; of the others, it is the target's first.
    """
    chosen = dict.fromkeys(models, target.floats[0]) | dict(floats or {})
    asked: dict[str, Any] = {
        "runtime": target.runtime,
        "threads": target.threads,
        **target.options,
        "models": [
            {"name": name, "path": str(file.path.resolve()), "precision": chosen[name]} for name, file in models.items()
        ],
        "inputs": str(inputs.path.resolve()),
    }
    if config:
        numbers = {key: getattr(config, key) for key in ("blocks", "calls", "warmup_s", "seed")}
        asked["protocol"] = numbers | {"warmup_calls": WARMUP_CALLS, "spinning": True}
    return asked


def run(command: str, out: Path, asked: dict[str, Any], label: str, total: int) -> dict[str, Any]:
    """Start the runner as a child process, show how far it is, return its result. Ctrl-C ends it too."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(asked, indent=2))
    words = [sys.executable, str(runner_path()), command, "--job", str(out / "job.json"), "--out", str(out)]
    done, told = 0, {}
    with (
        tempfile.TemporaryFile("w+") as complaints,
        bar(label, total) as advance,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=complaints, text=True) as child,
    ):
        try:
            for line in child.stdout or ():
                if line.startswith("{"):  # a runtime may print too
                    told = json.loads(line)
                    advance(told.get("progress", done) - done, note=told.get("note", ""))
                    done = told.get("progress", done)
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        complaints.seek(0)
        last = complaints.read().strip().splitlines()[-5:]
    if "error" in told:
        raise (ConfigError if code == 2 else EdgekdError)(told["error"], hint=told["hint"])
    if code:
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise EdgekdError(f"the runner {end}", hint="its last words: " + ("\n".join(last) or "none"))
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def runner_path() -> Path:
    """The runner: inside of the package once installed, beside it in a checkout."""
    package = Path(__file__).parents[2]
    places = (package / "runner" / "edgekd_runner.py", package.parent / "deploy" / "runner" / "edgekd_runner.py")
    for place in places:
        if place.is_file():
            return place
    raise EdgekdError(f"the runner is not at `{places[0]}`", hint="install edgekd again: the installation is not whole")
