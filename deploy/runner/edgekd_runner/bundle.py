"""A bundle: a folder with models, inputs and expected outputs, whose manifest has the hash of every file."""

import hashlib
import json
import os

from edgekd_runner.backends.registry import RUNTIMES
from edgekd_runner.checks import check_protocol, load_inputs, require_fields
from edgekd_runner.errors import HINT_COPY_AGAIN, RunnerError, first_line
from edgekd_runner.files import load_json, sha256

SCHEMA = 2  # of bundles and results
MANIFEST = "manifest.json"


def read_bundle(folder):
    """Return the manifest of a whole, unchanged bundle, with its `folder` and its own hash, `sha256`."""
    folder = os.path.realpath(folder)
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as stream:
            text = stream.read()
        bundle = json.loads(text.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise RunnerError("`%s` is no bundle: %s" % (folder, first_line(error)), HINT_COPY_AGAIN)
    require_fields(bundle, "the manifest", {"schema": int})
    if bundle["schema"] != SCHEMA:
        fact = "this runner reads bundles of schema %d, this one has %s" % (SCHEMA, bundle["schema"])
        raise RunnerError(fact, "use the runner.pyz that came with the bundle")
    types = {"name": str, "target": str, "runtime": str, "threads": int, "engines": list, "inputs": str}
    require_fields(bundle, "the manifest", dict(types, verify_images=int, protocol=dict, files=dict))
    if bundle["runtime"] not in RUNTIMES:
        fact = "this runner has no runtime `%s`" % bundle["runtime"]
        raise RunnerError(fact, "known: %s" % ", ".join(sorted(RUNTIMES)))
    check_protocol(bundle["protocol"])
    for name in sorted(bundle["files"]):
        check_file(folder, name, bundle["files"][name])
    check_engines(bundle)
    return dict(bundle, folder=folder, sha256=hashlib.sha256(text).hexdigest())


def check_file(folder, name, record):
    """Raise RunnerError for a file outside of the bundle, and for one that changed since the bundle was written."""
    require_fields(record, "`%s` in the manifest" % name, {"sha256": str, "bytes": int})
    path = os.path.join(folder, name)
    odd = os.path.isabs(name) or "\\" in name or "\0" in name or ".." in name.split("/")
    if odd or not os.path.realpath(path).startswith(folder + os.sep):
        hint = "do not use this bundle: build it again"
        raise RunnerError("`%s` in the manifest leads out of the bundle" % name, hint)
    if not os.path.isfile(path):
        raise RunnerError("`%s` is missing in the bundle" % name, HINT_COPY_AGAIN)
    size = os.path.getsize(path)
    if size != record["bytes"]:
        raise RunnerError("`%s` has %d bytes instead of %d" % (name, size, record["bytes"]), HINT_COPY_AGAIN)
    if sha256(path) != record["sha256"]:
        raise RunnerError("`%s` changed since the bundle was written" % name, HINT_COPY_AGAIN)


def check_engines(bundle):
    """Raise RunnerError unless there are engines, each with its fields, hashed files and a name of its own."""
    if not bundle["engines"]:
        raise RunnerError("the bundle has no engine", "build it again")
    files = [bundle["inputs"], bundle.get("labels")]
    for engine in bundle["engines"]:
        types = {"name": str, "role": str, "model": str, "expected": str, "precisions": list}
        require_fields(engine, "an engine of the manifest", dict(types, agreement=(int, float)))
        files += [engine["model"], engine["expected"], engine.get("cache")]
    missing = [name for name in files if name and (not isinstance(name, str) or name not in bundle["files"])]
    if missing:
        raise RunnerError("the manifest records no hash of `%s`" % missing[0], "build the bundle again")
    names = [engine["name"] for engine in bundle["engines"]]
    if len(set(names)) < len(names):
        raise RunnerError("engines of the bundle share a name", "build the bundle again")


def reread_bundle(folder):
    """Return what `read_bundle` does, in a child, whose parent has checked the bundle."""
    path = os.path.join(folder, MANIFEST)
    return dict(load_json(path), folder=folder, sha256=sha256(path))


def job_settings(bundle):
    """Return the settings of the bundle that a job has, too."""
    return {key: bundle[key] for key in ("runtime", "threads", "protocol")}


def load_bundle_inputs(bundle):
    return load_inputs(os.path.join(bundle["folder"], bundle["inputs"]))
