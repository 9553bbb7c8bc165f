"""Command `bench` of a job: calls of all models, timed in randomised interleaved rounds."""

import functools
import os

from edgekd_runner.backends.registry import open_model
from edgekd_runner.checks import load_inputs
from edgekd_runner.errors import HINT_CHECK_MODEL, RunnerError, first_line
from edgekd_runner.files import write_atomic
from edgekd_runner.machine import compute_conditions, describe_machine, read_counters
from edgekd_runner.messages import emit
from edgekd_runner.timing import loop_overhead_ns, no_op, settle, time_block, time_burst, warm_up

MAX_INPUTS = 64  # that timed calls go through
MIN_INPUTS = 4  # where calls are of many images
BURST_S = 0.2  # at least, that the calls of a round take where several are in flight


def bench_job(job, out):
    """Time calls and write `samples.npz` (ns, late_ns, round, model), in order of time.

    The job's scope says what a call contains. Each is timed alone; with a `rate` from when it was due, whether or not
    the call before it was over; with `throughput`, all calls of a round are timed together, several in flight at once.
    """
    protocol, images = job["protocol"], load_inputs(job["inputs"])
    sessions, infos = open_models(job, job["models"], images)
    calls, before = [build_calls(job, session, images) for session in sessions], read_counters()
    warm_up_models(sessions, calls, infos, protocol)
    served = [index for index, info in enumerate(infos) if keeps_up(info, protocol)]
    time_model, rows = round_timer(job, sessions, infos, calls, images), []
    for number, order in enumerate(round_orders(len(sessions), protocol)):
        rows += time_round(job, time_model, [index for index in order if index in served], number)
        emit({"progress": number + 1, "of": protocol["rounds"]})
    save_samples(out, infos, rows)
    return {
        "machine": describe_machine(),
        "conditions": compute_conditions(before, read_counters()),
        "runtime": sessions[0].runtime_info(),
        "protocol": protocol,
        "models": infos,
        "overhead_ns": loop_overhead_ns(),
    }


def open_models(job, models, images):
    """Return sessions that take the images of one call, and for each the facts of its file and settings."""
    sessions, infos, batch = [], [], job.get("batch", 1)
    for model in models:
        session, info = open_model(job, model, images)
        if session.batch not in (None, batch):
            batch_text = "one image" if batch == 1 else "%d images" % batch
            raise RunnerError(
                "`%s` has a fixed batch of %d" % (model["name"], session.batch),
                "calls are timed with %s: give a file with a batch of %d, or a dynamic one" % (batch_text, batch),
            )
        sessions.append(session)
        infos.append(dict(info, **session.model_info()))
    return sessions, infos


def select_inputs(images, batch=1):
    """Return the inputs of timed calls, (batch, C, H, W) each, evenly from all over the images."""
    import numpy as np

    count = max(min(len(images), MAX_INPUTS) // batch, MIN_INPUTS if batch > 1 else 1)
    indices = np.linspace(0, len(images) - 1, count * batch).astype(int)
    return [np.array(images[indices[i::count]]) for i in range(count)]


def build_calls(job, session, images):
    """Return for each of the inputs what prepares a call, untimed, and the call, by the job's scope."""
    inputs, scope = select_inputs(images, job.get("batch", 1)), job.get("scope", "end_to_end")
    if scope == "inference_only":
        return [session.bind(x) for x in inputs]
    if scope == "with_preprocessing":
        return [(no_op, call_on_pictures(session, x, job.get("normalize", {}))) for x in inputs]
    return [(no_op, functools.partial(session.run, x)) for x in inputs]


def call_on_pictures(session, x, normalize):
    """Return a call from pictures, (batch, H, W, C) uint8, to the class of each and its probability.

    The pictures are `x` before it was normalized. Outputs that are not (batch, classes) stay as they are.
    """
    import numpy as np

    mean, std = (np.array(normalize.get(key, usual), np.float32) for key, usual in (("mean", 0), ("std", 1)))
    if x.ndim != 4 or mean.size not in (1, x.shape[1]) or std.size not in (1, x.shape[1]):
        fact = "inputs of %s cannot be made from pictures with that `normalize`" % "x".join(map(str, x.shape[1:]))
        hint = "the scope with_preprocessing needs channels, height, width, and a mean and std for each channel"
        raise RunnerError(fact, hint)
    pictures = np.clip(np.rint((x.transpose(0, 2, 3, 1) * std + mean) * 255), 0, 255).astype(np.uint8)

    def call():
        scaled = (pictures.astype(np.float32) / np.float32(255) - mean) / std
        y = session.run(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))[0]
        if y.ndim != 2:
            return y
        exponentials = np.exp(y - y.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        return probabilities.argmax(1), probabilities.max(1)

    return call


def warm_up_models(sessions, calls, infos, protocol):
    for number, (session, model_calls, info) in enumerate(zip(sessions, calls, infos)):
        emit({"progress": 0, "of": protocol["rounds"], "note": "warm-up %d of %d" % (number + 1, len(infos))})
        try:
            info["warmup"] = warm_up(model_calls, protocol)
        except session.errors as error:
            fact = "`%s` does not run again and again: %s" % (info["name"], first_line(error))
            raise RunnerError(fact, HINT_CHECK_MODEL, 1)


def keeps_up(info, protocol):
    """Return whether a model can be called at the protocol's rate; the queue of one that cannot grows without end."""
    return not protocol.get("rate") or protocol["rate"] * info["warmup"]["median_ns"] < 1e9


def round_orders(models, protocol):
    """Return the random order of the models in every round; the same seed gives the same."""
    import numpy as np

    random = np.random.RandomState(protocol["seed"])
    return [random.permutation(models).tolist() for _ in range(protocol["rounds"])]


def round_timer(job, sessions, infos, calls, images):
    """Return a function that times a model's calls of a round: (model, number of the first call) -> a row per call.

    A row is (nanoseconds, nanoseconds that the call began late).
    """
    protocol = job["protocol"]
    if protocol.get("throughput"):
        inputs = select_inputs(images, job.get("batch", 1))
        for session, info in zip(sessions, infos):
            few = protocol["calls_per_round"] * info["calls_in_flight"]
            burst_ns = min(time_burst(session, inputs, few) for _ in range(2))
            info["calls_per_round"] = max(few, int(BURST_S * 1e9 * few / burst_ns))
        return lambda index, first: [(time_burst(sessions[index], inputs, infos[index]["calls_per_round"]), 0)]
    count = protocol["calls_per_round"]
    if protocol.get("rate"):
        return lambda index, first: time_block(calls[index], first, count, protocol["rate"])
    return lambda index, first: [(ns, 0) for ns in time_block(calls[index], first, count)]


def time_round(job, time_model, order, number):
    """Return the calls of every model, in order of time: (nanoseconds, nanoseconds late, round, model)."""
    rows = []
    for index in order:
        if job["threads"] != 1:
            settle()
        first = number * job["protocol"]["calls_per_round"]  # all models of a round see the same inputs
        rows += [(ns, late, number, index) for ns, late in time_model(index, first)]
    return rows


def save_samples(out, infos, rows, **arrays):
    """Write `samples.npz`; a `model` counts into `names`."""
    import numpy as np

    ns, late, rounds, model = np.array(rows, np.int64).reshape(-1, 4).T
    samples = {"ns": ns, "late_ns": late, "round": rounds.astype(np.int32), "model": model.astype(np.int32)}
    samples["names"] = np.array([str(info["name"]) for info in infos])
    samples.update(arrays)
    write_atomic(os.path.join(out, "samples.npz"), lambda stream: np.savez(stream, **samples))
