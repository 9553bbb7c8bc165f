"""The runner as a child process: what it is asked, and what it says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.core.artifact import File, Floats
from edgekd.core.bench_result import Machine
from edgekd.core.target import Target
from edgekd.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.stages.bench.config import Scenario
from edgekd.utils.progress import bar

if TYPE_CHECKING:
    from edgekd.stages.bench.config import BenchConfig

WARMUP_CALLS = 50


def job(
    models: dict[str, File],
    target: Target,
    inputs: File,
    config: BenchConfig | None = None,
    floats: Mapping[str, Floats] | None = None,
    scenario: Scenario | None = None,
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
    if config and scenario:
        asked |= scenario.asked() | {"protocol": asked["protocol"] | scenario.protocol(config)}
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
