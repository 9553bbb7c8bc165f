"""Runs models on the machine that it stands on: their answers to inputs, and the time that every call takes.

    python3 edgekd_runner.py doctor                             what this machine is, and what it lacks
    python3 edgekd_runner.py answer --job job.json --out DIR    logits of every model to all inputs
    python3 edgekd_runner.py bench --job job.json --out DIR     nanoseconds of every timed call

One file, in Python 3.6 syntax, that needs numpy and one runtime: a host starts it as a child process, on a board
it is copied over SSH, so that all numbers come from the same loop. README.md says what a job looks like.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import sys
import time

WARMUP_BLOCK = 20  # calls; medians of blocks are compared
STEADY = 1.02  # three consecutive medians this close together end a warm-up
WARMUP_CAP = 5  # a warm-up gives up after this many times its minimum
DISCARDED = 3  # calls after each switch of models: caches, branch predictors
SETTLE_S, SETTLES = 0.01, 50  # worker threads spin on after a call: 20 to 50 ms were seen in ONNX Runtime 1.31
ROTATED = 64  # inputs at most that timed calls go through
CHUNK = 64  # images per answer call of a model with a dynamic batch
TELLING = "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16 asimddp i8mm bf16".split()  # of the flags

if hasattr(time, "perf_counter_ns"):
    now_ns = time.perf_counter_ns
else:  # Python 3.6

    def now_ns():
        return int(time.perf_counter() * 1e9)


class Problem(Exception):
    """What the caller is told. Exit code 2: the job is wrong; 1: it could not be done."""

    def __init__(self, error, hint, code=2):
        Exception.__init__(self, error)
        self.error, self.hint, self.code = error, hint, code


# --- runtimes: an adapter opens a file, runs it, and reads back what was in force -------------------------------------


class OnnxRuntime:
    """One model in ONNX Runtime on the processor."""

    package = "onnxruntime"

    def __init__(self, path, threads, spinning):
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # its errors share no parent but Exception
        kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self.errors = tuple(kinds) + (RuntimeError, ValueError)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except self.errors as error:
            raise Problem("onnxruntime %s: %s" % (onnxruntime.__version__, first_line(error)), UNREADABLE, 1)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            found = ", ".join("%s %s" % (i.name, i.type) for i in inputs)
            raise Problem("it takes %s" % (found or "no input"), "give models with one float32 input")
        self.name = inputs[0].name
        self.shape = [size if isinstance(size, int) else None for size in inputs[0].shape]  # None: dynamic

    def run(self, x):
        return self.session.run(None, {self.name: x})

    def facts(self):
        import onnxruntime

        options = self.session.get_session_options()
        return {
            "name": self.package,
            "version": onnxruntime.__version__,
            "threads": options.intra_op_num_threads,
            "precision": "fp32",  # its processor kernels compute floats as the file says
            "providers": self.session.get_providers(),
            "graph_optimisation": str(options.graph_optimization_level).rpartition(".")[2],
            "spinning": options.get_session_config_entry("session.intra_op.allow_spinning") == "1",
        }


RUNTIMES = {"onnxruntime": OnnxRuntime}
UNREADABLE = "check the file with `onnx.checker`; a newer opset or IR than the runtime knows needs a new export"


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def open_model(job, model, inputs):
    """The model in its runtime, with how long loading and the first call took."""
    started = now_ns()
    try:
        session = RUNTIMES[job["runtime"]](model["path"], job["threads"], job.get("protocol", {}).get("spinning", True))
    except Problem as problem:
        raise Problem("`%s`: %s" % (model["name"], problem.error), problem.hint, problem.code)
    load_ms = (now_ns() - started) / 1e6
    shape, given = session.shape, list(inputs.shape[1:])
    if len(shape) != inputs.ndim or any(a is not None and a != b for a, b in zip(shape[1:], given)):
        wanted = "x".join(str(size or "?") for size in shape[1:])
        raise Problem(
            "`%s` takes inputs of %s, these are %s" % (model["name"], wanted, "x".join(map(str, given))),
            "all models of a job share its inputs: give inputs of that shape, or leave the model out",
        )
    session.batch = shape[0]
    first = repeated(inputs[:1], session.batch or 1)
    started = now_ns()
    ask(session, model["name"], first)
    first_ms = (now_ns() - started) / 1e6
    file = {"name": model["name"], "sha256": sha256(model["path"]), "bytes": os.path.getsize(model["path"])}
    return session, dict(file, load_ms=load_ms, first_ms=first_ms)


def ask(session, name, x):
    """The first output for `x`."""
    try:
        return session.run(x)[0]
    except session.errors as error:
        raise Problem("`%s` does not run on %s: %s" % (name, x.shape, first_line(error)), UNREADABLE, 1)


# --- answer -----------------------------------------------------------------------------------------------------------


def answer(job, out):
    """Write `logits-I.npy` for model I: (images, ...), as the file answers in this runtime."""
    import numpy as np

    inputs, done, facts = read_inputs(job), 0, []
    total = len(inputs) * len(job["models"])
    for index, model in enumerate(job["models"]):
        session, fact = open_model(job, model, inputs)
        step, logits = session.batch or CHUNK, []
        for start in range(0, len(inputs), step):
            x = np.array(inputs[start : start + step])
            y = ask(session, model["name"], repeated(x, session.batch or len(x)))
            if y.ndim < 2 or len(y) < len(x):
                raise Problem(
                    "`%s` answers %s with %s" % (model["name"], x.shape, y.shape),
                    "its first output must have a row for each image",
                )
            logits.append(y[: len(x)])
            done += len(x)
            if done % CHUNK < len(x) or done == total:
                emit({"progress": done, "of": total})
        replace(os.path.join(out, "logits-%d.npy" % index), lambda stream: np.save(stream, np.concatenate(logits)))
        facts.append(fact)
    return {"runtime": session.facts(), "models": facts}


def repeated(x, batch):
    """`x` filled up to `batch` images with its last one."""
    import numpy as np

    return np.concatenate([x] + [x[-1:]] * (batch - len(x))) if len(x) < batch else np.array(x)


# --- bench ------------------------------------------------------------------------------------------------------------


def bench(job, out):
    """Time single calls in randomised interleaved blocks; write `samples.npz` (ns, block, model), in order of time."""
    import numpy as np

    protocol, images = job["protocol"], read_inputs(job)
    chosen = np.linspace(0, len(images) - 1, min(len(images), ROTATED)).astype(int)
    inputs = [np.array(images[i : i + 1]) for i in chosen]
    sessions, facts = [], []
    for model in job["models"]:
        session, fact = open_model(job, model, images)
        if session.batch not in (None, 1):
            raise Problem(
                "`%s` has a fixed batch of %d" % (model["name"], session.batch),
                "calls are timed with one image: export it with a batch of 1, or a dynamic one",
            )
        sessions.append(session)
        facts.append(fact)
    before = counters()
    for number, (session, fact) in enumerate(zip(sessions, facts)):
        emit({"progress": 0, "of": protocol["blocks"], "note": "warm-up %d of %d" % (number + 1, len(sessions))})
        fact["warmup"] = warm_up(session, inputs, protocol)
    random = np.random.RandomState(protocol["seed"])
    ns, block, which = [], [], []
    for number in range(protocol["blocks"]):
        for index in random.permutation(len(sessions)).tolist():
            if job["threads"] != 1:
                settle()
            first = number * protocol["calls"]  # all models of a round see the same inputs
            ns += timed_block(sessions[index], inputs, first, protocol["calls"])
            block += [number] * protocol["calls"]
            which += [index] * protocol["calls"]
        emit({"progress": number + 1, "of": protocol["blocks"]})
    samples = {
        "ns": np.array(ns, np.int64),
        "block": np.array(block, np.int32),
        "model": np.array(which, np.int32),  # counts into names
        "names": np.array([str(model["name"]) for model in facts]),
    }
    replace(os.path.join(out, "samples.npz"), lambda stream: np.savez(stream, **samples))
    return {
        "machine": machine(),
        "conditions": conditions(before, counters()),
        "runtime": sessions[0].facts(),
        "protocol": protocol,
        "models": facts,
    }


def timed(session, inputs, first, calls):
    """Nanoseconds of `calls` calls. The next input is taken outside of the timed region."""
    times = [0] * calls
    for i in range(calls):
        x = inputs[(first + i) % len(inputs)]
        start = now_ns()
        session.run(x)
        times[i] = now_ns() - start
    return times


def settle():
    """Wait until the worker threads of the previous model sleep: while they spin they hold a core."""
    for _ in range(SETTLES):
        before = time.process_time()
        time.sleep(SETTLE_S)
        if time.process_time() - before < SETTLE_S / 10:
            return


def timed_block(session, inputs, first, calls):
    gc.collect()
    gc.disable()
    try:
        timed(session, inputs, first - DISCARDED, DISCARDED)
        return timed(session, inputs, first, calls)
    finally:
        gc.enable()


def warm_up(session, inputs, protocol):
    """Run until fast: enough calls, enough seconds, and medians that no longer move; or until the cap."""
    started, calls, medians = now_ns(), 0, []
    while True:
        times = timed(session, inputs, calls, WARMUP_BLOCK)
        calls += WARMUP_BLOCK
        medians = medians[-2:] + [sorted(times)[WARMUP_BLOCK // 2]]
        seconds = (now_ns() - started) / 1e9
        steady = len(medians) == 3 and max(medians) <= STEADY * min(medians)
        enough = calls >= protocol["warmup_calls"] and seconds >= protocol["warmup_s"]
        if enough and (steady or seconds >= WARMUP_CAP * protocol["warmup_s"]):
            return {"calls": calls, "seconds": seconds, "steady": steady}


# --- the machine ------------------------------------------------------------------------------------------------------


def machine():
    """What this machine is. What cannot be read is null, or `unknown`."""
    fields = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    board = read("/proc/device-tree/model").strip("\0")
    present = set(fields.get("flags", fields.get("Features", "")).split())
    memory = [line.split()[1] for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    return {
        "processor": fields.get("model name") or board or platform.processor() or platform.machine(),
        "flags": [flag for flag in TELLING if flag in present],
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": cpu_quota(),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "memory_gib": round(int(memory[0]) / 2.0**20, 1) if memory else 0.0,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_quota():
    """Cores' worth of time that the control group allows, or None without a limit."""
    words = read("/sys/fs/cgroup/cpu.max").split()
    if not words:  # version 1
        words = [read("/sys/fs/cgroup/cpu/cpu.cfs_%s_us" % word) for word in ("quota", "period")]
    return int(words[0]) / int(words[1]) if words[0].isdigit() and int(words[1]) else None


