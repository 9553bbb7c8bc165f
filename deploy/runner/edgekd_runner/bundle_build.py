"""Command `build`: make of every model in a bundle what the runtime loads."""

import os

from edgekd_runner.backends.registry import open_model
from edgekd_runner.build_engine import build_tensorrt
from edgekd_runner.bundle import job_settings, load_bundle_inputs
from edgekd_runner.child_process import run_task
from edgekd_runner.errors import HINT_MEMORY, RunnerError
from edgekd_runner.messages import emit
from edgekd_runner.results import engine_spec


def build_bundle(bundle, out, args):
    """Build every engine. One that cannot be built is recorded with the reason, and does not stop the others."""
    records, total = [], len(bundle["engines"])
    for index, engine in enumerate(bundle["engines"]):
        emit({"progress": index, "of": total, "note": "build %s" % engine["name"]})
        source = bundle["files"][engine["model"]]["sha256"]
        record = {"name": engine["name"], "model": engine["model"], "sha256": source}
        try:
            record.update(build_in_child(bundle, out, index))
        except RunnerError as error:
            record.update(error=error.error, hint=error.hint)
            emit({"warning": "`%s` was not built: %s" % (engine["name"], error.error), "hint": error.hint})
        records.append(record)
    emit({"progress": total, "of": total})
    none_built = all("error" in record for record in records)
    if none_built:
        emit({"error": "no engine could be built: %s" % records[0]["error"], "hint": records[0]["hint"]})
    return {"engines": records, "code": int(none_built)}


def build_in_child(bundle, out, index):
    """Build one engine; one that ran out of memory is tried once more with less of it."""
    try:
        return run_task("build", bundle, out, {"index": index, "frugal": False})
    except RunnerError as error:
        if bundle["runtime"] != "tensorrt" or error.hint != HINT_MEMORY:
            raise
        emit({"warning": error.error, "hint": "trying again with less memory, which finds slower kernels"})
        return run_task("build", bundle, out, {"index": index, "frugal": True})


def build_task(bundle, out, spec):
    """Build and run one engine, in a child. Only TensorRT writes files; other runtimes load the model itself."""
    if bundle["runtime"] == "tensorrt":
        return build_tensorrt(bundle, out, spec)
    engine = bundle["engines"][spec["index"]]
    path = os.path.join(bundle["folder"], engine["model"])
    source = {"sha256": bundle["files"][engine["model"]]["sha256"]}
    model = engine_spec(dict(engine, index=spec["index"], path=path, build=source))
    session, info = open_model(job_settings(bundle), model, load_bundle_inputs(bundle))
    return dict(info, runtime=session.runtime_info(), **session.model_info())
