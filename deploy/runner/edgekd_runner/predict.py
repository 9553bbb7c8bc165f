"""Command `predict`: the outputs of every model of a job to all inputs."""

import os

from edgekd_runner.backends.registry import open_model, pad_batch, run_model
from edgekd_runner.checks import load_inputs
from edgekd_runner.errors import RunnerError
from edgekd_runner.files import write_atomic
from edgekd_runner.messages import emit

CHUNK = 64  # images in a call of a model with a dynamic batch


def predict_job(job, out):
    """Write `logits-I.npy` for model I: (images, ...), what the file answers in this runtime."""
    import numpy as np

    inputs, infos = load_inputs(job["inputs"]), []
    progress = Progress(len(inputs) * len(job["models"]))
    for index, model in enumerate(job["models"]):
        session, info = open_model(job, model, inputs)
        logits = predict(session, model["name"], inputs, progress)
        write_atomic(os.path.join(out, "logits-%d.npy" % index), lambda stream: np.save(stream, logits))
        infos.append(info)
    return {"runtime": session.runtime_info(), "models": infos}


def predict(session, name, inputs, progress):
    """Return (images, ...): the first output of the model for all inputs."""
    import numpy as np

    step, parts = session.batch or CHUNK, []
    for start in range(0, len(inputs), step):
        x = np.array(inputs[start : start + step])
        y = run_model(session, name, pad_batch(x, session.batch or len(x)))
        if y.ndim < 2 or len(y) < len(x):
            raise RunnerError(
                "`%s` answers %s with %s" % (name, x.shape, y.shape), "its first output must have a row for each image"
            )
        parts.append(y[: len(x)])
        progress.add(len(x))
    return np.concatenate(parts)


class Progress:
    """Emits how many images are done, about once in CHUNK images."""

    def __init__(self, total, **fields):
        self.done, self.total, self.fields = 0, total, fields

    def add(self, count):
        self.done += count
        if self.done % CHUNK < count or self.done == self.total:
            emit(dict(self.fields, progress=self.done, of=self.total))
