"""Command `cold-start`: how long until the first answer of a fresh process, and how much memory that takes."""

import importlib
import re

from edgekd_runner.backends.registry import RUNTIMES, file_info, open_model
from edgekd_runner.checks import load_inputs
from edgekd_runner.child_process import run_child
from edgekd_runner.machine import compute_conditions, describe_machine, read_counters
from edgekd_runner.messages import emit
from edgekd_runner.system_files import read_text
from edgekd_runner.timing import now_ns

STARTS = 6  # of each model: the range of 6 contains the median with 97 %


def cold_start_job(job, out):
    """Open every model in STARTS fresh processes, in rotating order; and as often start one with the runtime alone."""
    orders = [list(range(-1, len(job["models"]))) for _ in range(STARTS)]  # -1: the runtime alone
    results, before = [[] for _ in range(len(job["models"]) + 1)], read_counters()
    total = STARTS * (len(job["models"]) + 1)
    for number, order in enumerate(orders):
        for place in range(len(order)):
            index = order[(place + number) % len(order)]  # each once first, once last: no need for numpy in here
            arguments = ["_cold_start", "--job", job["path"], "--out", out, "--model", str(index)]
            results[index].append(run_child(arguments))
            emit({"progress": sum(map(len, results)), "of": total})
    infos, runtime_only = [], results[-1]
    for model, starts in zip(job["models"], results):
        precision = starts[0].pop("compute_precision")
        infos.append(dict(file_info(model), compute_precision=precision, starts=[r["start"] for r in starts]))
    summary = {"machine": describe_machine(), "conditions": compute_conditions(before, read_counters())}
    summary.update(runtime=results[0][0]["runtime"], models=infos)
    return dict(summary, runtime_only=[result["start"] for result in runtime_only])


def start_once(job, index):
    """Return one cold start in this process, of the runtime alone for -1: milliseconds, and its peak memory in KiB."""
    package = RUNTIMES[job["runtime"]].package
    started, images = now_ns(), load_inputs(job["inputs"])
    importlib.import_module(package)
    start = {"import_ms": (now_ns() - started) / 1e6}
    if index < 0:
        return {"start": dict(start, peak_kib=peak_kib())}
    session, info = open_model(job, job["models"][index], images)
    start.update({key: info[key] for key in ("load_ms", "first_ms")}, peak_kib=peak_kib())
    if job["runtime"] == "openvino":
        start["compile_ms"] = session.compile_ms  # a part of load_ms
    return {"start": start, "runtime": session.runtime_info(), "compute_precision": session.compute_precision()}


def peak_kib():
    """Return the peak memory of this process alone: getrusage would count its parent's memory, too."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", read_text("/proc/self/status"))
    return int(peak.group(1)) if peak else None
