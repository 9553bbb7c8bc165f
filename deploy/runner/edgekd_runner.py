"""Runs models on the machine that it stands on: their answers to inputs, and the time that every call takes.

    python3 edgekd_runner.py doctor                             what this machine is, and what it lacks
    python3 edgekd_runner.py answer --job job.json --out DIR    logits of every model to all inputs
    python3 edgekd_runner.py bench --job job.json --out DIR     nanoseconds of every timed call
    python3 edgekd_runner.py start --job job.json --out DIR     cold starts and memory, in fresh processes

and on a bundle, a folder with models, inputs and expected answers, one after the other:

    python3 edgekd_runner.py doctor|build|verify|bench|energy|collect --bundle DIR [--out DIR]

One file, in Python 3.6 syntax, that needs numpy and one runtime: a host starts it as a child process, on a board
it is copied over SSH, so that all numbers come from the same loop. README.md says what a job and a bundle look like.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

WARMUP_BLOCK = 20  # calls; medians of blocks are compared
STEADY = 1.02  # three consecutive medians this close together end a warm-up
WARMUP_CAP = 5  # a warm-up gives up after this many times its minimum
DISCARDED = 3  # calls after each switch of models: caches, branch predictors
SETTLE_S, SETTLES = 0.01, 50  # worker threads spin on after a call: 20 to 50 ms were seen in ONNX Runtime 1.31
COMPUTE_CALLS = 200  # whose kernels are timed by the GPU's own clock
ROTATED = 64  # inputs at most that timed calls go through
FEWEST = 4  # of them, where calls are of many images
BURST_S = 0.2  # at least, that a block of calls with several under way takes
IDLE_S = 0.002  # before a call is due, sleeping becomes spinning: a sleep ends some tens of microseconds late
PROBES = 1000  # calls of nothing, that tell what the loop itself takes
STARTS = 6  # of each model: the range of 6 holds the median with 97 %
CHUNK = 64  # images per answer call of a model with a dynamic batch
SCHEMA = 1  # of bundles and results
PATIENCE_S = 3  # that a child has to end
TEXT = {"encoding": "utf-8", "errors": "replace"}  # of other programs; shells over SSH often have no locale
ROOT = "/"  # of the file systems of the kernel, /sys and /proc
COPY_AGAIN = "copy the bundle again, whole; results on this machine stay valid"
FOR_THIS = "make the bundle again for this device's JetPack: `edgekd build --jetpack ...`"
MEMORY = "close other programs, stop the desktop (`sudo init 3`), add 4 to 8 GB of swap; the same command goes on"
MOVED = "an engine runs only where it was built: run `build` again on this machine"
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

    def __init__(self, job, model, shape):
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # its errors share no parent but Exception
        kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self.errors = tuple(kinds) + (RuntimeError, ValueError)
        options = onnxruntime.SessionOptions()
        self.callers = job["threads"] if job.get("protocol", {}).get("throughput") else 1  # threads of one call each
        options.intra_op_num_threads = job["threads"] // self.callers
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        spinning = "1" if job.get("protocol", {}).get("spinning", True) else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        try:
            self.session = onnxruntime.InferenceSession(model["path"], options, providers=["CPUExecutionProvider"])
        except self.errors as error:
            raise Problem("onnxruntime %s: %s" % (onnxruntime.__version__, first_line(error)), UNREADABLE, 1)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            found = ", ".join("%s %s" % (i.name, i.type) for i in inputs)
            raise Problem("it takes %s" % (found or "no input"), "give models with one float32 input")
        self.name = inputs[0].name
        self.shape = [size if isinstance(size, int) else None for size in inputs[0].shape]  # None: dynamic

    def run(self, x):
        """What everybody types. It reads `x` where it lies, and gives out the memory that it wrote to: no copies."""
        return self.session.run(None, {self.name: x})

    def bound(self, x):
        """What comes before a call, and a call that computes from where `x` lies into memory that is there already."""
        import numpy as np
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        places = [OrtValue.ortvalue_from_numpy(np.array(array)) for array in [x] + self.run(x)]
        binding.bind_ortvalue_input(self.name, places[0])
        for output, place in zip(self.session.get_outputs(), places[1:]):
            binding.bind_ortvalue_output(output.name, place)
        self.places = getattr(self, "places", []) + places  # which a binding does not keep alive
        return nothing, functools.partial(self.session.run_with_iobinding, binding)

    def burst(self, inputs, calls):
        """That many calls, from as many Python threads at once as there are threads."""
        if self.callers == 1:
            for i in range(calls):
                self.run(inputs[i % len(inputs)])
            return
        numbers = itertools.count()  # taking the next one is atomic

        def work():
            for i in iter(lambda: next(numbers), None):
                if i >= calls:
                    return
                self.run(inputs[i % len(inputs)])

        callers = [threading.Thread(target=work) for _ in range(self.callers)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    def facts(self):
        import onnxruntime

        options = self.session.get_session_options()
        return {
            "name": self.package,
            "version": onnxruntime.__version__,
            "threads": options.intra_op_num_threads * self.callers,
            "providers": self.session.get_providers(),
            "graph_optimisation": str(options.graph_optimization_level).rpartition(".")[2],
            "spinning": options.get_session_config_entry("session.intra_op.allow_spinning") == "1",
        }

    def computes_in(self):
        return "fp32"  # its processor kernels compute floats as the file says

    def in_force(self):
        return {"precision": self.computes_in(), "under_way": self.callers}


class OpenVino:
    """One model in OpenVINO on the processor, with a fixed shape: a dynamic batch becomes 1."""

    package = "openvino"
    precisions = {"f32": "fp32", "f16": "fp16"}  # what the runtime calls otherwise

    def __init__(self, job, model, shape):
        import openvino

        self.errors = (RuntimeError, ValueError)
        self.version = openvino.__version__.partition("-")[0]
        throughput = job.get("protocol", {}).get("throughput")
        self.options = {
            "PERFORMANCE_HINT": "THROUGHPUT" if throughput else job.get("hint", "latency").upper(),
            "INFERENCE_NUM_THREADS": job["threads"],
        }
        if model.get("precision", "fp32") == "fp32":  # else processors that have bf16 compute in that
            self.options["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            self.core = openvino.Core()
            self.model = self.core.read_model(model["path"])
            self.shape = self.fixed([job.get("batch", 1)] + shape)
            self.compiled, self.compile_ms = self.compile()
            self.request = self.compiled.create_infer_request()
            self.input = self.request.get_input_tensor().data  # its own memory, which a call writes to
            self.queue = openvino.AsyncInferQueue(self.compiled) if throughput else None  # of as many as it advises
        except self.errors as error:
            raise Problem("openvino %s: %s" % (self.version, root_cause(error)), UNREADABLE, 1)

    def fixed(self, shape):
        """Give the model its only shape, that of a call's input; the sizes in the file where it has them."""
        inputs = self.model.inputs
        kinds = [i.get_element_type().get_type_name() for i in inputs]
        if kinds != ["f32"]:
            raise Problem("it takes %s" % (", ".join(kinds) or "no input"), "give models with one float32 input")
        found = inputs[0].get_partial_shape()
        sizes = [size.get_length() if size.is_static else None for size in found]
        if None in sizes and len(sizes) == len(shape):
            sizes = [given if size is None else size for size, given in zip(sizes, shape)]
            self.model.reshape(sizes)
        return sizes

    def compile(self, folder=None):
        """The model ready to run, and the milliseconds that took; `folder` keeps it for the next time."""
        options = dict(self.options, **({"CACHE_DIR": folder} if folder else {}))
        started = now_ns()
        compiled = self.core.compile_model(self.model, "CPU", options)
        return compiled, (now_ns() - started) / 1e6

    def run(self, x):
        """Copies the input into the runtime's memory, and the outputs out of it into new arrays."""
        self.input[...] = x
        return self.request.infer()

    def bound(self, x):
        """What comes before a call, and a call on what is in the runtime's memory, where its outputs stay, too.

        Tensors that share the memory of `x` would do as well, but each change of them costs some microseconds.
        """
        return functools.partial(self.place, x), functools.partial(self.request.infer, share_outputs=True)

    def place(self, x):
        self.input[...] = x

    def burst(self, inputs, calls):
        """That many calls, as many at once as the runtime advises."""
        for i in range(calls):
            self.queue.start_async({0: inputs[i % len(inputs)]})
        self.queue.wait_all()

    def facts(self):
        read_back = self.compiled.get_property
        return {
            "name": self.package,
            "version": self.version,
            "threads": read_back("INFERENCE_NUM_THREADS"),
            "streams": read_back("NUM_STREAMS"),
            "pinned": read_back("ENABLE_CPU_PINNING"),
            "hint": str(read_back("PERFORMANCE_HINT")).rpartition(".")[2].lower(),
        }

    def computes_in(self):
        precision = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return self.precisions.get(precision, precision)

    def in_force(self):
        found = {"precision": self.computes_in(), "compile_ms": self.compile_ms}
        if self.queue:
            found["under_way"] = len(self.queue)
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.compile(folder)
                compiled, took_ms = self.compile(folder)
            except self.errors as error:
                where = "openvino keeps no compiled model in `%s`: %s" % (folder, root_cause(error))
                raise Problem(where, "free some space there, or set TMPDIR to another folder", 1)
            if compiled.get_property("LOADED_FROM_CACHE"):
                found["cached_compile_ms"] = took_ms
        return found