def counters():
    """Clocks to subtract: this process's own seconds, and those of the whole machine."""
    lines = read("/proc/stat").splitlines()
    ticks = [int(word) for word in lines[0].split()[1:9]] if lines else [0] * 8
    throttled = read("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count")
    return {
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "total": sum(ticks),
        "busy": sum(ticks) - ticks[3] - ticks[4] - ticks[7],  # without idle, waiting for disks, stolen
        "steal": ticks[7],
        "own": sum(os.times()[:2]) * (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100),
        "throttled": int(throttled) if throttled.isdigit() else None,
    }


def conditions(before, after):
    """What else went on meanwhile. Percentages are of all processor time; null where it cannot be read."""
    moved = {key: after[key] - before[key] for key in ("total", "busy", "steal", "own")}
    share = 100.0 / moved["total"] if moved["total"] else None
    return {
        "load_before": before["load"],
        "load_after": after["load"],
        "others_percent": share and max(0.0, share * (moved["busy"] - moved["own"])),
        "steal_percent": share and share * moved["steal"],
        "throttled": None if before["throttled"] is None else after["throttled"] - before["throttled"],
    }


def read(path):
    """The text of a file of the system, or nothing where there is none."""
    try:
        with open(path) as stream:
            return stream.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def doctor():
    """Print what this machine is, and what it lacks with the remedy. Exit code 1 if something is missing."""
    versions, missing = {}, []
    for package in ["numpy"] + [runtime.package for runtime in RUNTIMES.values()]:
        try:
            versions[package] = __import__(package).__version__
        except ImportError as error:
            hint = "%s -m pip install %s" % (sys.executable, package)
            missing.append({"package": package, "error": first_line(error), "hint": hint})
    print(json.dumps({"machine": machine(), "versions": versions, "missing": missing}, indent=2))
    return 1 if missing else 0


