"""Children: whatever loads a runtime does so in a process of its own, and a failure is explained by how that ended."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile

from edgekd_runner.errors import HINT_BUILD_AGAIN, HINT_MEMORY, HINT_NEW_BUNDLE, RunnerError
from edgekd_runner.messages import forward
from edgekd_runner.programs import TEXT, end_process

# what runtimes print when they fail, what it means, and what helps; the first that fits
FAILURES = (
    (
        r"insufficient memory|out of memory|could not be allocated|CUDA error 2\b|std::bad_alloc|MemoryError",
        "memory ran out",
        HINT_MEMORY,
    ),
    (
        r"Target GPU SM \S+ is not supported by this TensorRT",
        "this TensorRT is not built for this GPU: on a Jetson up to JetPack 6, wheels from PyPI are for servers",
        "pip uninstall tensorrt; use the system's own: `sudo apt install python3-libnvinfer`, no virtual environment",
    ),
    (
        r"No importer registered for op|Unsupported ONNX opset|unsupported ONNX opset|UNSUPPORTED_NODE|opset version",
        "the model has an operator or an opset that this TensorRT does not know",
        HINT_NEW_BUNDLE,
    ),
    (
        r"has dynamic or shape inputs, but no optimization profile",
        "the model leaves sizes open, and no profile says which",
        "export it for one image of one size",
    ),
    (
        r"incompatible device|not compatible with this version|expecting library version|[Vv]ersion tag does not match",
        "the engine was built on another device or by another TensorRT",
        HINT_BUILD_AGAIN,
    ),
    (
        r"only activation types allowed|zero point must be zero|[Nn]on-zero zero point|zero_?point",
        "its Q/DQ pairs are not those that TensorRT takes",
        "quantize it with the scheme `tensorrt`; `edgekd lint` names the nodes",
    ),
    (
        r"Could not find any implementation for node",
        "TensorRT has no kernel for a node: most often a Q/DQ pair is where it should not be",
        "leave that Q/DQ pair out (`edgekd lint` names bad places), or give more memory: stop other programs",
    ),
    (
        r"[Cc]uda failure: ?(222|35)\b|CUDA error (222|35|803)\b|driver version is insufficient",
        "the NVIDIA driver is older than this CUDA, or missing",
        "in a container match its L4T to that of the host (`cat /etc/nv_tegra_release`); else update the driver",
    ),
    (
        r"libcuda\.so|libnvinfer\S*: cannot open|libnvdla|libcudart is not found",
        "a library of NVIDIA is missing",
        "`sudo apt install nvidia-jetpack`; in a container start it with `--runtime nvidia`",
    ),
    (
        r"DLA .*(not supported|is not available)|cannot run on DLA|DLA \d+ here",
        "the DLA is not there, or cannot run the network",
        "build the bundle again without --dla",
    ),
)


def run_task(task, bundle, out, spec, on_progress=None):
    """Run one task on a bundle in a child, return its result; `on_progress` is called at each of its messages.

    Raises RunnerError with the child's own error, or with what its end means.
    """
    spec = json.dumps(spec)
    return run_child(["_child", task, "--bundle", bundle["folder"], "--out", out, "--spec", spec], on_progress)


def run_child(arguments, on_progress=None):
    """Start this program again with other arguments, as it was started itself, and return the child's result."""
    message, command = {}, [sys.executable, os.path.abspath(sys.argv[0])] + arguments
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **TEXT) as process:
            try:
                for line in process.stdout:
                    message = forward(line) or message
                    if on_progress:
                        on_progress()
                code = process.wait()
            finally:
                end_process(process)
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    if "result" in message:  # its last line, when all is written; some TensorRTs crash while they unload
        return message["result"]
    raise explain_failure(message, text, code)


def explain_failure(message, text, code):
    """Return a RunnerError for the end of a process: from its last message and its stderr, else from its exit code."""
    if "error" in message and code == 2:
        return RunnerError(message["error"], message["hint"], code)
    last = message.get("error", "") or "; ".join(text.strip().splitlines()[-3:]) or "it printed nothing"
    for pattern, meaning, hint in FAILURES:
        if re.search(pattern, last + "\n" + text):
            return RunnerError("%s (%s)" % (meaning, last), hint, 1)
    if "error" in message:
        return RunnerError(message["error"], message["hint"], code)
    if code == -signal.SIGKILL:
        return RunnerError("the system killed it, most likely because memory ran out", HINT_MEMORY, 1)
    name = signal.Signals(-code).name if code < 0 else "exit code %d" % code
    return RunnerError("it ended with %s: %s" % (name, last), "run `doctor`; report it with this text", 1)
