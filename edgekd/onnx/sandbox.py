"""Read and run an untrusted network in a child process first: some networks crash the libraries that do it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from edgekd.errors import EdgekdError, ModelError
from edgekd.onnx import inspect, session

LIMIT_S = 300.0  # for reading it and one call; networks for small devices take some seconds
FULL = 3  # exit code of the process where its memory does not suffice


def probe_files(*paths: Path) -> None:
    """Raise ModelError for a file that is invalid, or that crashes or blocks a process which reads and runs it.

    Other errors are reported by whoever reads the file next.
    """
    package = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    for path in paths:
        inspect.load(path)  # a parser and a checker, which were never seen to crash
        words = [sys.executable, "-m", "edgekd.onnx.sandbox", str(path)]
        try:
            done = subprocess.run(words, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ModelError(
                f"`{path}` does not answer within {LIMIT_S:.0f} s",
                hint="look for a loop without an end",
            ) from None
        if done.returncode == FULL:
            raise ModelError(
                f"`{path}` needs more memory than the {memory() / 2**30:.1f} GiB of this machine",
                hint="give a network for one image on a small device",
            )
        if done.returncode < 0:
            raise ModelError(
                f"`{path}` ends a process that reads and runs it, by {signal.Signals(-done.returncode).name}",
                hint="it may be corrupt or malicious, or hits a bug in ONNX: export it again",
            )


def run_once(path: Path) -> None:
    """Infer its shapes as every stage does, then run it on noise, with onnxruntime's optimisation and without."""
    import numpy as np
    import onnx

    with suppress(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(inspect.load(path))
    spec = inspect.facts(path).input
    inputs = np.random.default_rng(0).standard_normal([size or 1 for size in spec.shape], np.float32)
    for optimised in (True, False):
        session.run_model(path, inputs, optimised, threads=1)


def memory() -> int:
    """Return the bytes that a process may use: the machine's, or fewer under a resource limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return here if soft == resource.RLIM_INFINITY else min(soft, here)


def exhausted(error: BaseException | None) -> bool:
    """Whether an allocation failed: Python's, C++'s, or one of onnxruntime's, which have no type of their own."""
    while error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (memory(), memory()))  # it ends where it needs more, and nothing else does
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        run_once(Path(sys.argv[1]))
    except (EdgekdError, OSError, MemoryError) as error:  # reported where it is read in earnest
        sys.exit(FULL if exhausted(error) else 1)
