"""The rounds of a comparison, divided among several processes: latency varies between them with memory placement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.artifact import File
from edgekd.stages.bench import runner
from edgekd.stages.bench.config import BenchConfig, Scenario

MIN_ROUNDS = 3  # of each process
SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Timings:
    """What the runner timed, for each model; no calls of one that could not be called at the rate."""

    ns: list[np.ndarray]
    """(rounds, calls) nanoseconds; with `throughput` (rounds, 1), of an image."""
    late_ns: list[np.ndarray]
    """(rounds, calls) nanoseconds that a call began after it was due."""
    processes: int
    """Each has as many consecutive rounds, or one more."""
    result: dict[str, Any]
    """The runner's, of the first process, with the conditions of the worst."""
    samples: File


@dataclass(frozen=True)
class Part:
    """The rounds of one process."""

    arrays: dict[str, np.ndarray]
    """Of its samples.npz."""
    rounds: int
    result: dict[str, Any]


def run_processes(
    out: Path, models: dict[str, File], job: dict[str, Any], config: BenchConfig, scenario: Scenario, label: str
) -> Timings:
    """Time the models in interleaved rounds, and write `samples.npz` with all calls in order of time into `out`.

    Raises what `runner.run` raises, and StaleArtifact if a file is not the recorded one.
    """
    total = scenario.rounds(config)
    counts = [len(part) for part in np.array_split(np.arange(total), process_count(config, total))]
    parts: list[Part] = []
    for number, rounds in enumerate(counts):
        alone = len(counts) == 1
        folder, title = (out, label) if alone else (out / f"process-{number}", f"{label}, {number + 1}")
        protocol = job["protocol"] | {"rounds": rounds, "seed": (config.seed + number) % 2**32}
        result = runner.run("bench", folder, job | {"protocol": protocol}, title, rounds)
        runner.check_same_files(models, result)
        with np.load(folder / SAMPLES) as stored:
            arrays = {key: stored[key] for key in stored.files}
        arrays["process"] = np.full(len(arrays["ns"]), number, np.int32)
        arrays["round"] += sum(part.rounds for part in parts)
        parts.append(Part(arrays, rounds, result))
        (folder / SAMPLES).unlink()
    names = parts[0].arrays["names"]
    keys = [key for key in parts[0].arrays if key != "names"]
    joined: Any = {key: np.concatenate([part.arrays[key] for part in parts]) for key in keys}
    np.savez(out / SAMPLES, **joined, names=names)
    ns, late = (by_model(parts, key, len(models), scenario) for key in ("ns", "late_ns"))
    return Timings(ns, late, len(parts), merge_results([part.result for part in parts]), File.of(out / SAMPLES))


def process_count(config: BenchConfig, rounds: int) -> int:
    """Return how many processes the rounds are enough for."""
    return max(1, min(config.processes, rounds // MIN_ROUNDS))


def by_model(parts: list[Part], key: str, models: int, scenario: Scenario) -> list[np.ndarray]:
    """Return (rounds, calls) nanoseconds of each model, from all processes."""
    joined = []
    for index in range(models):
        rows = []
        for part in parts:
            ns = part.arrays[key][part.arrays["model"] == index].reshape(part.rounds, -1)
            images = part.result["models"][index]["calls_per_round"] * scenario.batch if scenario.throughput else 1
            rows.append(ns / images if scenario.throughput else ns)
        fewest = min(row.shape[1] for row in rows)  # 0 where it did not fit into the rate
        joined.append(np.concatenate([row[:, :fewest] for row in rows]))
    return joined


def merge_results(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first result, with the worst of the conditions of all."""
    conditions = dict(results[0]["conditions"])
    for key, value in results[-1]["conditions"].items():
        if key.endswith("_after"):
            conditions[key] = value
    for key in ("others_percent", "steal_percent", "throttled"):
        values = [r["conditions"][key] for r in results if r["conditions"][key] is not None]
        conditions[key] = max(values, default=None)
    models = []
    for index, model in enumerate(results[0]["models"]):
        steady = all(r["models"][index]["warmup"]["steady"] for r in results)
        models.append(model | {"warmup": model["warmup"] | {"steady": steady}})
    return results[0] | {"conditions": conditions, "models": models}