UNREADABLE = "check the file with `onnx.checker`; a newer opset or IR than the runtime knows needs a new export"


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def root_cause(error):
    """What an error of OpenVINO comes down to, after all places in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    start = lines.index("Summary:") + 1 if "Summary:" in lines else -1
    return "; ".join(line.lstrip("- ") for line in lines[start:])


def open_model(job, model, inputs):
    """The model in its runtime, with how long loading and the first call took."""
    given, runtime = list(inputs.shape[1:]), RUNTIMES[job["runtime"]]
    __import__(runtime.package)  # no part of loading a model
    started = now_ns()
    try:
        session = runtime(job, model, given)
    except Problem as problem:
        raise Problem("`%s`: %s" % (model["name"], problem.error), problem.hint, problem.code)
    load_ms = (now_ns() - started) / 1e6
    shape = session.shape
    if len(shape) != inputs.ndim or any(a is not None and a != b for a, b in zip(shape[1:], given)):
        wanted = "x".join(str(size or "?") for size in shape[1:])
        raise Problem(
            "`%s` takes inputs of %s, these are %s" % (model["name"], wanted, "x".join(map(str, given))),
            "all models of a job share its inputs: give inputs of that shape, or leave the model out",
        )
    session.batch = shape[0]
    first = repeated(inputs[:1], session.batch or job.get("batch", 1))
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

    inputs, facts = read_inputs(job), []
    progress = Progress(len(inputs) * len(job["models"]))
    for index, model in enumerate(job["models"]):
        session, fact = open_model(job, model, inputs)
        logits = answers(session, model["name"], inputs, progress)
        replace(os.path.join(out, "logits-%d.npy" % index), lambda stream: np.save(stream, logits))
        facts.append(fact)
    return {"runtime": session.facts(), "models": facts}


def answers(session, name, inputs, progress):
    """(images, ...): the first output of the model for all inputs."""
    import numpy as np

    step, found = session.batch or CHUNK, []
    for start in range(0, len(inputs), step):
        x = np.array(inputs[start : start + step])
        y = ask(session, name, repeated(x, session.batch or len(x)))
        if y.ndim < 2 or len(y) < len(x):
            raise Problem(
                "`%s` answers %s with %s" % (name, x.shape, y.shape), "its first output must have a row for each image"
            )
        found.append(y[: len(x)])
        progress.add(len(x))
    return np.concatenate(found)


class Progress:
    """Says how many images are done, about once in CHUNK images."""

    def __init__(self, total, **words):
        self.done, self.total, self.words = 0, total, words

    def add(self, count):
        self.done += count
        if self.done % CHUNK < count or self.done == self.total:
            emit(dict(self.words, progress=self.done, of=self.total))


def repeated(x, batch):
    """`x` filled up to `batch` images with its last one."""
    import numpy as np

    return np.concatenate([x] + [x[-1:]] * (batch - len(x))) if len(x) < batch else np.array(x)


# --- bench ------------------------------------------------------------------------------------------------------------


def bench(job, out):
    """Time calls in randomised interleaved blocks; write `samples.npz` (ns, block, model), in order of time.

    A call holds what the job's scope says, and is timed alone; with a `rate` from when it was due, whether or not the
    call before it was over; with `throughput`, whole blocks of calls are timed, several of them under way at once.
    """
    protocol, images = job["protocol"], read_inputs(job)
    sessions, facts = open_timed(job, job["models"], images)
    calls, before = [calls_of(job, session, images) for session in sessions], counters()
    warm_up_all(sessions, calls, facts, protocol)
    served = [index for index, fact in enumerate(facts) if fits(fact, protocol)]
    blocks, rows = block_of(job, sessions, facts, calls, images), []
    for number, order in enumerate(orders(len(sessions), protocol)):
        rows += one_round(job, blocks, [index for index in order if index in served], number)
        emit({"progress": number + 1, "of": protocol["blocks"]})
    save_samples(out, facts, rows)
    return {
        "machine": machine(),
        "conditions": conditions(before, counters()),
        "runtime": sessions[0].facts(),
        "protocol": protocol,
        "models": facts,
        "overhead_ns": overhead_ns(),
    }


def open_timed(job, models, images):
    """Sessions that take the images of one call, and what is known of each."""
    sessions, facts, batch = [], [], job.get("batch", 1)
    for model in models:
        session, fact = open_model(job, model, images)
        if session.batch not in (None, batch):
            wanted = "one image" if batch == 1 else "%d images" % batch
            raise Problem(
                "`%s` has a fixed batch of %d" % (model["name"], session.batch),
                "calls are timed with %s: give a file with a batch of %d, or a dynamic one" % (wanted, batch),
            )
        sessions.append(session)
        facts.append(dict(fact, **session.in_force()))
    return sessions, facts


def rotation(images, batch=1):
    """The inputs of timed calls, (batch, C, H, W) each, from all over the images."""
    import numpy as np

    count = max(min(len(images), ROTATED) // batch, FEWEST if batch > 1 else 1)
    chosen = np.linspace(0, len(images) - 1, count * batch).astype(int)
    return [np.array(images[chosen[i::count]]) for i in range(count)]


def calls_of(job, session, images):
    """For each of the inputs that are rotated: what comes before a call, untimed, and the call, as the scope has it."""
    inputs, scope = rotation(images, job.get("batch", 1)), job.get("scope", "copies")
    if scope == "model":
        return [session.bound(x) for x in inputs]
    if scope == "preprocessing":
        return [(nothing, from_pictures(session, x, job.get("scale", {}))) for x in inputs]
    return [(nothing, functools.partial(session.run, x)) for x in inputs]


def nothing():
    pass


def from_pictures(session, x, scale):
    """A call from pictures, (batch, H, W, C) uint8, to the class of each and its probability.

    The pictures are `x` before it was scaled. Other answers than (batch, classes) stay as they are.
    """
    import numpy as np

    mean, std = (np.array(scale.get(key, usual), np.float32) for key, usual in (("mean", 0), ("std", 1)))
    if x.ndim != 4 or mean.size not in (1, x.shape[1]) or std.size not in (1, x.shape[1]):
        found = "inputs of %s cannot be made from pictures with that scale" % "x".join(map(str, x.shape[1:]))
        raise Problem(found, "the scope preprocessing needs channels, height, width, and a scale for each channel")
    pictures = np.clip(np.rint((x.transpose(0, 2, 3, 1) * std + mean) * 255), 0, 255).astype(np.uint8)

    def call():
        scaled = (pictures.astype(np.float32) / np.float32(255) - mean) / std
        y = session.run(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))[0]
        if y.ndim != 2:
            return y
        odds = np.exp(y - y.max(1, keepdims=True))
        shares = odds / odds.sum(1, keepdims=True)
        return shares.argmax(1), shares.max(1)

    return call


def warm_up_all(sessions, calls, facts, protocol):
    for number, (session, own, fact) in enumerate(zip(sessions, calls, facts)):
        emit({"progress": 0, "of": protocol["blocks"], "note": "warm-up %d of %d" % (number + 1, len(facts))})
        try:
            fact["warmup"] = warm_up(own, protocol)
        except session.errors as error:
            raise Problem("`%s` does not run again and again: %s" % (fact["name"], first_line(error)), UNREADABLE, 1)


def fits(fact, protocol):
    """Whether a model can be called at the rate that is asked for; one that cannot would wait for ever longer."""
    return not protocol.get("rate") or protocol["rate"] * fact["warmup"]["median_ns"] < 1e9


def orders(models, protocol):
    """The random order of the models in every round; the same seed gives the same."""
    import numpy as np

    random = np.random.RandomState(protocol["seed"])
    return [random.permutation(models).tolist() for _ in range(protocol["blocks"])]


def block_of(job, sessions, facts, calls, images):
    """How a block of a model goes: a function of the model and of the first call's number, which gives the rows of its
    calls, (nanoseconds, nanoseconds that it began late)."""
    protocol = job["protocol"]
    if protocol.get("throughput"):
        inputs = rotation(images, job.get("batch", 1))
        for session, fact in zip(sessions, facts):
            few = protocol["calls"] * fact["under_way"]
            spent = min(burst_ns(session, inputs, few) for _ in range(2))
            fact["calls"] = max(few, int(BURST_S * 1e9 * few / spent))
        return lambda index, first: [(burst_ns(sessions[index], inputs, facts[index]["calls"]), 0)]
    if protocol.get("rate"):
        return lambda index, first: in_block(calls[index], first, protocol["calls"], protocol["rate"])
    return lambda index, first: [(ns, 0) for ns in in_block(calls[index], first, protocol["calls"])]


def one_round(job, block, order, number):
    """Of the calls of every model, in order of time: (nanoseconds, nanoseconds late, round, model)."""
    rows = []
    for index in order:
        if job["threads"] != 1:
            settle()
        first = number * job["protocol"]["calls"]  # all models of a round see the same inputs
        rows += [(ns, late, number, index) for ns, late in block(index, first)]
    return rows


def save_samples(out, facts, rows, **more):
    """`samples.npz`; a `model` counts into `names`."""
    import numpy as np

    ns, late, block, model = np.array(rows, np.int64).reshape(-1, 4).T
    samples = {"ns": ns, "late_ns": late, "block": block.astype(np.int32), "model": model.astype(np.int32)}
    samples["names"] = np.array([str(model["name"]) for model in facts])
    samples.update(more)
    replace(os.path.join(out, "samples.npz"), lambda stream: np.savez(stream, **samples))


def timed(calls, first, count):
    """Nanoseconds of `count` calls. What comes before each is outside of the timed region."""
    times = [0] * count
    for i in range(count):
        place, call = calls[(first + i) % len(calls)]
        place()
        start = now_ns()
        call()
        times[i] = now_ns() - start
    return times


def at_rate(calls, first, count, rate):
    """`count` calls that are due at a fixed rate: nanoseconds from when each was due to its end, and those that it
    began late because the call before it was not over."""
    found, step, origin = [], 1e9 / rate, now_ns() + int(IDLE_S * 1e9)
    for i in range(count):
        (place, call), due = calls[(first + i) % len(calls)], origin + int(i * step)
        begun = now_ns()
        place()
        late = max(begun - due, 0) if i else 0
        if due - begun > 2e9 * IDLE_S:
            time.sleep((due - begun) / 1e9 - IDLE_S)
        while now_ns() < due:
            pass
        call()
        found.append((now_ns() - due, late))
    return found


def settle():
    """Wait until the worker threads of the previous model sleep: while they spin they hold a core."""
    for _ in range(SETTLES):
        before = time.process_time()
        time.sleep(SETTLE_S)
        if time.process_time() - before < SETTLE_S / 10:
            return


def in_block(calls, first, count, rate=None):
    """The calls of a block, after some that do not count, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        timed(calls, first - DISCARDED, DISCARDED)
        return at_rate(calls, first, count, rate) if rate else timed(calls, first, count)
    finally:
        gc.enable()


def burst_ns(session, inputs, calls):
    """Nanoseconds of all calls together."""
    gc.collect()
    gc.disable()
    try:
        session.burst(inputs, DISCARDED)
        start = now_ns()
        session.burst(inputs, calls)
        return now_ns() - start
    finally:
        gc.enable()