# --- jobs -------------------------------------------------------------------------------------------------------------


def read_job(path, timing):
    """The job, checked; its paths are relative to its own folder."""
    try:
        with open(path) as stream:
            job = json.load(stream)
    except (OSError, ValueError) as error:
        raise Problem("the job `%s` cannot be read: %s" % (path, error), "give a JSON file; README.md shows one")
    need(job, "the job", {"runtime": str, "threads": int, "models": list, "inputs": str})
    if job["runtime"] not in RUNTIMES:
        raise Problem("this runner has no runtime `%s`" % job["runtime"], "known: %s" % ", ".join(sorted(RUNTIMES)))
    if not job["models"]:
        raise Problem("the job names no model", "give at least one in `models`")
    home = os.path.dirname(os.path.abspath(path))
    job["inputs"] = os.path.join(home, job["inputs"])
    for model in job["models"]:
        need(model, "a model of the job", {"name": str, "path": str})
        model["path"] = os.path.join(home, model["path"])
        if not os.path.isfile(model["path"]):
            raise Problem("`%s` is not there: %s" % (model["name"], model["path"]), "check `models` in the job")
    if timing:
        need(job, "the job", {"protocol": dict})
        numbers = {"warmup_s": (int, float), "warmup_calls": int, "blocks": int, "calls": int, "seed": int}
        need(job["protocol"], "the protocol", numbers)
        if min(job["protocol"]["blocks"], job["protocol"]["calls"]) < 1:
            raise Problem("the protocol times no call", "give at least 1 for blocks and for calls")
    return job


