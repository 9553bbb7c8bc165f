"""Command `doctor`: what this machine is, what it lacks with the remedy, and how it differs from a bundle's."""

import importlib
import json
import shutil
import sys

from edgekd_runner.backends.cuda import Cuda
from edgekd_runner.backends.registry import RUNTIMES
from edgekd_runner.board import identify_board, l4t_version
from edgekd_runner.child_process import run_task
from edgekd_runner.errors import HINT_MEMORY, HINT_NEW_BUNDLE, RunnerError, first_line
from edgekd_runner.machine import describe_machine, memory_gib
from edgekd_runner.messages import emit
from edgekd_runner.operating_point import read_operating_point
from edgekd_runner.power import open_power_sensor
from edgekd_runner.programs import find_program
from edgekd_runner.trtexec import TRTEXEC

MIN_FREE_GIB = 1.0  # of memory or disk: below, builds have failed


def check_packages(names):
    """Return the versions of the packages that can be imported, and of the others the error and the remedy."""
    versions, missing = {}, []
    for name in names:
        try:
            versions[name] = importlib.import_module(name).__version__
        except ImportError as error:
            hint = "%s -m pip install %s" % (sys.executable, name)
            if name == "tensorrt":
                hint = "on a Jetson `sudo apt install python3-libnvinfer` and the system's python3; else " + hint
            missing.append({"package": name, "error": first_line(error), "hint": hint})
    return versions, missing


def print_machine():
    """Print what this machine is, and what it lacks. Return exit code 1 without NumPy or without any runtime."""
    runtimes = [name for name in RUNTIMES if name != "tensorrt"]  # that needs a bundle
    versions, missing = check_packages(["numpy"] + runtimes)
    if set(versions) & set(runtimes):  # one is enough
        missing = [lack for lack in missing if lack["package"] not in runtimes]
    print(json.dumps({"machine": describe_machine(), "versions": versions, "missing": missing}, indent=2))
    return 1 if missing else 0


def doctor_bundle(bundle, out, args):
    """Return what this machine is, what it lacks, and how it differs from what the bundle was made for."""
    try:
        probe = run_task("doctor", bundle, out, {})
    except RunnerError as error:
        missing = {"package": bundle["runtime"], "error": error.error, "hint": error.hint}
        probe = {"versions": {}, "missing": [missing], "device": None}
    report = dict(probe, machine=describe_machine(), board=identify_board(), l4t=l4t_version(), memory_gib=memory_gib())
    report.update(
        power=describe_power(),
        disk_free_gib=round(shutil.disk_usage(out).free / 2.0**30, 2),
        operating_point=read_operating_point(),
        trtexec=find_program(TRTEXEC),
    )
    report["differences"] = list_differences(bundle, report)
    for difference in report["differences"]:
        emit({"warning": difference["what"], "hint": difference["hint"]})
    for lack in report["missing"]:
        emit({"error": "%s: %s" % (lack["package"], lack["error"]), "hint": lack["hint"]})
    return dict(report, code=1 if report["missing"] else 0)


def doctor_task(bundle, out, spec):
    """Return versions of what the bundle needs, and the GPU; in a child, as a runtime without a driver can crash."""
    package = RUNTIMES[bundle["runtime"]].package
    versions, missing = check_packages(["numpy", package])
    device = Cuda().device_info() if package == "tensorrt" and not missing else None
    return {"versions": versions, "missing": missing, "device": device}


def describe_power():
    """Return which sensor measures the module's power, or the reason why none does."""
    try:
        sensor = open_power_sensor()
        sensor.close()
    except RunnerError as error:
        return {"reason": error.error}
    return {"sensor": sensor.kind, "rails": list(sensor.labels)}


def list_differences(bundle, report):
    """Return what is not as the bundle was planned for, with what to do."""
    differences = []
    target, name = bundle.get("board"), report["board"]["name"]
    if target and target != name:
        board = name or report["board"]["model"] or "no Jetson"
        fact = "the bundle is for the board %s, this is %s" % (target, board)
        differences.append((fact, HINT_NEW_BUNDLE + " --board ..."))
    target, version = bundle.get("tensorrt"), report["versions"].get("tensorrt")
    if target and version and target.split(".")[:2] != version.split(".")[:2]:
        differences.append(("the bundle is for TensorRT %s, this is %s" % (target, version), HINT_NEW_BUNDLE))
    memory, disk = report["memory_gib"]["MemAvailable"], report["disk_free_gib"]
    if memory < MIN_FREE_GIB:
        differences.append(("only %.1f GiB of memory are free" % memory, HINT_MEMORY))
    if disk < MIN_FREE_GIB:
        differences.append(("only %.1f GiB of disk are free" % disk, "free some before you build"))
    return [{"what": fact, "hint": hint} for fact, hint in differences]
