"""Run models on this machine: their outputs, and the time that every call takes.

    python3 runner.pyz doctor                               what this machine is, and what it lacks
    python3 runner.pyz predict --job job.json --out DIR     outputs of every model for all inputs
    python3 runner.pyz bench --job job.json --out DIR       nanoseconds of every timed call
    python3 runner.pyz cold-start --job job.json --out DIR  cold starts and memory, in fresh processes

and on a bundle, a folder with models, inputs and expected outputs, one after the other:

    python3 runner.pyz doctor|build|verify|bench|energy|collect --bundle DIR [--out DIR]

README.md says what a job and a bundle look like.
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import sys

from edgekd_runner.bench import bench_job
from edgekd_runner.bundle import SCHEMA, read_bundle, reread_bundle
from edgekd_runner.bundle_bench import bench_bundle
from edgekd_runner.bundle_build import build_bundle, build_task
from edgekd_runner.bundle_collect import collect_results
from edgekd_runner.bundle_verify import verify_bundle, verify_task
from edgekd_runner.cold_start import cold_start_job, start_once
from edgekd_runner.doctor import doctor_bundle, doctor_task, print_machine
from edgekd_runner.energy import energy_task, measure_energy
from edgekd_runner.errors import HINT_MEMORY, RunnerError, first_line
from edgekd_runner.files import save_json, write_atomic
from edgekd_runner.job import read_job
from edgekd_runner.messages import emit
from edgekd_runner.predict import predict_job
from edgekd_runner.programs import die_with_parent
from edgekd_runner.results import checkpoint_paths, lock_folder
from edgekd_runner.rounds import bench_task

JOB_COMMANDS = {"predict": predict_job, "bench": bench_job, "cold-start": cold_start_job}  # (job, out)
BUNDLE_COMMANDS = {  # (bundle, out, args)
    "doctor": doctor_bundle,
    "build": build_bundle,
    "verify": verify_bundle,
    "bench": bench_bundle,
    "energy": measure_energy,
    "collect": collect_results,
}
TASKS = {  # (bundle, out, spec): the parts of these that load a runtime, each in a child
    "doctor": doctor_task,
    "build": build_task,
    "verify": verify_task,
    "bench": bench_task,
    "energy": energy_task,
}


class Stopped(BaseException):
    """Somebody ends this program: Ctrl-C, or SIGTERM."""


def main():
    """Run the command in sys.argv and return the exit code; every failure is one message with a hint."""
    disable_telemetry()
    args = parse_arguments()
    if args.command == "doctor" and not args.bundle:
        return print_machine()
    try:
        if args.command == "_child":
            return run_task_here(args)
        if args.command == "_cold_start":
            return start_here(args)
        if args.bundle:
            with stop_on_signals():
                return run_bundle_command(args)
        return run_job_command(args)
    except RunnerError as error:
        emit({"error": error.error, "hint": error.hint})
        return error.code
    except ImportError as error:
        emit({"error": first_line(error), "hint": "`%s doctor` lists what is missing" % sys.argv[0]})
    except OSError as error:  # from numpy often without a number or the file's name
        hint = "check the free space and your rights in `%s`" % args.out
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "the disk is full: free some space; finished parts are kept, the same command goes on"
        emit({"error": first_line(error), "hint": hint})
    except MemoryError:
        emit({"error": "memory ran out", "hint": HINT_MEMORY})
    except Stopped as stopped:
        emit({"error": "stopped by %s" % stopped, "hint": "finished parts are kept, the same command continues"})
    return 1


def disable_telemetry():
    """Keep the runtimes from reporting their use to their makers."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime keeps a log of events in the home folder, and posts it
    sys.modules["openvino_telemetry"] = None  # OpenVINO sends a message at every import


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    for name in ("doctor", "build", "verify", "bench", "energy", "collect", "predict", "cold-start"):
        command = commands.add_parser(name)
        command.add_argument("--out", help="where results go; of a bundle: its folder `results`")
        source = command.add_mutually_exclusive_group(required=name != "doctor")
        if name not in ("predict", "cold-start"):
            source.add_argument("--bundle", help="its folder")
        if name in ("predict", "bench", "cold-start"):
            source.add_argument("--job", help="its JSON file")
        if name in ("bench", "energy"):
            command.add_argument(
                "--lock-clocks", action="store_true", help="hold a Jetson's clocks meanwhile; asks for root"
            )
        if name == "energy":
            command.add_argument("--seconds", type=float, default=30.0, help="of each of three loops of an engine")
    child = commands.add_parser("_child")  # a process that this program starts
    child.add_argument("task", choices=sorted(TASKS))
    for name in ("--bundle", "--out", "--spec"):
        child.add_argument(name, required=True)
    start = commands.add_parser("_cold_start")  # another one
    for name in ("--job", "--out"):
        start.add_argument(name, required=True)
    start.add_argument("--model", type=int, required=True)
    args = parser.parse_args()
    args.bundle = getattr(args, "bundle", None)
    if getattr(args, "job", None) and not args.out:
        parser.error("a job needs --out")
    return args


def run_job_command(args):
    """Run one command on a job and write what it returns to `OUT/result.json`."""
    job = read_job(args.job, timing=args.command == "bench")
    os.makedirs(args.out, exist_ok=True)
    result = JOB_COMMANDS[args.command](job, args.out)
    text = json.dumps(result, indent=2).encode()
    # last: a result is there only when all else is
    write_atomic(os.path.join(args.out, "result.json"), lambda stream: stream.write(text))
    return 0


def run_bundle_command(args):
    """Run one command on a bundle and write what it returns to `OUT/COMMAND.json`, last."""
    bundle = read_bundle(args.bundle)
    out = os.path.abspath(args.out or os.path.join(bundle["folder"], "results"))
    args.out = out
    os.makedirs(out, exist_ok=True)
    with lock_folder(out):
        result = BUNDLE_COMMANDS[args.command](bundle, out, args)
        name = "result" if args.command == "collect" else args.command
        save_json(os.path.join(out, name + ".json"), dict(result, schema=SCHEMA, bundle=bundle["sha256"]))
        for path in checkpoint_paths(out, args.command):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return result.get("code", 0)


def run_task_here(args):
    """Run one task of a bundle command, as a child; the result is the last line."""
    die_with_parent()
    bundle = reread_bundle(args.bundle)
    emit({"result": TASKS[args.task](bundle, args.out, json.loads(args.spec))})
    return 0


def start_here(args):
    """Start one model, as a child; the result is the last line."""
    die_with_parent()
    emit({"result": start_once(read_job(args.job, timing=False), args.model)})
    return 0


@contextlib.contextmanager
def stop_on_signals():
    """Make SIGTERM, a closed terminal and Ctrl-C end children and put back what was changed, within seconds."""

    def stop(number, frame):
        for name in names:
            signal.signal(name, signal.SIG_IGN)  # once is enough: clean up in peace
        raise Stopped(signal.Signals(number).name)

    signals = [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)]
    names = [name for name in signals if signal.getsignal(name) != signal.SIG_IGN]  # as under nohup
    for name in names:
        signal.signal(name, stop)
    yield