def need(found, what, kinds):
    for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise Problem("%s has no proper `%s`" % (what, key), "README.md shows a whole job")


def read_inputs(job):
    import numpy as np

    try:
        inputs = np.load(job["inputs"], mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Problem("the inputs cannot be read: %s" % first_line(error), "give a .npy file of float32, images first")
    if inputs.dtype != np.float32 or inputs.ndim < 2 or not len(inputs):
        found = "the inputs are %s of shape %s" % (inputs.dtype, inputs.shape)
        raise Problem(found, "give float32, (images, channels, height, width)")
    return inputs


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def replace(path, write):
    """Write a file whole or not at all."""
    with open(path + ".tmp", "wb") as stream:
        write(stream)
    os.replace(path + ".tmp", path)


def emit(line):
    print(json.dumps(line))
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    commands.add_parser("doctor")
    for name in ("answer", "bench"):
        command = commands.add_parser(name)
        command.add_argument("--job", required=True)
        command.add_argument("--out", required=True)
    chosen = parser.parse_args()
    if chosen.command == "doctor":
        return doctor()
    try:
        job = read_job(chosen.job, timing=chosen.command == "bench")
        os.makedirs(chosen.out, exist_ok=True)
        result = {"answer": answer, "bench": bench}[chosen.command](job, chosen.out)
        text = json.dumps(result, indent=2).encode()
        # last: a result is there only when all else is
        replace(os.path.join(chosen.out, "result.json"), lambda stream: stream.write(text))
    except ImportError as error:
        emit({"error": first_line(error), "hint": "`%s doctor` says what is missing" % sys.argv[0]})
        return 1
    except Problem as problem:
        emit({"error": problem.error, "hint": problem.hint})
        return problem.code
    except OSError as error:  # from numpy often without a number or the file's name
        emit({"error": first_line(error), "hint": "check the free space and your rights in `%s`" % chosen.out})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
