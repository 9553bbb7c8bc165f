"""The runner's clock beside a bare loop's and MLPerf's: one file, one thread, ONNX Runtime, by turns.

    pip install mlcommons-loadgen
    python benchmarks/loadgen.py student.onnx [--repeats 9]

MLPerf's LoadGen calls in its scenario SingleStream, one query after another, and its 50th percentile is taken from its
summary. Then the same with a network that does nothing (Identity), where all that is timed is Python, the runtime and
the clock: what the runner adds to a call is its median less that of the bare loop. The exit code is 1 unless medians
agree within 3 %, and the runner adds less than 10 microseconds. Quote ratios of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgekd.core.artifact import File
from edgekd.metrics.latency import nearest_rank
from edgekd.onnx.inspect import facts
from edgekd.stages.bench.benchmark import save_noise
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import job, nanoseconds, run
from edgekd.targets.cpu import Cpu

TOLERANCE = 0.03  # of medians
OVERHEAD_US = 10.0
WARMUP_S = 1.0
CALLS = 1050
WARM = """
import sys, time
import numpy as np, onnxruntime
path, inputs, calls, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = [{session.get_inputs()[0].name: np.array(x[None])} for x in np.load(inputs, mmap_mode="r")]
end = time.perf_counter() + seconds
while time.perf_counter() < end:
    session.run(None, feeds[0])
"""
BARE = """
times = []
for i in range(calls):
    feed = feeds[i % len(feeds)]
    start = time.perf_counter_ns()
    session.run(None, feed)
    times.append(time.perf_counter_ns() - start)
print("median_ns", sorted(times)[calls // 2])
"""
LOADGEN = """
import os, re
import mlperf_loadgen as lg
def issue(samples):
    for sample in samples:
        session.run(None, feeds[sample.index])
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0)])
settings = lg.TestSettings()
settings.scenario, settings.mode = lg.TestScenario.SingleStream, lg.TestMode.PerformanceOnly
settings.min_query_count = settings.max_query_count = calls
settings.min_duration_ms = 0
log = lg.LogSettings()
log.log_output = lg.LogOutputSettings()
log.log_output.outdir, log.enable_trace = sys.argv[5], False
system = lg.ConstructSUT(issue, lambda: None)
library = lg.ConstructQSL(len(feeds), len(feeds), lambda samples: None, lambda samples: None)
lg.StartTestWithLogSettings(system, library, settings, log)
lg.DestroyQSL(library)
lg.DestroySUT(system)
summary = open(os.path.join(sys.argv[5], "mlperf_log_summary.txt")).read()
print("median_ns", re.search(r"50.00 percentile latency \\(ns\\)\\s*:\\s*(\\d+)", summary)[1])
"""
Clock = Callable[[Path, File], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="ONNX file with a batch of 1")
    parser.add_argument("--repeats", type=int, default=9, help="turns of every clock")
    parser.add_argument("--out", type=Path, default=Path("runs/loadgen"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    inputs = save_noise(asked.out, facts(asked.model).input.shape[1:], seed=0)
    nothing = asked.out / "nothing.onnx"
    identity(asked.model, nothing)
    clocks: dict[str, Clock] = {"runner": runner_us, "bare loop": bare_us, "LoadGen": loadgen_us}
    seen = by_turns(asked.model, inputs, clocks, asked.repeats)
    idle = by_turns(nothing, inputs, clocks, asked.repeats)
    (asked.out / "loadgen.json").write_text(
        json.dumps({"load": os.getloadavg(), "it": seen, "nothing": idle}, indent=2)
    )
    agree = [told(name, seen["runner"], seen[name]) for name in ("bare loop", "LoadGen")]
    for name, values in idle.items():
        print(f"a network that does nothing, {name}: {statistics.median(values):.2f} us a call")
    added = statistics.median(ours - theirs for ours, theirs in zip(idle["runner"], idle["bare loop"], strict=True))
    print(f"the runner adds {added:+.2f} us to a bare loop: {'below' if added < OVERHEAD_US else 'NOT below'} 10 us")
    return 0 if all(agree) and added < OVERHEAD_US else 1


def by_turns(path: Path, inputs: File, clocks: dict[str, Clock], repeats: int) -> dict[str, list[float]]:
    """Medians in microseconds by the name of a clock; each is first once in a while."""
    names = list(clocks)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seen[name].append(clocks[name](path, inputs))
    return seen


def told(name: str, ours: list[float], theirs: list[float]) -> bool:
    """The median of the ratios decides: the clocks of a turn saw the machine alike."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    mid = statistics.median(ratios)
    within = abs(mid - 1) <= TOLERANCE
    print(
        f"runner {statistics.median(ours):.1f} us, {name} {statistics.median(theirs):.1f} us; ratio {mid:.3f} "
        f"({ratios[0]:.3f}-{ratios[-1]:.3f} in {len(ratios)} turns): {'within' if within else 'NOT within'} 3 %",
        flush=True,
    )
    return within


def runner_us(path: Path, inputs: File) -> float:
    config = BenchConfig(rounds=30, calls_per_round=35, warmup_s=WARMUP_S, metrics=("p50_ms",))
    with tempfile.TemporaryDirectory() as out:
        run("bench", Path(out), job({"it": File.of(path)}, Cpu(), inputs, config), "bench", config.rounds)
        (ns,) = nanoseconds(File.of(Path(out) / "samples.npz"), 1, config.rounds)
        return nearest_rank(ns.ravel(), 50) / 1e3


def bare_us(path: Path, inputs: File) -> float:
    return spoken([WARM + BARE, str(path), str(inputs.path), str(CALLS), str(WARMUP_S)])


def loadgen_us(path: Path, inputs: File) -> float:
    with tempfile.TemporaryDirectory() as out:
        return spoken([WARM + LOADGEN, str(path), str(inputs.path), str(CALLS), str(WARMUP_S), out])


def spoken(words: list[str]) -> float:
    ran = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, check=False)
    found = [line for line in ran.stdout.splitlines() if line.startswith("median_ns")]
    if not found:
        raise SystemExit(ran.stdout[-2000:] + ran.stderr[-2000:])
    return float(found[0].split()[1]) / 1e3


def identity(path: Path, place: Path) -> None:
    """Write a network that gives back what it takes, of the same shape as that at `path` takes."""
    shape = facts(path).input.shape
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), place)


if __name__ == "__main__":
    sys.exit(main())
