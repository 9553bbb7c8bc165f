"""The runner as a child process: the job that it gets, and what it returns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.core.artifact import ComputePrecision, File
from edgekd.core.bench_result import Machine
from edgekd.core.target import Target
from edgekd.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.stages.bench.config import Scenario
from edgekd.utils.progress import progress_bar

if TYPE_CHECKING:
    from edgekd.stages.bench.config import BenchConfig

WARMUP_CALLS = 50


def job(
    models: dict[str, File],
    target: Target,
    inputs: File,
    config: BenchConfig | None = None,
    compute_precisions: Mapping[str, ComputePrecision] | None = None,
    scenario: Scenario | None = None,
) -> dict[str, Any]:
    """Return a job for the runner.

    Args:
        models: Name -> ONNX file.
        target: Says which runtime, with how many threads.
        inputs: .npy, (N, C, H, W) float32.
        config: Given if calls are to be timed.
        compute_precisions: Name of a model -> what float operators are computed in; of the others, the target's first.
        scenario: How models are called; one image after another if it is not given.
    """
    precisions = dict.fromkeys(models, target.compute_precisions[0]) | dict(compute_precisions or {})
    content: dict[str, Any] = {
        "runtime": target.runtime,
        "threads": target.threads,
        **target.options,
        "models": [
            {"name": name, "path": str(file.path.resolve()), "compute_precision": precisions[name]}
            for name, file in models.items()
        ],
        "inputs": str(inputs.path.resolve()),
    }
    if config:
        content["protocol"] = {
            "rounds": config.rounds,
            "calls_per_round": config.calls_per_round,
            "warmup_s": config.warmup_s,
            "seed": config.seed,
            "warmup_calls": WARMUP_CALLS,
            "spinning": True,
        }
    if config and scenario:
        content |= {"batch": scenario.batch, "scope": scenario.scope}
        if scenario.rate:
            content["protocol"] |= {"rate": scenario.rate, "calls_per_round": scenario.calls_per_round(config)}
        elif scenario.throughput:
            content["protocol"]["throughput"] = True
    return content


def run(command: str, out: Path, content: dict[str, Any], label: str, total: int) -> dict[str, Any]:
    """Run a job in a child process that ends with this one, show its progress, and return its result.

    Args:
        command: bench, predict or cold-start.
        out: The folder for the job, and for what the runner writes.
        content: The job.
        label: Of the progress bar.
        total: Steps of the progress bar.

    Raises:
        ConfigError: What the runner says of a job that it refuses.
        EdgekdError: What the runner says if it fails, or its last lines if it crashes.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(content, indent=2))
    argv = [sys.executable, str(runner_path()), command, "--job", str(out / "job.json"), "--out", str(out)]
    done, message = 0, {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        progress_bar(label, total) as advance,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
    ):
        try:
            for line in child.stdout or ():
                if line.startswith("{"):  # a runtime may print too
                    message = json.loads(line)
                    advance(message.get("progress", done) - done, note=message.get("note", ""))
                    done = message.get("progress", done)
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        stderr.seek(0)
        last = stderr.read().strip().splitlines()[-5:]
    if "error" in message:
        raise (ConfigError if code == 2 else EdgekdError)(message["error"], hint=message["hint"])
    if code:
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise EdgekdError(f"the runner {end}", hint="its last lines: " + ("\n".join(last) or "none"))
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def runner_path() -> Path:
    """Return the folder of the runner's package: inside of edgekd if installed, beside it in a checkout."""
    package = Path(__file__).parents[2]
    candidates = (package / "runner" / "edgekd_runner", package.parent / "deploy" / "runner" / "edgekd_runner")
    for path in candidates:
        if (path / "__main__.py").is_file():
            return path
    raise EdgekdError(
        f"the runner is not at `{candidates[0]}`", hint="the installation is incomplete: reinstall edgekd"
    )


def runner_files() -> tuple[File, ...]:
    """Return the runner's modules, in a fixed order."""
    return tuple(File.of(path) for path in sorted(runner_path().rglob("*.py")))


def pack_runner(path: Path) -> None:
    """Write the runner as one file that Python starts: a zip, byte-equal for equal modules.

    Dates, order and permissions are fixed and nothing is compressed, so that it depends neither on the day nor on the
    file system nor on the version of zlib.
    """
    folder = runner_path()
    start = "import sys\n\nfrom edgekd_runner.cli import main\n\nsys.exit(main())\n"
    modules = {str(file.path.relative_to(folder.parent)): file.path.read_bytes() for file in runner_files()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"__main__.py": start.encode(), **modules}.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16  # as on Unix, wherever it is written
            archive.writestr(info, content)


def check_same_files(models: dict[str, File], result: dict[str, Any]) -> None:
    """Raise StaleArtifact if the runner read other bytes than those that were recorded."""
    for file, model in zip(models.values(), result["models"], strict=True):
        if model["sha256"] != file.sha256:
            raise StaleArtifact(f"`{file.path}` changed since it was recorded", hint="build it again, then measure")


def nanoseconds(samples: File, models: int, rounds: int) -> list[np.ndarray]:
    """Return (rounds, calls) nanoseconds of each model in the samples.npz of a runner."""
    with np.load(samples.path) as arrays:
        ns, model = arrays["ns"], arrays["model"]
    return [ns[model == index].reshape(rounds, -1) for index in range(models)]


def machine(facts: dict[str, Any]) -> Machine:
    """Return the machine that a runner reports."""
    plain = {key: facts[key] for key in ("processor", "cores", "memory_gib", "system", "python")}
    return Machine(flags=tuple(facts["flags"]), **plain)
