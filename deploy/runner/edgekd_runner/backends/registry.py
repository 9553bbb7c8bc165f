"""The runtimes by name, and one way to open and call a model in any of them.

A runtime is a class with `package`, `errors` and `shape`, that runs (`run`, `bind`, `run_many`) and says what was in
force (`runtime_info`, `model_info`, `compute_precision`). To add one, add a module beside this and a row here.
"""

import importlib
import os

from edgekd_runner.backends.openvino import OpenVino
from edgekd_runner.backends.ort import OnnxRuntime
from edgekd_runner.backends.tensorrt import TensorRt
from edgekd_runner.errors import HINT_CHECK_MODEL, RunnerError, first_line
from edgekd_runner.files import sha256
from edgekd_runner.timing import now_ns

RUNTIMES = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "tensorrt": TensorRt}


def open_model(job, model, inputs):
    """Return a session of the model, and its file's facts with how long loading and the first call took."""
    shape, runtime = list(inputs.shape[1:]), RUNTIMES[job["runtime"]]
    importlib.import_module(runtime.package)  # no part of loading a model
    started = now_ns()
    try:
        session = runtime(job, model, shape)
    except RunnerError as error:
        raise RunnerError("`%s`: %s" % (model["name"], error.error), error.hint, error.code)
    load_ms = (now_ns() - started) / 1e6
    model_shape = session.shape
    if len(model_shape) != inputs.ndim or any(a is not None and a != b for a, b in zip(model_shape[1:], shape)):
        sizes = "x".join(str(size or "?") for size in model_shape[1:])
        raise RunnerError(
            "`%s` takes inputs of %s, these are %s" % (model["name"], sizes, "x".join(map(str, shape))),
            "all models of a job share its inputs: give inputs of that shape, or leave the model out",
        )
    session.batch = model_shape[0]
    first = pad_batch(inputs[:1], session.batch or job.get("batch", 1))
    started = now_ns()
    run_model(session, model["name"], first)
    first_ms = (now_ns() - started) / 1e6
    return session, dict(file_info(model), load_ms=load_ms, first_ms=first_ms)


def file_info(model):
    return {"name": model["name"], "sha256": sha256(model["path"]), "bytes": os.path.getsize(model["path"])}


def run_model(session, name, x):
    """Return the first output for `x`. Raises RunnerError with the runtime's own words."""
    try:
        return session.run(x)[0]
    except session.errors as error:
        raise RunnerError("`%s` does not run on %s: %s" % (name, x.shape, first_line(error)), HINT_CHECK_MODEL, 1)


def pad_batch(x, batch):
    """Return a copy of `x`, filled up to `batch` images with its last one."""
    import numpy as np

    return np.concatenate([x] + [x[-1:]] * (batch - len(x))) if len(x) < batch else np.array(x)
