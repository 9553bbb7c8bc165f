"""Command `collect`: everything that was measured, in one file, and the engine to take."""

import os

from edgekd_runner.errors import RunnerError
from edgekd_runner.files import sha256
from edgekd_runner.results import load_result


def collect_results(bundle, out, args):
    """Return the results of all commands, with the hashes of the arrays beside them."""
    parts = {command: load_result(bundle, out, command) for command in ("doctor", "build", "verify", "bench", "energy")}
    if not any(parts.values()):
        hint = "run `build`, `verify` and `bench` first"
        raise RunnerError("there is no result of this bundle in `%s`" % out, hint, 1)
    names = ["samples.npz"] if parts["bench"] else []
    if parts["verify"]:
        names += ["logits-%d.npy" % record["index"] for record in parts["verify"]["engines"]]
    files = {}
    for name in names:
        path = os.path.join(out, name)
        if not os.path.isfile(path):
            raise RunnerError("`%s` is gone from the results" % name, "run `verify` and `bench` again", 1)
        files[name] = {"sha256": sha256(path), "bytes": os.path.getsize(path)}
    recommended = recommend_engine(bundle, parts["verify"], medians_of(parts["bench"]))
    return dict(parts, name=bundle["name"], target=bundle["target"], files=files, recommended=recommended)


def medians_of(bench):
    """Return the median milliseconds of every model of a bench, by its name."""
    return {model["name"]: model["median_ms"] for model in bench["models"]} if bench else {}


def recommend_engine(bundle, verified, medians):
    """Return the fastest engine that passes `verify`, of the students where there are any, with the reason."""
    if not verified or not medians:
        return {"name": None, "reason": "nothing is %s yet" % ("timed" if verified else "verified")}
    students = [e["name"] for e in bundle["engines"] if e["role"] == "student"] or list(medians)
    passing = [e["name"] for e in verified["engines"] if e["passes"] and e["name"] in students and e["name"] in medians]
    if not passing:
        return {"name": None, "reason": "no student answers as on the host"}
    reason = "the fastest of %d that pass" % len(passing)
    return {"name": min(passing, key=lambda name: medians[name]), "reason": reason}
