"""The rounds of a comparison in several processes, one after the other: where memory lies is each one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.core.artifact import File, Floats
from edgekd.core.target import Target
from edgekd.stages.bench import runner
from edgekd.stages.bench.config import Scenario

if TYPE_CHECKING:
    from edgekd.stages.bench.config import BenchConfig

ROUNDS = 3  # at least, of each process
SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Timed:
    """What the runner timed, of each model; of one that was not called at the rate, no calls."""

    ns: list[np.ndarray]  # (rounds, calls); with `throughput` (rounds, 1), of an image
    late_ns: list[np.ndarray]  # (rounds, calls), that a call began after it was due
    sessions: int  # processes; each has as many consecutive rounds, or one more
    result: dict[str, Any]  # of the first, with the conditions of the worst
    samples: File


def timed(
    out: Path,
    models: dict[str, File],
    target: Target,
    inputs: File,
    config: BenchConfig,
    floats: Mapping[str, Floats],
    scenario: Scenario,
    asked: Mapping[str, Any],
    label: str,
) -> Timed:
    """Time the models by turns; `asked` is what else a job says. Writes `samples.npz`, all calls in order of time.

    Raises what `runner.run` raises, and StaleArtifact where a file is not the recorded one.
    """
    job = runner.job(models, target, inputs, config, floats, scenario) | dict(asked)
    rounds = scenario.rounds(config)
    shares = [len(part) for part in np.array_split(np.arange(rounds), in_force(config, rounds))]
    results, parts, first = [], [], 0
    for number, share in enumerate(shares):
        home, told = (out, label) if len(shares) == 1 else (out / f"session-{number}", f"{label}, {number + 1}")
        protocol = job["protocol"] | {"blocks": share, "seed": (config.seed + number) % 2**32}
        results.append(runner.run("bench", home, job | {"protocol": protocol}, told, share))
        runner.same_files(models, results[-1])
        with np.load(home / SAMPLES) as stored:
            part = {key: stored[key] for key in stored.files}
        part["session"] = np.full(len(part["ns"]), number, np.int32)
        part["block"] += first
        first += share
        parts.append(part)
        (home / SAMPLES).unlink()
    names = parts[0].pop("names")
    whole: Any = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    np.savez(out / SAMPLES, **whole, names=names)
    ns = by_model(parts, shares, results, "ns", len(models), scenario)
    late = by_model(parts, shares, results, "late_ns", len(models), scenario)
    return Timed(ns, late, len(shares), merged(results), File.of(out / SAMPLES))


def in_force(config: BenchConfig, rounds: int) -> int:
    """How many processes the rounds are enough for."""
    return max(1, min(config.sessions, rounds // ROUNDS))


def by_model(
    parts: list[dict[str, np.ndarray]],
    shares: list[int],
    results: list[dict[str, Any]],
    key: str,
    models: int,
    scenario: Scenario,
) -> list[np.ndarray]:
    found = []
    for index in range(models):
        rows = []
        for part, rounds, result in zip(parts, shares, results, strict=True):
            own = part[key][part["model"] == index].reshape(rounds, -1)
            images = result["models"][index]["calls"] * scenario.batch if scenario.throughput else 1
            rows.append(own / images if scenario.throughput else own)
        fewest = min(row.shape[1] for row in rows)  # 0 where it did not fit into the rate
        found.append(np.concatenate([row[:, :fewest] for row in rows]))
    return found


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The first result; of what else went on in the meantime, the worst."""
    conditions = dict(results[0]["conditions"])
    for key, value in results[-1]["conditions"].items():
        if key.endswith("_after"):
            conditions[key] = value
    for key in ("others_percent", "steal_percent", "throttled"):
        known = [r["conditions"][key] for r in results if r["conditions"][key] is not None]
        conditions[key] = max(known, default=None)
    models = []
    for index, model in enumerate(results[0]["models"]):
        steady = all(r["models"][index]["warmup"]["steady"] for r in results)
        models.append(model | {"warmup": model["warmup"] | {"steady": steady}})
    return results[0] | {"conditions": conditions, "models": models}
