"""A job: the JSON file in which a host asks for outputs, times or cold starts of models."""

import json
import os

from edgekd_runner.backends.registry import RUNTIMES
from edgekd_runner.checks import SCOPES, check_protocol, require_fields
from edgekd_runner.errors import RunnerError


def read_job(path, timing):
    """Return the checked job with absolute paths; in the file they are relative to its own folder.

    With `timing` it must have a protocol. Raises RunnerError for a job that cannot be run.
    """
    try:
        with open(path) as stream:
            job = json.load(stream)
    except (OSError, ValueError) as error:
        raise RunnerError("the job `%s` cannot be read: %s" % (path, error), "give a JSON file; README.md shows one")
    require_fields(job, "the job", {"runtime": str, "threads": int, "models": list, "inputs": str})
    if job["runtime"] not in RUNTIMES:
        raise RunnerError("this runner has no runtime `%s`" % job["runtime"], "known: %s" % ", ".join(sorted(RUNTIMES)))
    if job.get("hint", "latency") not in ("latency", "throughput"):
        raise RunnerError("the hint of the job is `%s`" % job["hint"], "use latency or throughput")
    if not job["models"]:
        raise RunnerError("the job names no model", "give at least one in `models`")
    if not isinstance(job.get("batch", 1), int) or job.get("batch", 1) < 1:
        raise RunnerError("the batch of the job is `%s`" % job["batch"], "give the images of a call, 1 or more")
    if job.get("scope", "end_to_end") not in SCOPES:
        raise RunnerError("the scope of the job is `%s`" % job["scope"], "use %s" % ", ".join(SCOPES))
    home, job["path"] = os.path.dirname(os.path.abspath(path)), os.path.abspath(path)
    job["inputs"] = os.path.join(home, job["inputs"])
    for model in job["models"]:
        require_fields(model, "a model of the job", {"name": str, "path": str})
        model["path"] = os.path.join(home, model["path"])
        if not os.path.isfile(model["path"]):
            raise RunnerError("`%s` is not there: %s" % (model["name"], model["path"]), "check `models` in the job")
        precision = model.get("compute_precision", "fp32")
        if precision not in ("fp32", "native"):
            fact = "the compute_precision of `%s` is `%s`" % (model["name"], precision)
            raise RunnerError(fact, "use fp32 or native")
    if timing:
        require_fields(job, "the job", {"protocol": dict})
        check_protocol(job["protocol"])
    return job