def overhead_ns():
    """What the loop itself adds to a call: the median time of calls of nothing."""
    return sorted(in_block([(nothing, nothing)], 0, PROBES))[PROBES // 2]


def warm_up(calls, protocol):
    """Run until fast: enough calls, enough seconds, and medians that no longer move; or until the cap."""
    started, count, medians = now_ns(), 0, []
    while True:
        times = timed(calls, count, WARMUP_BLOCK)
        count += WARMUP_BLOCK
        medians = medians[-2:] + [sorted(times)[WARMUP_BLOCK // 2]]
        seconds = (now_ns() - started) / 1e9
        steady = len(medians) == 3 and max(medians) <= STEADY * min(medians)
        enough = count >= protocol["warmup_calls"] and seconds >= protocol["warmup_s"]
        if enough and (steady or seconds >= WARMUP_CAP * protocol["warmup_s"]):
            return {
                "calls": count,
                "seconds": seconds,
                "steady": steady,
                "median_ns": sorted(medians)[len(medians) // 2],
            }


# --- start: how long until the first answer, and how much memory that took --------------------------------------------


def start(job, out):
    """Open every model in a fresh process, some times each by turns; and as often a process with the runtime alone."""
    work = [list(range(-1, len(job["models"]))) for _ in range(STARTS)]
    seen, before, total = [[] for _ in range(len(job["models"]) + 1)], counters(), STARTS * (len(job["models"]) + 1)
    for number, order in enumerate(work):
        for place in range(len(order)):
            index = order[(place + number) % len(order)]  # each once first, once last: no need for numpy in here
            words = ["_start", "--job", job["path"], "--out", out, "--model", str(index)]
            seen[index].append(spawned(words))
            emit({"progress": sum(map(len, seen)), "of": total})
    facts, bare = [], seen[-1]
    for model, starts in zip(job["models"], seen):
        file = {"name": model["name"], "sha256": sha256(model["path"]), "bytes": os.path.getsize(model["path"])}
        facts.append(dict(file, precision=starts[0].pop("precision"), starts=[one["start"] for one in starts]))
    found = {"machine": machine(), "conditions": conditions(before, counters()), "runtime": seen[0][0]["runtime"]}
    return dict(found, models=facts, runtime_only=[one["start"] for one in bare])


def start_one(job, out, index):
    """One cold start, in this process; -1: of the runtime alone. Milliseconds, and the peak of this process in KiB."""
    package = RUNTIMES[job["runtime"]].package
    begun, images = now_ns(), read_inputs(job)
    __import__(package)
    found = {"import_ms": (now_ns() - begun) / 1e6}
    if index < 0:
        return {"start": dict(found, peak_kib=peak_kib())}
    session, fact = open_model(job, job["models"][index], images)
    found.update({key: fact[key] for key in ("load_ms", "first_ms")}, peak_kib=peak_kib())
    if job["runtime"] == "openvino":
        found["compile_ms"] = session.compile_ms  # a part of load_ms
    return {"start": found, "runtime": session.facts(), "precision": session.computes_in()}


def peak_kib():
    """Of this process alone: getrusage would count its parent's memory, too."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", read("/proc/self/status"))
    return int(peak.group(1)) if peak else None


# --- CUDA: the functions of libcudart that are needed, through ctypes -------------------------------------------------

POINTER = ctypes.POINTER
HANDLE, HANDLES, NUMBER = ctypes.c_void_p, POINTER(ctypes.c_void_p), POINTER(ctypes.c_int)
# without these types a 64-bit address would be passed as a 32-bit number
CUDA = {
    "cudaGetDeviceCount": [NUMBER],
    "cudaDeviceGetAttribute": [NUMBER, ctypes.c_int, ctypes.c_int],
    "cudaRuntimeGetVersion": [NUMBER],
    "cudaDriverGetVersion": [NUMBER],
    "cudaMemGetInfo": [POINTER(ctypes.c_size_t), POINTER(ctypes.c_size_t)],
    "cudaSetDeviceFlags": [ctypes.c_uint],
    "cudaMalloc": [HANDLES, ctypes.c_size_t],
    "cudaMallocHost": [HANDLES, ctypes.c_size_t],
    "cudaMemcpyAsync": [HANDLE, HANDLE, ctypes.c_size_t, ctypes.c_int, HANDLE],
    "cudaStreamCreateWithFlags": [HANDLES, ctypes.c_uint],
    "cudaStreamSynchronize": [HANDLE],
    "cudaStreamBeginCapture": [HANDLE, ctypes.c_int],
    "cudaStreamEndCapture": [HANDLE, HANDLES],
    "cudaGraphInstantiateWithFlags": [HANDLES, HANDLE, ctypes.c_ulonglong],  # from CUDA 11.4, the same ever since
    "cudaGraphLaunch": [HANDLE, HANDLE],
    "cudaEventCreate": [HANDLES],
    "cudaEventRecord": [HANDLE, HANDLE],
    "cudaEventSynchronize": [HANDLE],
    "cudaEventElapsedTime": [POINTER(ctypes.c_float), HANDLE, HANDLE],
}
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
SPIN, BLOCKING_SYNC = 1, 4  # cudaDeviceScheduleSpin, cudaDeviceScheduleBlockingSync
NON_BLOCKING, THREAD_LOCAL = 1, 1  # cudaStreamNonBlocking, cudaStreamCaptureModeThreadLocal
CAPABILITY = (75, 76)  # cudaDevAttrComputeCapabilityMajor, ...Minor


class CudaFailure(Problem):
    pass


class Cuda:
    """libcudart, its functions by their names without `cuda`. A call that fails raises CudaFailure."""

    def __init__(self):
        self.cudart = load_cudart()
        self.cudart.cudaGetErrorString.argtypes = [ctypes.c_int]
        self.cudart.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        try:
            function = getattr(self.cudart, name)
        except AttributeError:
            raise CudaFailure("this CUDA has no %s" % name, "use the CUDA of this device's JetPack", 1)
        function.argtypes, function.restype = CUDA[name], ctypes.c_int
        code = function(*arguments)
        if code:
            words = self.cudart.cudaGetErrorString(code).decode()
            raise CudaFailure("%s: CUDA error %d, %s" % (name, code, words), "run `doctor`; reboot if it stays", 1)

    def number(self, name, *arguments, kind=ctypes.c_int):
        """What a function writes to its first argument."""
        found = kind()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def handle(self, name, *arguments):
        return self.number(name, *arguments, kind=ctypes.c_void_p)

    def free_bytes(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def device(self):
        """What engines depend on. Raises CudaFailure without a GPU or a driver."""
        if not self.number("cudaGetDeviceCount"):
            raise CudaFailure("CUDA finds no GPU", "run this on the device; in a container, `--runtime nvidia`", 1)
        versions = [self.number("cuda%sGetVersion" % kind) for kind in ("Runtime", "Driver")]
        return {
            "gpu": gpu_name(),
            "sm": "%d.%d" % tuple(self.number("cudaDeviceGetAttribute", a, 0) for a in CAPABILITY),
            "cuda": "%d.%d" % (versions[0] // 1000, versions[0] % 1000 // 10),
            "cuda_driver": "%d.%d" % (versions[1] // 1000, versions[1] % 1000 // 10),
        }


def load_cudart():
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":") + ["/usr/local/cuda/lib64"]
    folders += [found for place in sys.path for found in glob.glob(os.path.join(place, "nvidia", "*", "lib"))]  # wheels
    names = [
        found for folder in folders if folder for found in sorted(glob.glob(os.path.join(folder, "libcudart.so*")))
    ]
    for name in names + ["libcudart.so" + end for end in ("", ".13", ".12", ".11.0", ".10.2")]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaFailure("libcudart is not found", "install CUDA (on a Jetson: `sudo apt install nvidia-jetpack`)", 1)


def gpu_name():
    """Of a Jetson its board; else what the driver tells."""
    for path in found_at("/proc/driver/nvidia/gpus/*/information"):
        for line in read(path).splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return read(at("/proc/device-tree/model")).strip("\0") or "unknown"


# --- TensorRT: sessions -----------------------------------------------------------------------------------------------

NO_INT8 = ("5.3", "6.2")  # GPUs of Nano, TX1, TX2


def import_tensorrt():
    """The module is named as a text: without a driver, loading it can end the process, so only children do."""
    return __import__("tensorrt")


def listener(trt):
    """A logger that keeps the last warnings and errors; they go to stderr too, should the process crash."""

    class Listener(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.warnings, self.errors = [], []

        def log(self, severity, msg):
            if int(severity) <= int(trt.ILogger.WARNING):
                kept = self.warnings if int(severity) == int(trt.ILogger.WARNING) else self.errors
                kept.append(msg)
                del kept[:-20]
                sys.stderr.write("%s\n" % msg)
                sys.stderr.flush()

        def words(self):
            return "; ".join(self.errors[-3:]) or "TensorRT gives no reason"

    made = Listener()
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(made, "")
    return made


class Bindings:
    """Inputs and outputs by number: TensorRT up to 8.4."""

    def __init__(self, trt, engine, context):
        self.engine, self.context = engine, context
        self.names = [engine.get_binding_name(i) for i in range(engine.num_bindings)]
        self.addresses = [0] * len(self.names)

    def is_input(self, name):
        return self.engine.binding_is_input(self.names.index(name))

    def dtype(self, name):
        return self.engine.get_binding_dtype(self.names.index(name))

    def input_shape(self, name):
        return tuple(self.engine.get_binding_shape(self.names.index(name)))

    def set_shape(self, name, shape):
        self.context.set_binding_shape(self.names.index(name), shape)

    def output_shape(self, name):
        return tuple(self.context.get_binding_shape(self.names.index(name)))

    def bind(self, name, address):
        self.addresses[self.names.index(name)] = address

    def enqueue(self, stream):
        return self.context.execute_async_v2(self.addresses, stream)


class Tensors:
    """Inputs and outputs by name: TensorRT from 8.5."""

    def __init__(self, trt, engine, context):
        self.engine, self.context, self.input = engine, context, trt.TensorIOMode.INPUT
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def is_input(self, name):
        return self.engine.get_tensor_mode(name) == self.input

    def dtype(self, name):
        return self.engine.get_tensor_dtype(name)

    def input_shape(self, name):
        return tuple(self.engine.get_tensor_shape(name))

    def set_shape(self, name, shape):
        self.context.set_input_shape(name, shape)

    def output_shape(self, name):
        return tuple(self.context.get_tensor_shape(name))

    def bind(self, name, address):
        self.context.set_tensor_address(name, address)

    def enqueue(self, stream):
        return self.context.execute_async_v3(stream)


class TensorRt:
    """One engine file in TensorRT. A call copies the input, computes, copies the output and waits."""

    package = "tensorrt"
    numpy_names = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}

    def __init__(self, job, model, shape):
        trt = import_tensorrt()
        self.trt, self.cuda, self.errors = trt, Cuda(), (RuntimeError, ValueError, TypeError)
        self.told = dict(self.cuda.device(), name=self.package, version=trt.__version__, threads=job["threads"])
        self.spins = job.get("protocol", {}).get("spinning", True)
        self.cuda.call("cudaSetDeviceFlags", SPIN if self.spins else BLOCKING_SYNC)
        self.logger = listener(trt)
        self.runtime = trt.Runtime(self.logger)  # outlives the engine, as the engine its context
        if model.get("dla") is not None:
            self.runtime.DLA_core = model["dla"]
        with open(model["path"], "rb") as stream:
            self.engine = self.runtime.deserialize_cuda_engine(stream.read())
        if self.engine is None:
            raise Problem("TensorRT %s does not take the engine: %s" % (trt.__version__, self.logger.words()), MOVED, 1)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise Problem("the engine does not start: %s" % self.logger.words(), MEMORY, 1)
        self.stream = self.new_stream()
        self.io = (Tensors if hasattr(self.engine, "num_io_tensors") else Bindings)(trt, self.engine, self.context)
        self.precision, self.graph = "+".join(model.get("precisions", ["unknown"])), None
        self.allocate([1] + shape)
        self.graph_words = "not valid on a DLA" if model.get("dla") is not None else self.capture()

    def new_stream(self):
        return self.cuda.handle("cudaStreamCreateWithFlags", NON_BLOCKING)

    def allocate(self, shape):
        """Memory on both sides for the input and all outputs; `shape` stands in where the engine leaves sizes open."""
        inputs = [name for name in self.io.names if self.io.is_input(name)]
        if len(inputs) != 1:
            raise Problem("the engine takes %s" % (", ".join(inputs) or "no input"), "give models with one input")
        found = self.io.input_shape(inputs[0])
        self.shape = [new if old < 0 else old for old, new in zip(found, shape)] if len(found) == len(shape) else found
        if min(found) < 0:
            self.io.set_shape(inputs[0], tuple(self.shape))
        self.input = Buffer(self.cuda, self.shape, self.numpy_type(inputs[0]))
        outputs = [name for name in self.io.names if name not in inputs]
        self.outputs = [Buffer(self.cuda, self.io.output_shape(name), self.numpy_type(name)) for name in outputs]
        for name, buffer in zip(inputs + outputs, [self.input] + self.outputs):
            self.io.bind(name, buffer.device)

    def numpy_type(self, name):
        kind = str(self.io.dtype(name)).rpartition(".")[2]
        if kind not in self.numpy_names:
            raise Problem("`%s` of the engine is %s" % (name, kind), "export float32 inputs and outputs")
        return self.numpy_names[kind]

    def capture(self):
        """Put the kernels into a CUDA graph, which starts them with one call; why not, where that fails."""
        before = self.run(self.input.host)  # the first call allocates, which a capture cannot
        try:
            self.graph = self.captured()
            after = self.run(self.input.host)
            words = "captured" if all((a == b).all() for a, b in zip(before, after)) else "its answers differ"
        except CudaFailure as failure:
            words = failure.error
            self.stream = self.new_stream()  # a failed capture spoils its stream
        if words != "captured":
            self.graph = None
        return words

    def captured(self):
        self.cuda.call("cudaStreamBeginCapture", self.stream, THREAD_LOCAL)
        try:
            enqueued = self.io.enqueue(self.stream)
        finally:
            graph = ctypes.c_void_p()
            self.cuda.call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        if not enqueued:
            raise CudaFailure("TensorRT's kernels cannot be captured", "", 1)
        return self.cuda.handle("cudaGraphInstantiateWithFlags", graph, 0)

    def compute(self):
        if self.graph:
            self.cuda.call("cudaGraphLaunch", self.graph, self.stream)
        elif not self.io.enqueue(self.stream):
            raise RuntimeError(self.logger.words())

    def run(self, x):
        self.input.host[...] = x
        self.input.send(self.stream)
        self.compute()
        for output in self.outputs:
            output.fetch(self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return [output.host.copy() for output in self.outputs]

    def bound(self, x):
        """What comes before a call, and a call from and to the memory of the device."""
        return functools.partial(self.place, x), self.computed

    def place(self, x):
        self.input.host[...] = x
        self.input.send(self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def computed(self):
        self.compute()
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def burst(self, inputs, calls):
        raise Problem("throughput of TensorRT is not measured here", "`trtexec` tells it: `bench` on a bundle runs it")

    def compute_ms(self, calls):
        """Of each call the time that the GPU takes by its own clock, without copies."""
        first, second = (self.cuda.handle("cudaEventCreate") for _ in range(2))
        times = []
        for _ in range(calls):
            self.cuda.call("cudaEventRecord", first, self.stream)
            self.compute()
            self.cuda.call("cudaEventRecord", second, self.stream)
            self.cuda.call("cudaEventSynchronize", second)
            times.append(round(self.cuda.number("cudaEventElapsedTime", first, second, kind=ctypes.c_float), 5))
        return times

    def facts(self):
        return dict(self.told, waiting="spinning" if self.spins else "blocking", interface=type(self.io).__name__)

    def computes_in(self):
        return self.precision

    def in_force(self):
        return {"precision": self.computes_in(), "cuda_graph": self.graph_words, "under_way": 1}


class Buffer:
    """The same array twice: pinned on the host, and on the device."""

    def __init__(self, cuda, shape, kind):
        import numpy as np

        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        self.cuda, self.size = cuda, size
        self.device = cuda.handle("cudaMalloc", size)
        self.pinned = cuda.handle("cudaMallocHost", size)
        memory = (ctypes.c_byte * size).from_address(self.pinned)
        self.host = np.frombuffer(memory, kind).reshape(shape)
        self.host[...] = 0

    def send(self, stream):
        self.cuda.call("cudaMemcpyAsync", self.device, self.pinned, self.size, TO_DEVICE, stream)

    def fetch(self, stream):
        self.cuda.call("cudaMemcpyAsync", self.pinned, self.device, self.size, TO_HOST, stream)


# --- TensorRT: building -----------------------------------------------------------------------------------------------

LEVEL, FRUGAL_LEVEL = 3, 1  # of optimisation: 3 is TensorRT's own default
WORKSPACE, FRUGAL_WORKSPACE = 4 << 30, 256 << 20  # bytes at most


def recipe(trt, engine, sm, frugal):
    """By which flags an engine is built, composed of what this TensorRT has. Raises Problem where it cannot be."""
    version, wanted = trt.__version__, engine["precisions"]
    flagged = hasattr(trt.BuilderFlag, "FP16")  # gone in 11: there, precisions stand in the file only
    if "int8" in wanted and sm in NO_INT8:
        raise Problem("INT8 is not available on SM %s" % sm, "use the FP16 engine: this GPU has no INT8 products", 1)
    if engine.get("typed") and flagged and not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise Problem("TensorRT %s knows no strongly typed networks" % version, FOR_THIS, 1)
    if not engine.get("typed") and not flagged and wanted != ["fp32"]:
        raise Problem("TensorRT %s takes precisions from the file only, this one has none" % version, FOR_THIS, 1)
    if engine.get("cache") and not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise Problem("TensorRT %s reads no calibration cache" % version, FOR_THIS, 1)
    network = ["STRONGLY_TYPED"] if engine.get("typed") and flagged else []
    if int(version.split(".")[0]) < 10:
        network.append("EXPLICIT_BATCH")
    flags = [] if engine.get("typed") or not flagged else [name for name in ("FP16", "INT8") if name.lower() in wanted]
    if engine.get("dla") is not None:
        flags.append("GPU_FALLBACK")
    return {
        "network": network,
        "flags": flags,
        "level": (FRUGAL_LEVEL if frugal else LEVEL)
        if hasattr(trt.IBuilderConfig, "builder_optimization_level")
        else None,
        "dla": engine.get("dla"),
    }


def build_tensorrt(bundle, out, spec):
    """Build one engine, or take it from the cache, and run it once."""
    trt, engine = import_tensorrt(), bundle["engines"][spec["index"]]
    cuda = Cuda()
    device, frugal = cuda.device(), spec.get("frugal", False)
    steps = recipe(trt, engine, device["sm"], frugal)
    sources = [bundle["files"][name]["sha256"] for name in (engine["model"], engine["cache"]) if name]
    key = [sources, trt.__version__, device, dict(steps, level=None)]  # a frugal build is as good as the other
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    os.makedirs(os.path.join(out, "engines"), exist_ok=True)
    path = os.path.join(out, "engines", name + ".engine")
    fact = load_json(path + ".json")
    cached = fact and os.path.isfile(path) and sha256(path) == fact["engine_sha256"]
    if not cached:
        started = now_ns()
        fact = make_engine(trt, cuda, bundle, engine, steps, path, frugal)
        fact.update(build_s=(now_ns() - started) / 1e9, tensorrt=trt.__version__, device=device)
        save_json(path + ".json", fact)
    loaded = dict(engine, path=path)
    session, seen = open_model(job_of(bundle), loaded, bundle_inputs(bundle))
    fact = dict(fact, **session.in_force())
    fact.update(
        engine="engines/%s.engine" % name, cached=bool(cached), load_ms=seen["load_ms"], first_ms=seen["first_ms"]
    )
    return dict(fact, runtime=session.facts())


def make_engine(trt, cuda, bundle, engine, steps, path, frugal):
    """Parse the ONNX file, let TensorRT choose its kernels, write the engine."""
    logger = listener(trt)
    builder = trt.Builder(logger)
    if steps["dla"] is not None and builder.num_DLA_cores <= steps["dla"]:
        raise Problem("TensorRT %s finds no DLA %d here" % (trt.__version__, steps["dla"]), FOR_THIS, 1)
    bits = sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, name)) for name in steps["network"])
    network = builder.create_network(bits)
    parse(trt, network, logger, os.path.join(bundle["folder"], engine["model"]), steps)
    config = builder.create_builder_config()
    workspace = set_workspace(trt, config, cuda, frugal)
    for name in steps["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if steps["level"] is not None:
        config.builder_optimization_level = steps["level"]
    if hasattr(trt, "ProfilingVerbosity") and hasattr(trt.ProfilingVerbosity, "DETAILED"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the layer information, costs no time
    profile = only_profile(builder, config, network, bundle_inputs(bundle).shape[1:])
    calibrator = calibrate(trt, config, bundle, engine, profile)  # kept until the build ends
    on_dla = place_on_dla(trt, config, network, steps["dla"])
    timings = os.path.join(os.path.dirname(path), "timings-%s.cache" % trt.__version__)
    use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    del calibrator
    if plan is None:
        raise Problem("TensorRT built nothing: %s" % logger.words(), "run `doctor`; the log is above", 1)
    keep_timings(config, timings)
    replace(path, lambda stream: stream.write(plan))
    fact = {"recipe": steps, "workspace_mib": workspace >> 20, "frugal": frugal, "warnings": logger.warnings}
    fact.update(engine_sha256=sha256(path), engine_bytes=os.path.getsize(path), layers=layers_of(trt, logger, path))
    return dict(fact, on_dla=on_dla, tf32=tf32(trt, config))


def parse(trt, network, logger, model, steps):
    parser = trt.OnnxParser(network, logger)
    if steps["dla"] is not None and hasattr(trt, "OnnxParserFlag") and hasattr(trt.OnnxParserFlag, "ADJUST_FOR_DLA"):
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    if not parser.parse_from_file(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        words = "; ".join("node %d: %s" % (error.node(), error.desc()) for error in errors)
        raise Problem("TensorRT %s does not read the model: %s" % (trt.__version__, words), FOR_THIS, 1)
    if network.num_inputs != 1:
        raise Problem("the model has %d inputs" % network.num_inputs, "give models with one input")


def set_workspace(trt, config, cuda, frugal):
    """Half of what is free, which CPU and GPU of a Jetson share."""
    bytes_ = min(WORKSPACE, cuda.free_bytes() // 2, available_memory() // 2)
    bytes_ = min(bytes_, FRUGAL_WORKSPACE) if frugal else bytes_
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, bytes_)
    else:
        config.max_workspace_size = bytes_
    return bytes_


def only_profile(builder, config, network, image):
    """Where the model leaves sizes open, one image of the bundle is the smallest, usual and largest input."""
    tensor = network.get_input(0)
    found = tuple(tensor.shape)
    if min(found) >= 0:
        return None
    if len(found) != len(image) + 1:
        raise Problem("the model takes %d dimensions, the inputs have %d" % (len(found), len(image) + 1), "check both")
    shape = tuple(new if old < 0 else old for old, new in zip(found, (1,) + tuple(image)))
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    return profile


def calibrate(trt, config, bundle, engine, profile):
    """Implicit INT8: TensorRT takes the scales from a cache, and asks for no images."""
    if not engine.get("cache"):
        return None
    with open(os.path.join(bundle["folder"], engine["cache"]), "rb") as stream:
        scales = stream.read()
    made_for, own = (
        scales.partition(b"-Entropy")[0].decode("ascii", "replace"),
        "TRT-" + version_number(trt.__version__),
    )
    if made_for != own:
        raise Problem("the calibration cache is for %s, this is %s" % (made_for, own), FOR_THIS, 1)

    class Calibrator(trt.IInt8EntropyCalibrator2):
        def __init__(self):
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self):
            return 1

        def get_batch(self, names):
            return None

        def read_calibration_cache(self):
            return scales

        def write_calibration_cache(self, cache):
            pass

    config.int8_calibrator = Calibrator()
    if profile is not None:
        config.set_calibration_profile(profile)
    return config.int8_calibrator


def version_number(version):
    """As in the first line of a calibration cache: 8502 is 8.5.2, 100300 is 10.3.0."""
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    return str((major * 100 + minor) * 100 + patch if major >= 10 else (major * 10 + minor) * 100 + patch)


def place_on_dla(trt, config, network, core):
    """Ask for the DLA; how many layers it takes, of how many. The others fall back to the GPU without a word."""
    if core is None:
        return None
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {"layers": sum(bool(config.can_run_on_DLA(layer)) for layer in layers), "of": len(layers)}


def use_timings(config, path):
    """Kernels that were timed before are chosen again: quicker builds, and repeatable ones."""
    known = b""
    if os.path.isfile(path):
        with open(path, "rb") as stream:
            known = stream.read()
    cache = config.create_timing_cache(known)
    config.set_timing_cache(cache, False)  # False: refused where it is from another device


def keep_timings(config, path):
    cache = config.get_timing_cache()
    if cache is not None:
        replace(path, lambda stream: stream.write(cache.serialize()))


def tf32(trt, config):
    return bool(config.get_flag(trt.BuilderFlag.TF32)) if hasattr(trt.BuilderFlag, "TF32") else None


def layers_of(trt, logger, path):
    """What the finished engine says of its layers, in a file beside it; None where TensorRT cannot tell."""
    runtime = trt.Runtime(logger)
    with open(path, "rb") as stream:
        engine = runtime.deserialize_cuda_engine(stream.read())
    if engine is None or not hasattr(engine, "create_engine_inspector"):
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    replace(path + ".layers.json", lambda stream: stream.write(text.encode()))
    return "engines/" + os.path.basename(path) + ".layers.json"


# --- bundles: models, inputs and expected answers in a folder; every step can be interrupted --------------------------


def read_bundle(folder):
    """The manifest of a whole, unchanged bundle, with its `folder` and its own hash, `sha256`."""
    folder = os.path.realpath(folder)
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, "rb") as stream:
            text = stream.read()
        bundle = json.loads(text.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise Problem("`%s` is no bundle: %s" % (folder, first_line(error)), COPY_AGAIN)
    need(bundle, "the manifest", {"schema": int})
    if bundle["schema"] != SCHEMA:
        newer = "this runner reads bundles of schema %d, this one has %s" % (SCHEMA, bundle["schema"])
        raise Problem(newer, "use the edgekd_runner.py that came with the bundle")
    kinds = {"name": str, "target": str, "runtime": str, "threads": int, "engines": list, "inputs": str}
    need(bundle, "the manifest", dict(kinds, checked=int, protocol=dict, files=dict))
    if bundle["runtime"] not in RUNTIMES:
        raise Problem("this runner has no runtime `%s`" % bundle["runtime"], "known: %s" % ", ".join(sorted(RUNTIMES)))
    check_protocol(bundle["protocol"])
    for name in sorted(bundle["files"]):
        check_file(folder, name, bundle["files"][name])
    check_engines(bundle)
    return dict(bundle, folder=folder, sha256=hashlib.sha256(text).hexdigest())


def check_file(folder, name, recorded):
    """Refuse what leads out of the bundle, and what is not as it was when the bundle was made."""
    need(recorded, "`%s` in the manifest" % name, {"sha256": str, "bytes": int})
    path = os.path.join(folder, name)
    odd = os.path.isabs(name) or "\\" in name or "\0" in name or ".." in name.split("/")
    if odd or not os.path.realpath(path).startswith(folder + os.sep):
        raise Problem("`%s` in the manifest leads out of the bundle" % name, "do not use this bundle: make it again")
    if not os.path.isfile(path):
        raise Problem("`%s` is missing in the bundle" % name, COPY_AGAIN)
    size = os.path.getsize(path)
    if size != recorded["bytes"]:
        raise Problem("`%s` has %d bytes instead of %d" % (name, size, recorded["bytes"]), COPY_AGAIN)
    if sha256(path) != recorded["sha256"]:
        raise Problem("`%s` was changed since the bundle was made" % name, COPY_AGAIN)


def check_engines(bundle):
    if not bundle["engines"]:
        raise Problem("the bundle has no engine", "make it again")
    named = [bundle["inputs"], bundle.get("labels")]
    for engine in bundle["engines"]:
        kinds = {"name": str, "role": str, "model": str, "expected": str, "precisions": list}
        need(engine, "an engine of the manifest", dict(kinds, agreement=(int, float)))
        named += [engine["model"], engine["expected"], engine.get("cache")]
    missing = [name for name in named if name and (not isinstance(name, str) or name not in bundle["files"])]
    if missing:
        raise Problem("the manifest records no hash of `%s`" % missing[0], "make the bundle again")
    names = [engine["name"] for engine in bundle["engines"]]
    if len(set(names)) < len(names):
        raise Problem("engines of the bundle share a name", "make the bundle again")


def on_bundle(chosen):
    """Run one command on a bundle and write what it found to `OUT/COMMAND.json`, last."""
    bundle = read_bundle(chosen.bundle)
    out = os.path.abspath(chosen.out or os.path.join(bundle["folder"], "results"))
    chosen.out = out
    os.makedirs(out, exist_ok=True)
    with alone(out):
        found = BUNDLE_COMMANDS[chosen.command](bundle, out, chosen)
        name = "result" if chosen.command == "collect" else chosen.command
        save_json(os.path.join(out, name + ".json"), dict(found, schema=SCHEMA, bundle=bundle["sha256"]))
        for path in left_over(out, chosen.command):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return found.get("code", 0)


def left_over(out, command):
    """What a command needed to go on after an interruption, and no longer does. `verify` keeps it, to skip engines."""
    names = {"bench": ("bench.state", "watch.state.json", "trtexec.state.json"), "energy": ("energy.state.json",)}
    paths = (os.path.join(out, name) for name in names.get(command, ()))
    return [path for path in paths if os.path.exists(path)]


@contextlib.contextmanager
def alone(out):
    """No two runs measure into one folder, or would time each other."""
    import fcntl  # not on Windows, which has no bundles

    with open(os.path.join(out, ".lock"), "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise Problem(
                "another run works in `%s` (process %s)" % (out, stream.read().strip() or "unknown"),
                "wait until it ends, or end it: what is finished is kept",
                1,
            )
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def finished(bundle, out, command):
    """What `command` found on this bundle, or None where it has not ended yet."""
    found = load_json(os.path.join(out, command + ".json"))
    return found if found and found.get("bundle") == bundle["sha256"] else None


def built(bundle, out):
    """Of every engine that was built: what the manifest and `build` say, and the `path` that the runtime loads."""
    found = finished(bundle, out, "build")
    if not found:
        raise Problem("nothing is built yet", "run `build --bundle %s` first" % bundle["folder"], 1)
    engines = []
    for index, (engine, fact) in enumerate(zip(bundle["engines"], found["engines"])):
        if "error" not in fact:
            engines.append(dict(engine, index=index, path=engine_path(bundle, out, fact), fact=fact))
    if not engines:
        raise Problem("no engine could be built: %s" % found["engines"][0]["error"], found["engines"][0]["hint"], 1)
    return engines


def engine_path(bundle, out, fact):
    """Where the file is that the runtime loads: the model itself, or what was built from it."""
    path = os.path.join(out, fact["engine"]) if fact.get("engine") else os.path.join(bundle["folder"], fact["model"])
    if not os.path.isfile(path):
        raise Problem("the engine `%s` is gone" % fact["name"], "run `build` again", 1)
    return path


def build(bundle, out, chosen):
    """Make of every model what the runtime loads. One that cannot be built is told, and does not stop the others."""
    facts, total = [], len(bundle["engines"])
    for index, engine in enumerate(bundle["engines"]):
        emit({"progress": index, "of": total, "note": "build %s" % engine["name"]})
        fact = {"name": engine["name"], "model": engine["model"], "sha256": bundle["files"][engine["model"]]["sha256"]}
        try:
            fact.update(build_child(bundle, out, index))
        except Problem as problem:
            fact.update(error=problem.error, hint=problem.hint)
            emit({"warning": "`%s` was not built: %s" % (engine["name"], problem.error), "hint": problem.hint})
        facts.append(fact)
    emit({"progress": total, "of": total})
    nothing = all("error" in fact for fact in facts)
    if nothing:
        emit({"error": "no engine could be built: %s" % facts[0]["error"], "hint": facts[0]["hint"]})
    return {"engines": facts, "code": int(nothing)}


def build_child(bundle, out, index):
    """A build that ran out of memory is tried once more with less of it."""
    try:
        return child("build", bundle, out, {"index": index, "frugal": False})
    except Problem as problem:
        if bundle["runtime"] != "tensorrt" or problem.hint != MEMORY:
            raise
        emit({"warning": problem.error, "hint": "trying again with less memory, which finds slower kernels"})
        return child("build", bundle, out, {"index": index, "frugal": True})


def identity(engine):
    """What results of an engine are about: a file, in a version of a runtime."""
    return "%s %s %s" % (engine["name"], sha256(engine["path"]), engine["fact"]["runtime"]["version"])


def verify(bundle, out, chosen):
    """Write `logits-I.npy`, the answers of engine I to all inputs; compare the first ones with those of the host."""
    state, keys = State(out, "verify", bundle["sha256"]), []
    for engine in built(bundle, out):
        keys.append(identity(engine))
        path = os.path.join(out, "logits-%d.npy" % engine["index"])
        fact = state.parts.get(keys[-1])
        if not fact or not os.path.isfile(path) or sha256(path) != fact["sha256"]:
            state.keep(keys[-1], child("verify", bundle, out, spec_of(engine)))
    engines = [state.parts[key] for key in keys]
    for fact in engines:
        if not fact["passes"]:
            emit({"warning": "`%s` does not answer as on the host: %s" % (fact["name"], fact["reason"])})
    return {"engines": engines, "checked": bundle["checked"]}


def spec_of(engine):
    """What a child needs to open an engine."""
    spec = {key: engine[key] for key in ("index", "name", "path", "precisions")}
    floats = engine.get("floats") or ("fp32" if engine["precisions"] == ["fp32"] else "default")
    return dict(spec, dla=engine.get("dla"), precision=floats, model_sha256=engine["fact"]["sha256"])


class State:
    """Finished parts of a command, in `OUT/COMMAND.state.json`; none where it was begun with other files."""

    def __init__(self, out, command, key):
        self.path, self.key = os.path.join(out, command + ".state.json"), key
        known = load_json(self.path) or {}
        self.parts = known.get("parts", {}) if known.get("key") == key else {}

    def keep(self, name, part):
        self.parts[name] = part
        save_json(self.path, {"key": self.key, "parts": self.parts})


def bench_bundle(bundle, out, chosen):
    """Time all engines in one process, in rounds that are kept one by one."""
    engines, lock = built(bundle, out), chosen.lock_clocks
    measured, done = [identity(engine) for engine in engines], finished(bundle, out, "bench")
    if done and done["measured"] == measured and done["locked"] == lock and not done["invalid"]:
        blocks = bundle["protocol"]["blocks"]
        emit({"progress": blocks, "of": blocks, "note": "measured before; remove bench.json to measure again"})
        return dict(done, recommended=recommend(bundle, finished(bundle, out, "verify"), medians_of(done)))
    base = next((e for e in engines if e["role"] == "teacher"), engines[0])
    listed = [spec_of(engine) for engine in engines]
    listed.append(dict(spec_of(base), name="%s again" % base["name"]))  # the A/A control
    with clocks(out, lock):
        watch = Watch(out, [bundle["sha256"], measured, lock])
        spec = {"models": listed, "locked": lock, "power_mode": watch.now["before"]["power_mode"]}
        found = child("bench", bundle, out, spec, watch.look)
        watch.end()
        if bundle["runtime"] == "tensorrt":
            found["trtexec"] = opinions(engines, out)
    found.update(measured=measured, locked=lock, points=watch.points, invalid=watch.brakes(lock))
    return dict(found, recommended=recommend(bundle, finished(bundle, out, "verify"), medians_of(found)))


class Watch:
    """The operating points of a bench: at its start, after every round, at its end; of all processes that shared it."""

    def __init__(self, out, key):
        before = operating_point()
        self.state = State(out, "watch", key + [before["power_mode"]])
        self.now = {"before": before, "after": before, "gpu_hz": []}

    @property
    def points(self):
        return list(self.state.parts.values())

    def look(self):
        self.now["gpu_hz"].append(gpu_clocks())
        light = {"gpu_hz": self.now["gpu_hz"][-1], "throttle_events": throttle_events(), "cooling": cooling()}
        self.keep(dict(self.now["before"], **light))

    def end(self):
        self.keep(operating_point())

    def keep(self, after):
        self.now["after"] = after
        self.state.keep("%d" % os.getpid(), self.now)

    def brakes(self, locked):
        """What slowed the machine in the meantime."""
        found = [words for point in self.points for words in brakes(point["before"], point["after"], locked)]
        for point in self.points:
            for name, known in point["before"]["gpu_hz"].items():
                seen = [hz[name] for hz in point["gpu_hz"] if hz.get(name)]
                if locked and known and seen and min(seen) < CLOCK_DROP * known:
                    found.append("the locked clock of %s fell to %d MHz in a round" % (name, min(seen) // 10**6))
        return found


def medians_of(bench):
    return {fact["name"]: fact["median_ms"] for fact in bench["models"]} if bench else {}


def recommend(bundle, verified, medians):
    """The fastest engine that answers as on the host: of the students where there are any."""
    if not verified or not medians:
        return {"name": None, "reason": "nothing is %s yet" % ("timed" if verified else "verified")}
    students = [e["name"] for e in bundle["engines"] if e["role"] == "student"] or list(medians)
    kept = [e["name"] for e in verified["engines"] if e["passes"] and e["name"] in students and e["name"] in medians]
    if not kept:
        return {"name": None, "reason": "no student answers as on the host"}
    return {"name": min(kept, key=lambda name: medians[name]), "reason": "the fastest of %d that pass" % len(kept)}


def collect(bundle, out, chosen):
    """Everything that was found, in one file, with the hashes of the arrays beside it."""
    parts = {command: finished(bundle, out, command) for command in ("doctor", "build", "verify", "bench", "energy")}
    if not any(parts.values()):
        raise Problem("there is no result of this bundle in `%s`" % out, "run `build`, `verify` and `bench` first", 1)
    names = ["samples.npz"] if parts["bench"] else []
    if parts["verify"]:
        names += ["logits-%d.npy" % fact["index"] for fact in parts["verify"]["engines"]]
    files = {}
    for name in names:
        path = os.path.join(out, name)
        if not os.path.isfile(path):
            raise Problem("`%s` is gone from the results" % name, "run `verify` and `bench` again", 1)
        files[name] = {"sha256": sha256(path), "bytes": os.path.getsize(path)}
    best = recommend(bundle, parts["verify"], medians_of(parts["bench"]))
    return dict(parts, name=bundle["name"], target=bundle["target"], files=files, recommended=best)


# --- children: whatever loads a runtime does so in a process of its own, whose end is told in words -------------------


def child(command, bundle, out, spec, seen=None):
    """What the piece of work `command` returns; `seen` is called at its progress.

    Raises Problem with the words of the child, or with what its end means.
    """
    words = ["_child", command, "--bundle", bundle["folder"], "--out", out, "--spec", json.dumps(spec)]
    return spawned(words, seen)


def spawned(words, seen=None):
    """What this program returns as a process of its own with these words."""
    told, words = {}, [sys.executable, os.path.abspath(__file__)] + words
    with tempfile.TemporaryFile() as complaints:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=complaints, **TEXT) as process:
            try:
                for line in process.stdout:
                    told = heard(line) or told
                    if seen:
                        seen()
                code = process.wait()
            finally:
                end(process)
        complaints.seek(0)
        text = complaints.read().decode("utf-8", "replace")
    if "result" in told:  # its last line, when all is written; some TensorRTs crash while they unload
        return told["result"]
    raise diagnose(told, text, code)


def heard(line):
    """The last words of a child; its progress is passed on."""
    try:
        told = json.loads(line) if line.startswith("{") else {}  # a runtime may print too
    except ValueError:
        return {}
    if "result" in told or "error" in told:
        return told
    if told:
        emit(told)
    return {}


def end(process):
    """End a process that was started here, if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# what runtimes say when they fail, what it means, and what helps; the first that fits
FAILURES = (
    (
        r"insufficient memory|out of memory|could not be allocated|CUDA error 2\b|std::bad_alloc|MemoryError",
        "memory ran out",
        MEMORY,
    ),
    (
        r"Target GPU SM \S+ is not supported by this TensorRT",
        "this TensorRT is not built for this GPU: on a Jetson up to JetPack 6, wheels from PyPI are for servers",
        "pip uninstall tensorrt; use the system's own: `sudo apt install python3-libnvinfer`, no virtual environment",
    ),
    (
        r"No importer registered for op|Unsupported ONNX opset|unsupported ONNX opset|UNSUPPORTED_NODE|opset version",
        "the model has an operator or an opset that this TensorRT does not know",
        FOR_THIS,
    ),
    (
        r"has dynamic or shape inputs, but no optimization profile",
        "the model leaves sizes open, and no profile says which",
        "export it for one image of one size",
    ),
    (
        r"incompatible device|not compatible with this version|expecting library version|[Vv]ersion tag does not match",
        "the engine was built on another device or by another TensorRT",
        MOVED,
    ),
    (
        r"only activation types allowed|zero point must be zero|[Nn]on-zero zero point|zero_?point",
        "its Q/DQ pairs are not those that TensorRT takes",
        "quantize it with the dialect `tensorrt`; `edgekd lint` names the nodes",
    ),
    (
        r"Could not find any implementation for node",
        "TensorRT has no kernel for a node: most often a Q/DQ pair stands where it should not",
        "leave that Q/DQ pair out (`edgekd lint` names bad places), or give more memory: stop other programs",
    ),
    (
        r"[Cc]uda failure: ?(222|35)\b|CUDA error (222|35|803)\b|driver version is insufficient",
        "the NVIDIA driver is older than this CUDA, or missing",
        "in a container match its L4T to that of the host (`cat /etc/nv_tegra_release`); else update the driver",
    ),
    (
        r"libcuda\.so|libnvinfer\S*: cannot open|libnvdla|libcudart is not found",
        "a library of NVIDIA is missing",
        "`sudo apt install nvidia-jetpack`; in a container start it with `--runtime nvidia`",
    ),
    (
        r"DLA .*(not supported|is not available)|cannot run on DLA|DLA \d+ here",
        "the DLA is not there, or cannot run the network",
        "make the bundle again without --dla",
    ),
)


def diagnose(told, text, code):
    """What the end of a child means: by its words where they are known, else by how it ended."""
    if "error" in told and code == 2:
        return Problem(told["error"], told["hint"], code)
    words = told.get("error", "") or "; ".join(text.strip().splitlines()[-3:]) or "no words"
    for pattern, sentence, hint in FAILURES:
        if re.search(pattern, words + "\n" + text):
            return Problem("%s (%s)" % (sentence, words), hint, 1)
    if "error" in told:
        return Problem(told["error"], told["hint"], code)
    if code == -signal.SIGKILL:
        return Problem("the system killed it, most likely because memory ran out", MEMORY, 1)
    name = signal.Signals(-code).name if code < 0 else "exit code %d" % code
    return Problem("it ended with %s: %s" % (name, words), "run `doctor`; report it with these words", 1)


def child_main(chosen):
    """Do the piece of work; the result is the last line."""
    die_with_parent()
    bundle = load_json(os.path.join(chosen.bundle, "manifest.json"))  # the parent has checked it
    bundle = dict(bundle, folder=chosen.bundle, sha256=sha256(os.path.join(chosen.bundle, "manifest.json")))
    emit({"result": CHILD_COMMANDS[chosen.work](bundle, chosen.out, json.loads(chosen.spec))})
    return 0


def start_main(chosen):
    """One cold start; the result is the last line."""
    die_with_parent()
    emit({"result": start_one(read_job(chosen.job, False), chosen.out, chosen.model)})
    return 0


def die_with_parent():
    """A child whose parent was killed would go on, and disturb the next run."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def job_of(bundle):
    return {key: bundle[key] for key in ("runtime", "threads", "protocol")}


def bundle_inputs(bundle):
    return read_inputs({"inputs": os.path.join(bundle["folder"], bundle["inputs"])})


def build_one(bundle, out, spec):
    """Whatever this runtime loads; only TensorRT makes files."""
    if bundle["runtime"] == "tensorrt":
        return build_tensorrt(bundle, out, spec)
    engine = bundle["engines"][spec["index"]]
    path = os.path.join(bundle["folder"], engine["model"])
    fact = {"sha256": bundle["files"][engine["model"]]["sha256"]}
    model = spec_of(dict(engine, index=spec["index"], path=path, fact=fact))
    session, fact = open_model(job_of(bundle), model, bundle_inputs(bundle))
    return dict(fact, runtime=session.facts(), **session.in_force())


def verify_one(bundle, out, spec):
    import numpy as np

    engine, inputs = bundle["engines"][spec["index"]], bundle_inputs(bundle)
    session, _ = open_model(job_of(bundle), spec, inputs)
    logits = answers(session, engine["name"], inputs, Progress(len(inputs), note="verify %s" % engine["name"]))
    path = os.path.join(out, "logits-%d.npy" % spec["index"])
    replace(path, lambda stream: np.save(stream, logits))
    expected = np.load(os.path.join(bundle["folder"], engine["expected"]), allow_pickle=False)
    labels = bundle.get("labels") and np.load(os.path.join(bundle["folder"], bundle["labels"]), allow_pickle=False)
    found = judged(engine, logits, expected[: bundle["checked"]], labels)
    return dict(found, name=engine["name"], index=spec["index"], sha256=sha256(path), images=len(logits))


def judged(engine, logits, expected, labels):
    """How far the answers are from those that the host expects, and whether that is near enough."""
    import numpy as np

    own = logits[: len(expected)]
    if own.shape != expected.shape:
        reason = "answers of shape %s instead of %s" % (own.shape, expected.shape)
        return {"passes": False, "reason": reason, "checked": len(own)}
    off = np.abs(own.astype(np.float64) - expected)
    agree = 100.0 * float(np.mean(own.argmax(1) == expected.argmax(1)))
    finite = bool(np.isfinite(logits).all())
    found = {"checked": len(own), "agreement": agree, "required": engine["agreement"], "finite": finite}
    if finite:
        found.update(max_difference=float(off.max()), mean_difference=float(off.mean()))
    if labels is not None and labels.ndim == 1 and logits.ndim == 2:
        found["top1"] = 100.0 * float(np.mean(logits.argmax(1) == labels))
    reason = ""
    if not finite:
        reason = "some answers are no numbers; FP16 overflows above 65504: build it with FP32"
    elif agree < engine["agreement"]:
        reason = "%.2f %% of the classes agree, %.2f %% must" % (agree, engine["agreement"])
    return dict(found, passes=not reason, reason=reason)


def bench_all(bundle, out, spec):
    """Rounds of timed calls; each is a file until all are there, so that a killed run goes on where it was."""
    job, images = job_of(bundle), bundle_inputs(bundle)
    sessions, facts = open_timed(job, spec["models"], images)
    for model, fact in zip(spec["models"], facts):
        fact.update(engine_sha256=fact["sha256"], sha256=model["model_sha256"])  # results are about the ONNX file
    calls, before = [calls_of(job, session, images) for session in sessions], counters()
    rounds = Rounds(out, [bundle["sha256"], spec, sessions[0].facts(), [fact["engine_sha256"] for fact in facts]])
    missing = [number for number in range(job["protocol"]["blocks"]) if number not in rounds.done]
    if missing:
        warm_up_all(sessions, calls, facts, job["protocol"])
    order, block = orders(len(sessions), job["protocol"]), block_of(job, sessions, facts, calls, images)
    for number in missing:
        ns = [row[0] for row in one_round(job, block, order[number], number)]
        seen = {"conditions": conditions(before, counters()), "models": facts}
        rounds.keep(number, ns, order[number], seen)
        emit({"progress": len(rounds.done), "of": job["protocol"]["blocks"]})
    medians = rounds.join(out)
    found = {"machine": machine(), "runtime": sessions[0].facts(), "protocol": job["protocol"]}
    found.update(conditions=worst([kept["conditions"] for kept in rounds.sessions]))
    models = [dict(fact, median_ms=median) for fact, median in zip(rounds.sessions[0]["models"], medians)]
    for session, model in zip(sessions, models):
        if hasattr(session, "compute_ms"):
            model["compute_ms"] = session.compute_ms(COMPUTE_CALLS)
    return dict(found, models=models, sessions=rounds.sessions, resumed=len(rounds.sessions) > 1)


class Rounds:
    """The rounds of one bench in `OUT/bench.state`, each a file; begun anew where other files or settings are timed."""

    def __init__(self, out, key):
        self.folder = os.path.join(out, "bench.state")
        if load_json(os.path.join(self.folder, "key.json")) != key:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.makedirs(self.folder)
            save_json(os.path.join(self.folder, "key.json"), key)
        names = os.listdir(self.folder)
        self.done = sorted(int(n[6:-4]) for n in names if n.startswith("round-") and n.endswith(".npz"))
        count = sum(name.startswith("session-") and name.endswith(".json") for name in names)
        self.sessions = [load_json(os.path.join(self.folder, "session-%d.json" % i)) for i in range(count)]
        self.session = count  # the number of this process

    def keep(self, number, ns, order, seen):
        """A round, and what was seen of this process so far: `seen`."""
        import numpy as np

        self.sessions = self.sessions[: self.session] + [seen]
        save_json(os.path.join(self.folder, "session-%d.json" % self.session), seen)
        kept = {"ns": np.array(ns, np.int64), "model": np.repeat(order, len(ns) // len(order))}
        kept["session"] = np.full(len(ns), self.session)
        path = os.path.join(self.folder, "round-%d.npz" % number)
        replace(path, lambda stream: np.savez(stream, **kept))
        self.done.append(number)

    def join(self, out):
        """Write `samples.npz`: as of a bench without interruption, with the `session` of every call. Medians, ms."""
        import numpy as np

        parts = []
        for number in sorted(self.done):
            with np.load(os.path.join(self.folder, "round-%d.npz" % number)) as part:
                parts.append({key: part[key] for key in part.files})
        ns, model, session = (np.concatenate([part[key] for part in parts]) for key in ("ns", "model", "session"))
        block = np.repeat(np.arange(len(parts)), [len(part["ns"]) for part in parts])
        facts = self.sessions[0]["models"]
        rows = np.stack([ns, np.zeros_like(ns), block, model], 1)
        save_samples(out, facts, rows, session=session.astype(np.int32))
        return [float(np.median(ns[model == index])) / 1e6 for index in range(len(facts))]


def worst(seen):
    """Of the conditions of several processes that shared a bench."""
    found = {"load_before": seen[0]["load_before"], "load_after": seen[-1]["load_after"]}
    for key, chosen in (("others_percent", max), ("steal_percent", max), ("throttled", sum)):
        known = [conditions[key] for conditions in seen if conditions[key] is not None]
        found[key] = chosen(known) if known else None
    return found


# --- trtexec: a second opinion on the same engines --------------------------------------------------------------------

TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
OPINION_S, OPINION_WARMUP_MS = 15, 2000
ROW_KEYS = ("latencyMs", "computeMs", "h2dMs", "d2hMs")  # of --exportTimes


def find_program(names):
    """The first that can be started: shells over SSH often know less places than those of a person."""
    found = (shutil.which(name) for name in names)
    return next((path for path in found if path), None)


def known_flags(text):
    """The flags that a `--help` lists; those that it only talks about do not count."""
    return {"--" + name for name in re.findall(r"^\s+--([A-Za-z0-9]+)", text, re.MULTILINE)}


def compose(path, text, engine, scope, folder, dla=None):
    """The command that times `engine`, of flags that this trtexec's help `text` lists. Defaults are never relied on.

    `scope` is `compute`, `end to end` (with copies) or `layers`, whose times are disturbed by looking at them.
    """
    known = known_flags(text)
    inverted = "--includeDataTransfers" in known  # from 11 on, copies are off and spinning and graphs on
    percentiles = "50,90,95,99" if re.search(r"--percentile=P1,", text) else "99"
    flags = ["--loadEngine=" + engine]
    if dla is not None:
        flags.append("--useDLACore=%d" % dla)
    if scope == "compute" and not inverted:
        flags.append("--noDataTransfers")
    if scope == "end to end" and inverted:
        flags.append("--includeDataTransfers")
    flags += ["--useSpinWait"] + (["--useCudaGraph"] if dla is None else ["--noCudaGraph"])
    flags += ["--infStreams=1"] if "--infStreams" in known else ["--streams=1"]
    if scope == "layers":
        flags += ["--dumpProfile", "--separateProfileRun", "--exportProfile=%s/profile.json" % folder]
        flags += ["--profilingVerbosity=detailed", "--exportLayerInfo=%s/layers.json" % folder]
    else:
        flags += ["--warmUp=%d" % OPINION_WARMUP_MS, "--duration=%d" % OPINION_S, "--iterations=1000"]
        flags += ["--avgRuns=100", "--percentile=" + percentiles, "--exportTimes=%s/times.json" % folder]
    return [path] + [flag for flag in flags if flag.partition("=")[0] in known]


def read_times(rows, warmup_ms):
    """Milliseconds from --exportTimes, one row for each call. Up to 8.4 it lists the warm-up too."""
    kept = [row for row in rows if row["startComputeMs"] >= warmup_ms]
    return {key: spread([row[key] for row in kept]) for key in ROW_KEYS if kept and key in kept[0]}


def spread(values):
    """Percentiles by nearest rank, as trtexec has them."""
    ordered = sorted(values)
    ranks = {p: ordered[max(0, math.ceil(len(ordered) * p / 100.0) - 1)] for p in (50, 90, 95, 99)}
    found = {"p%d" % p: value for p, value in ranks.items()}
    return dict(found, n=len(ordered), min=ordered[0], mean=sum(ordered) / len(ordered))


def read_summary(text):
    """What trtexec prints: `GPU Compute Time: min = 0.8 ms, ..., percentile(99%) = 0.9 ms`, as {name: {min: 0.8}}."""
    found = {}
    for line in text.splitlines():
        name, _, rest = re.sub(r"^(\[[^\]]*\]\s*)+", "", line).partition(":")
        numbers = re.findall(r"([a-z]+(?:\(\d+(?:\.\d+)?%\))?) = ([\d.eE+-]+) ms", rest)
        if numbers:
            found[name.strip()] = {key: float(value) for key, value in numbers}
        elif name.strip() == "Throughput":
            found["Throughput"] = {"qps": float(rest.split()[0])}
    version = re.search(r"\[TensorRT v(\d+)\]", text)
    flags = {"enqueue_bound": "bound by Enqueue Time", "unstable": "GPU compute time is unstable"}
    return dict({key: words in text for key, words in flags.items()}, version=version and version.group(1), ms=found)


def read_profile(rows):
    """Layers of --exportProfile with their average milliseconds; the first row is a count."""
    return [{"name": row["name"], "average_ms": row["averageMs"], "percent": row["percentage"]} for row in rows[1:]]


def read_layers(found):
    """Names and precisions of --exportLayerInfo: of engines without detailed verbosity, names only."""
    layers = [{"Name": row} if isinstance(row, str) else row for row in found.get("Layers", [])]
    return [{"name": row.get("Name", ""), "precision": precision_of(row)} for row in layers]


def precision_of(layer):
    """Of its first output, where the engine tells: `Int8`, `Half`, `Float`."""
    outputs = layer.get("Outputs") or [{}]
    words = outputs[0].get("Format/Datatype", "") if isinstance(outputs[0], dict) else ""
    return next((kind for kind in ("Int8", "Half", "FP16", "Float", "FP32") if kind.lower() in words.lower()), "")


def opinions(engines, out):
    """What trtexec says of every engine, or why nothing."""
    path = find_program(TRTEXEC)
    if not path:
        return {"reason": "there is no trtexec in the PATH or in /usr/src/tensorrt/bin"}
    state = State(out, "trtexec", [engine["fact"]["engine_sha256"] for engine in engines])
    for number, engine in enumerate(engines):
        if engine["name"] not in state.parts:
            emit({"progress": number, "of": len(engines), "note": "trtexec %s" % engine["name"]})
            state.keep(engine["name"], opinion(path, engine))
    return {"path": path, "engines": state.parts}


def opinion(path, engine):
    found = {}
    text, _ = output_of([path, "--help"], 60)
    for scope in ("compute", "end to end", "layers"):
        with tempfile.TemporaryDirectory() as folder:
            command = compose(path, text, engine["path"], scope, folder, engine.get("dla"))
            said, code = output_of(command, 10 * OPINION_S + 60)
            told = {"command": command}
            if code:
                reason = diagnose({}, said, code)
                told.update(reason="%s; %s" % (reason.error, reason.hint))
            elif scope == "layers":
                profile = load_json(os.path.join(folder, "profile.json"))
                layers = load_json(os.path.join(folder, "layers.json"))
                told.update(layers=read_profile(profile or []), precisions=read_layers(layers or {}))
            else:
                times = load_json(os.path.join(folder, "times.json")) or []
                told.update(read_summary(said), times_ms=read_times(times, OPINION_WARMUP_MS))
        found[scope] = told
    return found


def output_of(command, seconds):
    """Output and exit code of a program that is ended after `seconds`; it gets no input, and cannot ask."""
    options = dict(TEXT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with subprocess.Popen(command, **options) as process:
            try:
                return process.communicate(timeout=seconds)[0], process.returncode
            except subprocess.TimeoutExpired:
                return "no answer within %d s" % seconds, 124
            finally:
                end(process)
    except OSError as error:
        return first_line(error), 127


# --- the operating point: power mode, clocks, temperatures, throttling ------------------------------------------------

GPU_CLOCKS = ("/sys/class/devfreq/*", "/sys/devices/*gpu*/devfreq/*", "/sys/devices/platform/*gpu*/devfreq/*")
GPU_NAMES = ("gpu", "gp10b", "gv11b", "ga10b", "gb10b")
NVPMODEL = ("nvpmodel", "/usr/sbin/nvpmodel")
JETSON_CLOCKS = ("jetson_clocks", "/usr/bin/jetson_clocks")
CLOCK_DROP = 0.97  # of a locked clock: below, something holds it down


def operating_point():
    """What the machine runs at now; what cannot be read is empty or null."""
    return {
        "power_mode": power_mode(),
        "gpu_hz": gpu_clocks(),
        "cpu_khz": [
            whole_number(path) for path in found_at("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
        ],
        "temperatures_c": temperatures(),
        "throttle_events": throttle_events(),
        "cooling": cooling(),
    }


def power_mode():
    """Name and number as `nvpmodel -q` tells; null where there is none."""
    program = find_program(NVPMODEL)
    text = output_of([program, "-q"], 10)[0] if program else ""
    name = re.search(r"NV Power Mode: *(\S+)", text)
    index = re.search(r"^(\d+)$", text, re.MULTILINE)
    return {"name": name.group(1), "id": int(index.group(1)) if index else None} if name else None


def gpu_clocks():
    """Hz by device; the same device can be found in several places."""
    found = {}
    for pattern in GPU_CLOCKS:
        for path in found_at(pattern):
            name = os.path.basename(os.path.realpath(path))
            if any(word in name for word in GPU_NAMES):
                found[name] = whole_number(os.path.join(path, "cur_freq"))
    return found


def temperatures():
    """Degrees by zone. Zones of parts that are off cannot be read."""
    zones = {}
    for path in found_at("/sys/class/thermal/thermal_zone*"):
        value = whole_number(os.path.join(path, "temp"))
        if value is not None:
            zones[read(os.path.join(path, "type")) or os.path.basename(path)] = value / 1000.0
    return zones


def throttle_events():
    """How often each over-current alarm went off since the start: oc1 is under-voltage, oc2 average, oc3 instant."""
    found = {}
    for path in found_at("/sys/class/hwmon/hwmon*/oc*_event_cnt"):
        if read(os.path.join(os.path.dirname(path), "name")) == "soctherm_oc":
            found[os.path.basename(path)[: -len("_event_cnt")]] = whole_number(path)
    return found


def cooling():
    """How far each brake is on: 0 is off. Fans are no brakes."""
    found = {}
    for path in found_at("/sys/class/thermal/cooling_device*"):
        kind = read(os.path.join(path, "type"))
        if "fan" not in kind:
            found["%s %s" % (os.path.basename(path), kind)] = whole_number(os.path.join(path, "cur_state"))
    return found


def found_at(pattern):
    return sorted(glob.glob(at(pattern)))


def at(path):
    return os.path.join(ROOT, path.lstrip("/"))


def whole_number(path):
    """The whole number in a file of the system, or None."""
    text = read(path)
    return int(text) if re.match(r"-?\d+$", text) else None


def brakes(before, after, locked):
    """Sentences on everything that slowed the machine between two operating points; then its times are not valid."""
    found = []
    for name, count in after["throttle_events"].items():
        moved = (count or 0) - (before["throttle_events"].get(name) or 0)
        if moved > 0:
            found.append("the over-current alarm %s went off %d times" % (name, moved))
    for name, state in after["cooling"].items():
        if (state or 0) > max(0, before["cooling"].get(name) or 0):
            found.append("%s slows the machine because of its heat" % name)
    for name, clock in after["gpu_hz"].items():
        known = before["gpu_hz"].get(name)
        if locked and clock and known and clock < CLOCK_DROP * known:
            found.append("the locked clock of %s fell from %d to %d MHz" % (name, known // 10**6, clock // 10**6))
    if before["power_mode"] != after["power_mode"]:
        found.append("the power mode was changed meanwhile")
    return found


@contextlib.contextmanager
def clocks(out, lock):
    """Hold the clocks at the maximum of the power mode, if asked; they are put back whatever happens."""
    saved = os.path.join(out, "clocks.saved")
    if not lock and not os.path.exists(saved):
        yield
        return
    program = find_program(JETSON_CLOCKS)
    if not program:
        raise Problem("there is no jetson_clocks on this machine", "leave out --lock-clocks", 1)
    left = os.path.exists(saved)  # an earlier run was killed before it could put them back
    if os.geteuid() != 0:
        words = "only root can change clocks" + (", and an earlier run left them locked" if left else "")
        raise Problem(words, "sudo sh run.sh --lock-clocks, once" if left else "use sudo, or no --lock-clocks", 1)
    if left:
        restore_clocks(program, saved)
    if not lock:
        yield
        return
    ask_clocks(program, "--store", saved)
    try:
        ask_clocks(program)
        yield
    finally:
        restore_clocks(program, saved)


def ask_clocks(program, *words):
    said, code = output_of([program] + list(words), 60)
    if code:
        raise Problem("jetson_clocks failed: %s" % said.strip()[-200:], "leave out --lock-clocks", 1)


def restore_clocks(program, saved):
    ask_clocks(program, "--restore", saved)
    os.remove(saved)


# --- power ------------------------------------------------------------------------------------------------------------

# rails that together are what the module takes, nothing twice; the first row whose rails are all there
MODULE_RAILS = (
    ("VDD_IN",),  # TX2, Xavier NX, Orin Nano, Orin NX
    ("POM_5V_IN",),  # Nano
    ("VIN",),  # Thor
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is behind the last
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
TEGRASTATS = ("tegrastats", "/usr/bin/tegrastats")
SAMPLE_S = 0.1  # the INA3221 averages; 5 to 10 readings a second are what can be trusted
RAIL = re.compile(r"(?<![\w@%/])([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?:/(\d+)(?:mW)?)?(?![\w/])")
TEMPERATURE = re.compile(r"(\w+)@(-?\d+(?:\.\d+)?)C")
GPU_LOAD = re.compile(r"GR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+)?)?")


def sysfs_rails():
    """How to read every rail of the INA3221 sensors: label -> function that answers watts, or None."""
    rails = {}
    for path in found_at("/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[1-4]_label"):  # JetPack 5 and newer
        folder, index = os.path.dirname(path), os.path.basename(path)[2]
        if os.path.exists(os.path.join(folder, "curr%s_input" % index)):
            rails[read(path)] = watts_of(
                *(os.path.join(folder, "%s%s_input" % (kind, index)) for kind in ("in", "curr"))
            )
    for path in found_at("/sys/bus/i2c/devices/*/iio:device*/rail_name_*"):  # JetPack 4
        index = path.rpartition("_")[2]
        rails[read(path)] = watts_of(os.path.join(os.path.dirname(path), "in_power%s_input" % index))
    return rails


def watts_of(*paths):
    """Of millivolts and milliamperes, or of milliwatts."""

    def watts():
        found = [whole_number(path) for path in paths]
        if None in found:
            return None
        return found[0] / 1e3 if len(found) == 1 else found[0] * found[1] / 1e6

    return watts


def module_rails(labels):
    return next((rails for rails in MODULE_RAILS if set(rails) <= set(labels)), None)


def read_tegrastats(line):
    """One line of any JetPack: rails in milliwatts as they are now, temperatures, load and clock of the GPU."""
    load = GPU_LOAD.search(line)
    skipped = ("RAM", "SWAP", "IRAM")
    return {
        "rails_mw": {m.group(1): int(m.group(2)) for m in RAIL.finditer(line) if m.group(1) not in skipped},
        "temperatures_c": {m.group(1): float(m.group(2)) for m in TEMPERATURE.finditer(line)},
        "gpu_percent": int(load.group(1)) if load and load.group(1) else None,
        "gpu_mhz": int(load.group(2)) if load and load.group(2) else None,
    }


class Sysfs:
    """Reads the sensors itself."""

    def __init__(self, rails):
        self.kind, self.labels = "ina3221 through sysfs", rails
        known = sysfs_rails()
        self.read = [known[label] for label in rails]

    def samples(self, stopped):
        """Pairs of seconds (monotonic) and watts, until `stopped` is set."""
        while not stopped.wait(SAMPLE_S):
            watts = [read_rail() for read_rail in self.read]
            if None not in watts:
                yield time.monotonic(), sum(watts)

    def close(self):
        pass


class Tegrastats:
    """Reads what tegrastats prints."""

    def __init__(self, program):
        words = [program, "--interval", str(int(1000 * SAMPLE_S))]
        options = dict(TEXT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(words, **options)
        self.kind = "tegrastats"
        self.labels = module_rails(read_tegrastats(self.process.stdout.readline())["rails_mw"])

    def samples(self, stopped):
        with self.process.stdout as lines:
            for line in lines:
                found = read_tegrastats(line)["rails_mw"]
                if stopped.is_set():
                    return
                if set(self.labels) <= set(found):
                    yield time.monotonic(), sum(found[label] for label in self.labels) / 1e3

    def close(self):
        end(self.process)


def power_sensor():
    """The first that knows what the module takes. Raises Problem with the reason where there is none."""
    rails = sysfs_rails()
    if module_rails(rails):
        return Sysfs(module_rails(rails))
    program = find_program(TEGRASTATS)
    if program:
        sensor = Tegrastats(program)
        if sensor.labels:
            return sensor
        sensor.close()
    if rails:
        seen = ", ".join(sorted(rails))
        raise Problem("of the rails %s no sum is known that counts nothing twice" % seen, "measure at the plug", 1)
    raise Problem("this machine has no power sensor that the runner knows", "measure at the plug", 1)


class Meter:
    """Collects (seconds, watts) in a thread as long as it is open."""

    def __init__(self, sensor):
        self.sensor, self.seen, self.stopped = sensor, [], threading.Event()
        self.thread = threading.Thread(target=self.collect)
        self.thread.daemon = True

    def collect(self):
        for sample in self.sensor.samples(self.stopped):
            self.seen.append(sample)

    def __enter__(self):
        self.thread.start()
        return self

    def wait(self):
        """Until the first reading."""
        for _ in range(100):
            if self.seen:
                return
            time.sleep(PATIENCE_S / 100.0)
        raise Problem("the power sensor gives no reading", "look at it with `tegrastats`; or measure at the plug", 1)

    def __exit__(self, *error):
        self.stopped.set()
        self.sensor.close()
        self.thread.join(PATIENCE_S)


def joules(seen, start, stop):
    """The integral of watts by trapezoids from `start` to `stop`, seconds; at both ends between the nearest samples."""
    inside = [(t, w) for t, w in seen if start < t < stop]
    corners = [(start, watts_at(seen, start))] + inside + [(stop, watts_at(seen, stop))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(corners, corners[1:]))


def watts_at(seen, when):
    before = [sample for sample in seen if sample[0] <= when]
    after = [sample for sample in seen if sample[0] > when]
    if not before or not after:
        return (before or after[:1])[-1][1]
    (t0, w0), (t1, w1) = before[-1], after[0]
    return w0 + (w1 - w0) * (when - t0) / (t1 - t0)


def energy(bundle, out, chosen):
    """Millijoules of an inference: each engine runs without pause, while the power of the module is read."""
    engines, seconds = built(bundle, out), chosen.seconds
    done = finished(bundle, out, "energy")
    key = [[identity(engine) for engine in engines], seconds, chosen.lock_clocks]
    if done and done.get("key") == key and not done["invalid"]:
        emit({"progress": 1, "of": 1, "note": "measured before; remove energy.json to measure again"})
        return done
    try:
        sensor = power_sensor()
    except Problem as problem:
        emit({"note": problem.error})
        return {"reason": problem.error, "hint": problem.hint}
    state = State(out, "energy", [bundle["sha256"], key])
    with Meter(sensor) as meter, clocks(out, chosen.lock_clocks):
        meter.wait()
        before = operating_point()
        for index, engine in enumerate(engines):
            if engine["name"] not in state.parts:
                emit({"progress": index, "of": len(engines), "note": "energy %s" % engine["name"]})
                state.keep(engine["name"], energy_of(bundle, out, engine, meter, seconds, chosen.lock_clocks))
        after = operating_point()
    emit({"progress": len(engines), "of": len(engines)})
    found = {"sensor": {"kind": sensor.kind, "rails": list(sensor.labels), "scope": "module, without carrier board"}}
    parts = [state.parts[engine["name"]] for engine in engines]
    invalid = ["%s: %s" % (part["name"], words) for part in parts for words in part["invalid"]]
    found.update(engines=parts, before=before, after=after, invalid=invalid, locked=chosen.lock_clocks, key=key)
    return found


def energy_of(bundle, out, engine, meter, seconds, locked):
    """One engine, with the idle power before and after it."""
    before, idle_start = operating_point(), time.monotonic()
    time.sleep(seconds / 3.0)
    idle_stop = time.monotonic()
    loops = child("energy", bundle, out, dict(spec_of(engine), seconds=seconds))["loops"]
    busy = operating_point()
    rest_start = time.monotonic() + seconds / 6.0  # clocks and voltages take a while to fall
    time.sleep(seconds / 2.0)
    idle = [mean_watts(meter.seen, idle_start, idle_stop), mean_watts(meter.seen, rest_start, time.monotonic())]
    idle_w = sum(idle) / 2
    repeats = []
    for loop in loops:
        total, took = joules(meter.seen, loop["start"], loop["stop"]), loop["stop"] - loop["start"]
        gross = 1e3 * total / loop["calls"]
        net = 1e3 * (total - idle_w * took) / loop["calls"]
        power = [[round(t - loop["start"], 4), w] for t, w in meter.seen if loop["start"] <= t <= loop["stop"]]
        repeats.append(
            {"calls": loop["calls"], "seconds": took, "mj": gross, "net_mj": net, "watts": total / took, "power": power}
        )
    middle = {key: sorted(r[key] for r in repeats)[len(repeats) // 2] for key in ("mj", "net_mj", "watts")}
    few = [] if min(len(r["power"]) for r in repeats) > 2 else ["too few readings of the sensor"]
    found = {"name": engine["name"], "idle_w": idle, "repeats": repeats, "invalid": brakes(before, busy, locked) + few}
    return dict(found, before=before, busy=busy, inferences_per_joule=1e3 / middle["mj"], **middle)


def mean_watts(seen, start, stop):
    return joules(seen, start, stop) / (stop - start)


def energy_loops(bundle, out, spec):
    """Run one engine without pause, three times `seconds` after a third of it to warm up."""
    images = bundle_inputs(bundle)
    sessions, _ = open_timed(job_of(bundle), [spec], images)
    inputs, loops = rotation(images), []
    run_for(sessions[0], inputs, spec["seconds"] / 3.0)
    for _ in range(REPEATS):
        start = time.monotonic()
        calls = run_for(sessions[0], inputs, spec["seconds"])
        loops.append({"start": start, "stop": time.monotonic(), "calls": calls})
    return {"loops": loops}


REPEATS = 3


def run_for(session, inputs, seconds):
    """How many calls fit into the time."""
    stop, calls = time.monotonic() + seconds, 0
    while time.monotonic() < stop:
        session.run(inputs[calls % len(inputs)])
        calls += 1
    return calls


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
        "own": sum(os.times()[:4]) * (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100),
        "throttled": int(throttled) if throttled.isdigit() else None,
        "hottest": max(temperatures().values() or [None]),
        "mhz": clock_mhz(),
    }


def clock_mhz():
    """Of the fastest core at this moment, or None."""
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)", read("/proc/cpuinfo"), re.MULTILINE)
    return round(max(map(float, found))) if found else None


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
        "temperature_c_before": before["hottest"],
        "temperature_c_after": after["hottest"],
        "clock_mhz_before": before["mhz"],
        "clock_mhz_after": after["mhz"],
    }


def read(path):
    """The text of a file of the system, or nothing where there is none."""
    try:
        with open(path) as stream:
            return stream.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def doctor():
    """Print what this machine is, and what it lacks with the remedy. Exit code 1 without numpy, or any runtime."""
    versions, missing = {}, []
    runtimes = [runtime.package for runtime in RUNTIMES.values() if runtime is not TensorRt]  # that needs a bundle
    for package in ["numpy"] + runtimes:
        try:
            versions[package] = __import__(package).__version__
        except ImportError as error:
            hint = "%s -m pip install %s" % (sys.executable, package)
            missing.append({"package": package, "error": first_line(error), "hint": hint})
    if set(versions) & set(runtimes):  # one is enough
        missing = [lack for lack in missing if lack["package"] not in runtimes]
    print(json.dumps({"machine": machine(), "versions": versions, "missing": missing}, indent=2))
    return 1 if missing else 0


# the part numbers of modules, as in /proc/device-tree/compatible, and edgekd's names of the boards
MODULES = {
    "p3448": "nano",
    "p3310": "tx2",
    "p3489": "tx2",
    "p3636": "tx2",
    "p3668": "xavier-nx",
    "p2888": "agx-xavier",
    "p3767-0000": "orin-nx-16gb",
    "p3767-0001": "orin-nx-8gb",
    "p3767-0003": "orin-nano",
    "p3767-0004": "orin-nano",
    "p3767-0005": "orin-nano",
    "p3701": "agx-orin",
    "p3834": "thor",
}
LITTLE_GIB = 1.0  # of memory or disk: below, builds have failed


def board():
    """A Jetson's model and edgekd's name for it; null on other machines."""
    compatible = read(at("/proc/device-tree/compatible")).split("\0")
    model = read(at("/proc/device-tree/model")).strip("\0")
    names = [name for part, name in MODULES.items() if any(part in word for word in compatible)]
    return {"model": model or None, "name": names[0] if names else None}


def l4t():
    """Version of the Jetson's system, as 36.4.3; null elsewhere."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(at("/etc/nv_tegra_release")))
    if found:
        return "%s.%s" % found.groups()
    said, code = output_of(["dpkg-query", "-W", "-f", "${Version}", "nvidia-l4t-core"], 10)
    return said.partition("-")[0] if not code and said else None


def memory_gib():
    """Memory that programs can still have, and free swap, as the system tells."""
    found = dict(re.findall(r"^(\w+): +(\d+) kB", read(at("/proc/meminfo")), re.MULTILINE))
    return {name: round(int(found.get(name, 0)) / 2.0**20, 2) for name in ("MemTotal", "MemAvailable", "SwapFree")}


def available_memory():
    """Bytes."""
    return int(memory_gib()["MemAvailable"] * 2**30)


def look(bundle, out, spec):
    """Versions of what the bundle needs, and the GPU. In a process of its own: a runtime without a driver can crash."""
    versions, missing = {}, []
    package = RUNTIMES[bundle["runtime"]].package
    for name in ("numpy", package):
        try:
            versions[name] = __import__(name).__version__
        except ImportError as error:
            hint = "%s -m pip install %s" % (sys.executable, name)
            if name == "tensorrt":
                hint = "on a Jetson `sudo apt install python3-libnvinfer` and the system's python3; else " + hint
            missing.append({"package": name, "error": first_line(error), "hint": hint})
    device = Cuda().device() if package == "tensorrt" and not missing else None
    return {"versions": versions, "missing": missing, "device": device}


def doctor_bundle(bundle, out, chosen):
    """What this machine is, what it lacks, and how it differs from what the bundle was made for."""
    try:
        seen = child("look", bundle, out, {})
    except Problem as problem:
        missing = {"package": bundle["runtime"], "error": problem.error, "hint": problem.hint}
        seen = {"versions": {}, "missing": [missing], "device": None}
    try:
        sensor = power_sensor()
        sensor.close()
        power = {"sensor": sensor.kind, "rails": list(sensor.labels)}
    except Problem as problem:
        power = {"reason": problem.error}
    found = dict(seen, machine=machine(), board=board(), l4t=l4t(), memory_gib=memory_gib(), power=power)
    found.update(
        disk_free_gib=round(shutil.disk_usage(out).free / 2.0**30, 2),
        operating_point=operating_point(),
        trtexec=find_program(TRTEXEC),
    )
    found["differs"] = differences(bundle, found)
    for difference in found["differs"]:
        emit({"warning": difference["what"], "hint": difference["hint"]})
    for lack in found["missing"]:
        emit({"error": "%s: %s" % (lack["package"], lack["error"]), "hint": lack["hint"]})
    return dict(found, code=1 if found["missing"] else 0)


def differences(bundle, found):
    """What is not as the bundle was planned for, with what to do."""
    told = []
    wanted, own = bundle.get("board"), found["board"]["name"]
    if wanted and wanted != own:
        here = own or found["board"]["model"] or "no Jetson"
        told.append(("the bundle is for the board %s, this is %s" % (wanted, here), FOR_THIS + " --board ..."))
    wanted, own = bundle.get("tensorrt"), found["versions"].get("tensorrt")
    if wanted and own and wanted.split(".")[:2] != own.split(".")[:2]:
        told.append(("the bundle is for TensorRT %s, this is %s" % (wanted, own), FOR_THIS))
    if found["memory_gib"]["MemAvailable"] < LITTLE_GIB:
        told.append(("only %.1f GiB of memory are free" % found["memory_gib"]["MemAvailable"], MEMORY))
    if found["disk_free_gib"] < LITTLE_GIB:
        told.append(("only %.1f GiB of disk are free" % found["disk_free_gib"], "free some before you build"))
    return [{"what": what, "hint": hint} for what, hint in told]


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
    if job.get("hint", "latency") not in ("latency", "throughput"):
        raise Problem("the hint of the job is `%s`" % job["hint"], "use latency or throughput")
    if not job["models"]:
        raise Problem("the job names no model", "give at least one in `models`")
    if not isinstance(job.get("batch", 1), int) or job.get("batch", 1) < 1:
        raise Problem("the batch of the job is `%s`" % job["batch"], "give the images of a call, 1 or more")
    if job.get("scope", "copies") not in SCOPES:
        raise Problem("the scope of the job is `%s`" % job["scope"], "use %s" % ", ".join(SCOPES))
    home, job["path"] = os.path.dirname(os.path.abspath(path)), os.path.abspath(path)
    job["inputs"] = os.path.join(home, job["inputs"])
    for model in job["models"]:
        need(model, "a model of the job", {"name": str, "path": str})
        model["path"] = os.path.join(home, model["path"])
        if not os.path.isfile(model["path"]):
            raise Problem("`%s` is not there: %s" % (model["name"], model["path"]), "check `models` in the job")
        if model.get("precision", "fp32") not in ("fp32", "default"):
            raise Problem("`%s` is asked for in %s" % (model["name"], model["precision"]), "use fp32 or default")
    if timing:
        need(job, "the job", {"protocol": dict})
        check_protocol(job["protocol"])
    return job


def check_protocol(protocol):
    numbers = {"warmup_s": (int, float), "warmup_calls": int, "blocks": int, "calls": int, "seed": int}
    need(protocol, "the protocol", numbers)
    if min(protocol["blocks"], protocol["calls"]) < 1:
        raise Problem("the protocol times no call", "give at least 1 for blocks and for calls")
    rate = protocol.get("rate")
    if rate is not None and (not isinstance(rate, (int, float)) or not 0 < rate < 1e6):
        raise Problem("the rate of the protocol is `%s`" % rate, "give calls a second, more than 0")
    if rate and protocol.get("throughput"):
        raise Problem("the protocol has a rate and asks for throughput", "measure them one after the other")


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


def save_json(path, value):
    text = json.dumps(value, indent=2, sort_keys=True).encode()
    replace(path, lambda stream: stream.write(text))


def load_json(path):
    """What the file holds, or None where there is none."""
    try:
        with open(path, "rb") as stream:
            return json.loads(stream.read().decode())
    except (OSError, ValueError):
        return None


def emit(line):
    print(json.dumps(line))
    sys.stdout.flush()


SCOPES = ("copies", "model", "preprocessing")
RUNTIMES = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "tensorrt": TensorRt}
CHILD_COMMANDS = {"look": look, "build": build_one, "verify": verify_one, "bench": bench_all, "energy": energy_loops}
BUNDLE_COMMANDS = {
    "doctor": doctor_bundle,
    "build": build,
    "verify": verify,
    "bench": bench_bundle,
    "energy": energy,
    "collect": collect,
}


def main():
    keep_quiet()
    chosen = parsed()
    if chosen.command == "doctor" and not chosen.bundle:
        return doctor()
    try:
        if chosen.command == "_child":
            return child_main(chosen)
        if chosen.command == "_start":
            return start_main(chosen)
        if chosen.bundle:
            with stoppable():
                return on_bundle(chosen)
        return on_job(chosen)
    except Problem as problem:
        emit({"error": problem.error, "hint": problem.hint})
        return problem.code
    except ImportError as error:
        emit({"error": first_line(error), "hint": "`%s doctor` says what is missing" % sys.argv[0]})
    except OSError as error:  # from numpy often without a number or the file's name
        hint = "check the free space and your rights in `%s`" % chosen.out
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "the disk is full: free some space; finished parts are kept, the same command goes on"
        emit({"error": first_line(error), "hint": hint})
    except MemoryError:
        emit({"error": "memory ran out", "hint": MEMORY})
    except Stopped as stopped:
        emit({"error": "stopped by %s" % stopped, "hint": "finished parts are kept, the same command goes on"})
    return 1


def keep_quiet():
    """No runtime tells its maker of its use."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime keeps a log of events in the home folder, and posts it
    sys.modules["openvino_telemetry"] = None  # OpenVINO sends a message at every import


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    for name in ("doctor", "build", "verify", "bench", "energy", "collect", "answer", "start"):
        command = commands.add_parser(name)
        command.add_argument("--out", help="where results go; of a bundle: its folder `results`")
        source = command.add_mutually_exclusive_group(required=name != "doctor")
        if name not in ("answer", "start"):
            source.add_argument("--bundle", help="its folder")
        if name in ("answer", "bench", "start"):
            source.add_argument("--job")
        if name in ("bench", "energy"):
            command.add_argument(
                "--lock-clocks", action="store_true", help="hold a Jetson's clocks meanwhile; asks for root"
            )
        if name == "energy":
            command.add_argument("--seconds", type=float, default=30.0, help="of each of three loops of an engine")
    child = commands.add_parser("_child")  # a process of this program's own
    child.add_argument("work", choices=sorted(CHILD_COMMANDS))
    for name in ("--bundle", "--out", "--spec"):
        child.add_argument(name, required=True)
    one = commands.add_parser("_start")
    for name in ("--job", "--out"):
        one.add_argument(name, required=True)
    one.add_argument("--model", type=int, required=True)
    chosen = parser.parse_args()
    chosen.bundle = getattr(chosen, "bundle", None)
    if getattr(chosen, "job", None) and not chosen.out:
        parser.error("a job needs --out")
    return chosen


class Stopped(BaseException):
    """Somebody ends this program: Ctrl-C, or SIGTERM."""


@contextlib.contextmanager
def stoppable():
    """SIGTERM, a closed terminal and Ctrl-C end children and put back what was changed, within seconds."""

    def stop(number, frame):
        for name in names:
            signal.signal(name, signal.SIG_IGN)  # once is enough: clean up in peace
        raise Stopped(signal.Signals(number).name)

    known = [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)]
    names = [name for name in known if signal.getsignal(name) != signal.SIG_IGN]  # as under nohup
    for name in names:
        signal.signal(name, stop)
    yield


def on_job(chosen):
    job = read_job(chosen.job, timing=chosen.command == "bench")
    os.makedirs(chosen.out, exist_ok=True)
    result = {"answer": answer, "bench": bench, "start": start}[chosen.command](job, chosen.out)
    text = json.dumps(result, indent=2).encode()
    # last: a result is there only when all else is
    replace(os.path.join(chosen.out, "result.json"), lambda stream: stream.write(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
