"""One network in ONNX Runtime and in OpenVINO: FP32 against INT8, and the runner beside other clocks.

    python benchmarks/runtimes.py student.onnx --calib images.npz --inputs inputs.npy --labels labels.npy

Of a build: `steps/export-NAME-*/NAME.onnx`, `steps/calibration-*/images.npz`, `steps/test-inputs-*/inputs.npy` and
`steps/data-*/test-labels.npy`. First, latency and accuracy of every form, interleaved by the runner, a process for each
runtime. Then the runner's median beside those of a bare loop around ONNX Runtime and of OpenVINO's `benchmark_app`, by
turns: one file, one image, one process, one thread each. `benchmark_app` reads the clock inside of OpenVINO, with
its input there already: the scope `inference_only` comes nearest to it. Quote ratios of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import serialization
from edgekd.core.artifact import File, Precision
from edgekd.core.bench_result import BenchmarkEntry
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.core.target import Target
from edgekd.metrics.latency import nearest_rank
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.inspect import facts
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark
from edgekd.stages.bench.compare_files import table
from edgekd.stages.bench.config import BenchConfig, Scenario
from edgekd.stages.bench.runner import job, nanoseconds, run
from edgekd.stages.quantize.quantize import quantize_file
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.targets.cpu import Cpu
from edgekd.targets.openvino import OpenVino
from edgekd.utils.arrays import save_array

METRICS = ("top1", "agreement", "mae_vs_fp32", "min_ms", "p50_ms", "p90_ms")
WARMUP_S = 1.0
TOLERANCE = 0.03  # that the runner's median may be away from another clock's

BARE = """
import sys, time
import numpy as np, onnxruntime
path, inputs, calls, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: np.array(np.load(inputs, mmap_mode="r")[:1])}
end = time.perf_counter() + seconds
while time.perf_counter() < end:
    session.run(None, feed)
times = []
for _ in range(calls):
    start = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - start)
print("median_ms", 1e3 * sorted(times)[calls // 2])
"""

APP = """
import sys
sys.modules["openvino_telemetry"] = None  # it would send messages
from openvino.tools.benchmark.benchmark import Benchmark
from openvino.tools.benchmark.main import main
loop = Benchmark.main_loop
def told(*arguments):  # it rounds to 0.01 ms when it prints
    found = loop(*arguments)
    print("median_ms", found[1])
    return found
Benchmark.main_loop = told
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="FP32 ONNX file with a batch of 1")
    for name in ("calib", "inputs", "labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/runtimes"))
    parser.add_argument("--rounds", type=int, default=90)
    parser.add_argument("--repeats", type=int, default=9, help="turns of the runner and of another clock")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    forms = {"fp32": asked.model, "q/dq int8": asked.out / "qdq.onnx"}
    images = load_calibration(asked.calib, facts(asked.model).input)
    quantize_file(asked.model, forms["q/dq int8"], images, QUANT_SCHEMES["openvino"], QuantizeConfig())
    config = BenchConfig(rounds=asked.rounds, metrics=METRICS)
    inputs, labels = File.of(asked.inputs), File.of(asked.labels)
    kept: dict[str, Any] = {"load": os.getloadavg()}
    for target in (Cpu(), OpenVino()):
        who = tuple(contestant(name, path, asked.model) for name, path in forms.items())
        result = benchmark(
            asked.out / target.runtime, BenchmarkRequest(who, target.runtime, target, inputs, labels, "fp32", config)
        )
        print(f"\n{table(result)}", flush=True)
        kept[target.runtime] = serialization.to_json(result)
    print("\nthe runner's median beside another clock's")
    save_array(asked.out / "one.npy", np.array(np.load(asked.inputs, mmap_mode="r")[:1]))
    one = File.of(asked.out / "one.npy")
    plain_call, model_only = Scenario(), Scenario(scope="inference_only")
    for target, clock, called in (
        (Cpu(), bare_ms, plain_call),
        (OpenVino(), app_ms, plain_call),
        (OpenVino(), app_ms, model_only),
    ):
        for name in forms:
            pairs = turns(asked.out / "turns", forms[name], target, called, clock, one, asked.repeats)
            label = f"{target.runtime} {name}, scope {called.scope}"
            kept[f"{label}, ms"] = pairs
            print(told(label, clock.__name__, pairs), flush=True)
    (asked.out / "runtimes.json").write_text(json.dumps(kept, indent=2))


def contestant(name: str, path: Path, model: Path) -> BenchmarkEntry:
    found = facts(model)
    precision: Precision = "fp32" if path == model else "int8"
    return BenchmarkEntry(name, "student", "", precision, File.of(path), found.macs or 0, found.parameters)


def turns(
    out: Path, path: Path, target: Target, called: Scenario, clock: Any, inputs: File, repeats: int
) -> list[tuple[float, float]]:
    """Medians in ms, (of the runner, of another clock), taken by turns, either first; all calls with one image."""
    config = BenchConfig(rounds=30, calls_per_round=35, warmup_s=WARMUP_S, metrics=("p50_ms",))
    calls, file, pairs = config.rounds * config.calls_per_round, File.of(path), []

    def own() -> float:
        run("bench", out, job({"it": file}, target, inputs, config, scenario=called), "bench", config.rounds)
        (ns,) = nanoseconds(File.of(out / "samples.npz"), 1, config.rounds)
        return nearest_rank(ns.ravel(), 50) / 1e6

    for number in range(repeats):
        if number % 2:
            other = clock(path, inputs, calls)
            pairs.append((own(), other))
        else:
            pairs.append((own(), clock(path, inputs, calls)))
    return pairs


def bare_ms(path: Path, inputs: File, calls: int) -> float:
    return spoken([BARE, str(path), str(inputs.path), str(calls), str(WARMUP_S)])


def app_ms(path: Path, inputs: File, calls: int) -> float:
    """The median of `benchmark_app`, which makes up one input and clocks inside of OpenVINO."""
    # it takes no number of threads together with a hint; one stream is what the hint `latency` gives
    words = ["-m", str(path), "-d", "CPU", "-infer_precision", "f32", "-api", "sync", "-niter", str(calls)]
    words += [
        "-ip",
        "f32",
    ]  # else it takes images for pixels, puts a conversion before the network, and times another one
    return spoken([APP, *words, "-hint", "none", "-nstreams", "1", "-nthreads", "1"])


def spoken(words: list[str]) -> float:
    ran = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, check=False)
    found = [line for line in ran.stdout.splitlines() if line.startswith("median_ms")]
    if not found:
        raise SystemExit(ran.stdout[-2000:] + ran.stderr[-2000:])
    return float(found[0].split()[1])


def told(name: str, clock: str, pairs: list[tuple[float, float]]) -> str:
    """The median of the ratios decides: both sides of a pair saw the machine alike."""
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    mid = statistics.median(ratios)
    verdict = "within" if abs(mid - 1) <= TOLERANCE else "NOT within"
    apart = f"{mid:.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f} in {len(pairs)} turns), {1e3 * (ours - theirs):+.1f} us"
    other = f"{clock.removesuffix('_ms')} {theirs:.4f} ms"
    return f"{name}: runner {ours:.4f} ms, {other}; ratio {apart}: {verdict} {TOLERANCE:.0%}"


if __name__ == "__main__":
    main()
