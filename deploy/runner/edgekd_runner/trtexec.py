"""trtexec: a second opinion on the times of engines, from NVIDIA's own program."""

import math
import os
import re
import tempfile

from edgekd_runner.child_process import explain_failure
from edgekd_runner.files import load_json
from edgekd_runner.messages import emit
from edgekd_runner.programs import find_program, run_program
from edgekd_runner.results import Checkpoint

TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
DURATION_S, WARMUP_MS = 15, 2000
TIME_KEYS = ("latencyMs", "computeMs", "h2dMs", "d2hMs")  # of --exportTimes


def time_with_trtexec(engines, out):
    """Return what trtexec measures of every engine, or the reason why nothing."""
    path = find_program(TRTEXEC)
    if not path:
        return {"reason": "there is no trtexec in the PATH or in /usr/src/tensorrt/bin"}
    checkpoint = Checkpoint(out, "trtexec", [engine["build"]["engine_sha256"] for engine in engines])
    for number, engine in enumerate(engines):
        if engine["name"] not in checkpoint.parts:
            emit({"progress": number, "of": len(engines), "note": "trtexec %s" % engine["name"]})
            checkpoint.save(engine["name"], time_engine(path, engine))
    return {"path": path, "engines": checkpoint.parts}


def time_engine(path, engine):
    """Return what trtexec at `path` measures of an engine in each scope, with the command."""
    results = {}
    help_text, _ = run_program([path, "--help"], 60)
    for scope in ("inference_only", "end_to_end", "layers"):
        with tempfile.TemporaryDirectory() as folder:
            command = compose_command(path, help_text, engine["path"], scope, folder, engine.get("dla"))
            output, code = run_program(command, 10 * DURATION_S + 60)
            result = {"command": command}
            if code:
                error = explain_failure({}, output, code)
                result.update(reason="%s; %s" % (error.error, error.hint))
            elif scope == "layers":
                profile = load_json(os.path.join(folder, "profile.json"))
                layers = load_json(os.path.join(folder, "layers.json"))
                result.update(layers=read_profile(profile or []), precisions=read_layers(layers or {}))
            else:
                times = load_json(os.path.join(folder, "times.json")) or []
                result.update(read_summary(output), times_ms=read_times(times, WARMUP_MS))
        results[scope] = result
    return results


def list_flags(help_text):
    """Return the flags that a `--help` lists; those that it only talks about do not count."""
    return {"--" + name for name in re.findall(r"^\s+--([A-Za-z0-9]+)", help_text, re.MULTILINE)}


def compose_command(path, help_text, engine, scope, folder, dla=None):
    """Return the command that times `engine`, of flags that this trtexec's help lists. Defaults are never relied on.

    `scope` is `inference_only`, `end_to_end` (with copies) or `layers`, whose times the profiler disturbs.
    """
    supported = list_flags(help_text)
    inverted = "--includeDataTransfers" in supported  # from 11 on, copies are off and spinning and graphs on
    percentiles = "50,90,95,99" if re.search(r"--percentile=P1,", help_text) else "99"
    flags = ["--loadEngine=" + engine]
    if dla is not None:
        flags.append("--useDLACore=%d" % dla)
    if scope == "inference_only" and not inverted:
        flags.append("--noDataTransfers")
    if scope == "end_to_end" and inverted:
        flags.append("--includeDataTransfers")
    flags += ["--useSpinWait"] + (["--useCudaGraph"] if dla is None else ["--noCudaGraph"])
    flags += ["--infStreams=1"] if "--infStreams" in supported else ["--streams=1"]
    if scope == "layers":
        flags += ["--dumpProfile", "--separateProfileRun", "--exportProfile=%s/profile.json" % folder]
        flags += ["--profilingVerbosity=detailed", "--exportLayerInfo=%s/layers.json" % folder]
    else:
        flags += ["--warmUp=%d" % WARMUP_MS, "--duration=%d" % DURATION_S, "--iterations=1000"]
        flags += ["--avgRuns=100", "--percentile=" + percentiles, "--exportTimes=%s/times.json" % folder]
    return [path] + [flag for flag in flags if flag.partition("=")[0] in supported]


def read_times(rows, warmup_ms):
    """Return percentiles in ms from --exportTimes, one row for each call. Up to 8.4 it lists the warm-up too."""
    counted = [row for row in rows if row["startComputeMs"] >= warmup_ms]
    return {key: percentiles_of([row[key] for row in counted]) for key in TIME_KEYS if counted and key in counted[0]}


def percentiles_of(values):
    """Return percentiles by nearest rank, as trtexec has them, with count, minimum and mean."""
    ordered = sorted(values)
    ranks = {p: ordered[max(0, math.ceil(len(ordered) * p / 100.0) - 1)] for p in (50, 90, 95, 99)}
    percentiles = {"p%d" % p: value for p, value in ranks.items()}
    return dict(percentiles, n=len(ordered), min=ordered[0], mean=sum(ordered) / len(ordered))


def read_summary(text):
    """Return what trtexec prints, `GPU Compute Time: min = 0.8 ms, ...`, as {"GPU Compute Time": {"min": 0.8}}."""
    lines = {}
    for line in text.splitlines():
        name, _, rest = re.sub(r"^(\[[^\]]*\]\s*)+", "", line).partition(":")
        numbers = re.findall(r"([a-z]+(?:\(\d+(?:\.\d+)?%\))?) = ([\d.eE+-]+) ms", rest)
        if numbers:
            lines[name.strip()] = {key: float(value) for key, value in numbers}
        elif name.strip() == "Throughput":
            lines["Throughput"] = {"qps": float(rest.split()[0])}
    version = re.search(r"\[TensorRT v(\d+)\]", text)
    return {
        "enqueue_bound": "bound by Enqueue Time" in text,
        "unstable": "GPU compute time is unstable" in text,
        "version": version and version.group(1),
        "ms": lines,
    }


def read_profile(rows):
    """Return the layers of --exportProfile with their average milliseconds; the first row is a count."""
    return [{"name": row["name"], "average_ms": row["averageMs"], "percent": row["percentage"]} for row in rows[1:]]


def read_layers(info):
    """Return names and precisions of --exportLayerInfo: of engines without detailed verbosity, names only."""
    layers = [{"Name": row} if isinstance(row, str) else row for row in info.get("Layers", [])]
    return [{"name": row.get("Name", ""), "precision": layer_precision(row)} for row in layers]


def layer_precision(layer):
    """Return the precision of a layer's first output, `Int8`, `Half` or `Float`; empty where it is not recorded."""
    outputs = layer.get("Outputs") or [{}]
    text = outputs[0].get("Format/Datatype", "") if isinstance(outputs[0], dict) else ""
    return next((kind for kind in ("Int8", "Half", "FP16", "Float", "FP32") if kind.lower() in text.lower()), "")
