"""The results folder of a bundle: one file for each command, and what lets an interrupted command go on."""

import contextlib
import os

from edgekd_runner.errors import RunnerError
from edgekd_runner.files import load_json, save_json, sha256


@contextlib.contextmanager
def lock_folder(out):
    """Keep other runs out of the folder: two at a time would time each other. Raises RunnerError if one is there."""
    import fcntl  # not on Windows, which has no bundles

    with open(os.path.join(out, ".lock"), "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise RunnerError(
                "another run works in `%s` (process %s)" % (out, stream.read().strip() or "unknown"),
                "wait until it ends, or end it: what is finished is kept",
                1,
            )
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def load_result(bundle, out, command):
    """Return the result of a command on this bundle, or None where it has not ended yet."""
    result = load_json(os.path.join(out, command + ".json"))
    return result if result and result.get("bundle") == bundle["sha256"] else None


class Checkpoint:
    """Finished parts of a command, in `OUT/COMMAND.state.json`; empty where that was begun with another key."""

    def __init__(self, out, command, key):
        self.path, self.key = os.path.join(out, command + ".state.json"), key
        saved = load_json(self.path) or {}
        self.parts = saved.get("parts", {}) if saved.get("key") == key else {}

    def save(self, name, part):
        self.parts[name] = part
        save_json(self.path, {"key": self.key, "parts": self.parts})


def checkpoint_paths(out, command):
    """Return what a finished command no longer needs to go on. `verify` keeps its checkpoint, to skip engines."""
    names = {"bench": ("bench.state", "watch.state.json", "trtexec.state.json"), "energy": ("energy.state.json",)}
    paths = (os.path.join(out, name) for name in names.get(command, ()))
    return [path for path in paths if os.path.exists(path)]


def built_engines(bundle, out):
    """Return the manifest's row of every engine that was built, with its index, `path` and what `build` recorded."""
    result = load_result(bundle, out, "build")
    if not result:
        raise RunnerError("nothing is built yet", "run `build --bundle %s` first" % bundle["folder"], 1)
    engines = []
    for index, (engine, record) in enumerate(zip(bundle["engines"], result["engines"])):
        if "error" not in record:
            engines.append(dict(engine, index=index, path=engine_path(bundle, out, record), build=record))
    if not engines:
        first = result["engines"][0]
        raise RunnerError("no engine could be built: %s" % first["error"], first["hint"], 1)
    return engines


def engine_path(bundle, out, record):
    """Return the file that the runtime loads: the model itself, or what was built from it."""
    engine = record.get("engine")
    path = os.path.join(out, engine) if engine else os.path.join(bundle["folder"], record["model"])
    if not os.path.isfile(path):
        raise RunnerError("the engine `%s` is gone" % record["name"], "run `build` again", 1)
    return path


def engine_key(engine):
    """Return what results of an engine depend on: a file, in a version of a runtime."""
    return "%s %s %s" % (engine["name"], sha256(engine["path"]), engine["build"]["runtime"]["version"])


def engine_spec(engine):
    """Return what a child needs to open an engine."""
    spec = {key: engine[key] for key in ("index", "name", "path", "precisions")}
    precision = engine.get("compute_precision") or ("fp32" if engine["precisions"] == ["fp32"] else "native")
    return dict(spec, dla=engine.get("dla"), compute_precision=precision, model_sha256=engine["build"]["sha256"])
