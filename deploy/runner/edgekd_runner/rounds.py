"""The child of `bench` on a bundle: rounds of timed calls, each a file until all are there."""

import os
import shutil

from edgekd_runner.bench import (
    build_calls,
    open_models,
    round_orders,
    round_timer,
    save_samples,
    time_round,
    warm_up_models,
)
from edgekd_runner.bundle import job_settings, load_bundle_inputs
from edgekd_runner.files import load_json, save_json, write_atomic
from edgekd_runner.machine import compute_conditions, describe_machine, read_counters
from edgekd_runner.messages import emit

COMPUTE_CALLS = 200  # whose kernels are timed by the GPU's own clock


def bench_task(bundle, out, spec):
    """Time all engines in one process, round by round; after an interruption, only the rounds that are missing."""
    job, images = job_settings(bundle), load_bundle_inputs(bundle)
    sessions, infos = open_models(job, spec["models"], images)
    for model, info in zip(spec["models"], infos):
        info.update(engine_sha256=info["sha256"], sha256=model["model_sha256"])  # results are about the ONNX file
    calls, before = [build_calls(job, session, images) for session in sessions], read_counters()
    engines = [info["engine_sha256"] for info in infos]
    rounds = Rounds(out, [bundle["sha256"], spec, sessions[0].runtime_info(), engines])
    missing = [number for number in range(job["protocol"]["rounds"]) if number not in rounds.done]
    if missing:
        warm_up_models(sessions, calls, infos, job["protocol"])
    orders = round_orders(len(sessions), job["protocol"])
    time_model = round_timer(job, sessions, infos, calls, images)
    for number in missing:
        ns = [row[0] for row in time_round(job, time_model, orders[number], number)]
        process = {"conditions": compute_conditions(before, read_counters()), "models": infos}
        rounds.save(number, ns, orders[number], process)
        emit({"progress": len(rounds.done), "of": job["protocol"]["rounds"]})
    medians = rounds.join(out)
    models = [dict(info, median_ms=median) for info, median in zip(rounds.processes[0]["models"], medians)]
    for session, model in zip(sessions, models):
        if hasattr(session, "compute_ms"):
            model["compute_ms"] = session.compute_ms(COMPUTE_CALLS)
    return {
        "machine": describe_machine(),
        "runtime": sessions[0].runtime_info(),
        "protocol": job["protocol"],
        "conditions": merge_conditions([process["conditions"] for process in rounds.processes]),
        "models": models,
        "processes": rounds.processes,
        "resumed": len(rounds.processes) > 1,
    }


class Rounds:
    """The rounds of one bench in `OUT/bench.state`; empty where that was begun with another key."""

    def __init__(self, out, key):
        self.folder = os.path.join(out, "bench.state")
        if load_json(os.path.join(self.folder, "key.json")) != key:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.makedirs(self.folder)
            save_json(os.path.join(self.folder, "key.json"), key)
        names = os.listdir(self.folder)
        self.done = sorted(int(n[6:-4]) for n in names if n.startswith("round-") and n.endswith(".npz"))
        count = sum(name.startswith("process-") and name.endswith(".json") for name in names)
        self.processes = [load_json(os.path.join(self.folder, "process-%d.json" % i)) for i in range(count)]
        self.process = count  # the number of this process

    def save(self, number, ns, order, process):
        """Save a round, and the conditions and models of this process so far."""
        import numpy as np

        self.processes = self.processes[: self.process] + [process]
        save_json(os.path.join(self.folder, "process-%d.json" % self.process), process)
        samples = {"ns": np.array(ns, np.int64), "model": np.repeat(order, len(ns) // len(order))}
        samples["process"] = np.full(len(ns), self.process)
        path = os.path.join(self.folder, "round-%d.npz" % number)
        write_atomic(path, lambda stream: np.savez(stream, **samples))
        self.done.append(number)

    def join(self, out):
        """Write `samples.npz` as without an interruption, with the `process` of each call; return medians in ms."""
        import numpy as np

        parts = []
        for number in sorted(self.done):
            with np.load(os.path.join(self.folder, "round-%d.npz" % number)) as part:
                parts.append({key: part[key] for key in part.files})
        ns, model, process = (np.concatenate([part[key] for part in parts]) for key in ("ns", "model", "process"))
        rounds = np.repeat(np.arange(len(parts)), [len(part["ns"]) for part in parts])
        infos = self.processes[0]["models"]
        rows = np.stack([ns, np.zeros_like(ns), rounds, model], 1)
        save_samples(out, infos, rows, process=process.astype(np.int32))
        return [float(np.median(ns[model == index])) / 1e6 for index in range(len(infos))]


def merge_conditions(conditions):
    """Return the worst of the conditions of several processes that shared a bench."""
    merged = {"load_before": conditions[0]["load_before"], "load_after": conditions[-1]["load_after"]}
    for key, combine in (("others_percent", max), ("steal_percent", max), ("throttled", sum)):
        values = [one[key] for one in conditions if one[key] is not None]
        merged[key] = combine(values) if values else None
    return merged
