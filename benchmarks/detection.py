"""Whether a slowdown of 3 % is found, and none where there is none: many short comparisons of one network with itself.

    python benchmarks/detection.py student.onnx [--runs 40] [--neighbour 0]

In every run the file stands beside a copy of itself, and beside the same network with operators more, whose length is
calibrated beforehand until the two medians are 3 % apart in a comparison of 20 sessions. `--neighbour CORE` keeps that
core busy all the while; there, "too noisy to say" and "no measurable difference" are no mistakes. A run is what
`edgekd bench` does, with its defaults. The exit code is 1 unless 95 % of the slowdowns were found (which a neighbour
excuses from), at most 5 % of the copies were called different, and none of the slowdowns was called a gain.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.core.bench_result import BenchResult
from edgekd.onnx.inspect import facts
from edgekd.stages.bench.compare_files import FileComparison, compare_files, table
from edgekd.stages.bench.config import BenchConfig

SLOWDOWN = 0.03
FOUND, ALARMS = 0.95, 0.05  # shares of the runs
CLOSE = 0.0015  # that the calibrated slowdown may be away from 3 %
BUSY = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="ONNX file with a batch of 1, of about a millisecond")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--neighbour", type=int, help="a core that another process keeps busy")
    parser.add_argument("--length", type=int, help="of the operator, where it is known from an earlier calibration")
    parser.add_argument("--processes", type=int, default=BenchConfig().processes)
    parser.add_argument("--out", type=Path, default=Path("runs/detection"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    files = (asked.out / "it.onnx", asked.out / "copy.onnx", asked.out / "slower.onnx")
    shutil.copyfile(asked.model, files[0])
    shutil.copyfile(asked.model, files[1])
    length = asked.length or calibrated(files[0], files[2], asked.target)
    slower(files[0], files[2], length)
    config = BenchConfig(metrics=("p50_ms",), processes=asked.processes)
    told: dict[str, list[str]] = {"copy.onnx": [], "slower.onnx": []}
    with neighbour(asked.neighbour):
        for number in range(asked.runs):
            started = time.monotonic()
            result = once(files, asked.target, config)
            for m in result.measurements[1:]:
                if m.model.name in told:
                    told[m.model.name].append(m.verdict)
            print(f"--- run {number + 1}, {time.monotonic() - started:.0f} s\n{table(result)}", flush=True)
    kept = {"length": length, "neighbour": asked.neighbour, "load": os.getloadavg(), "verdicts": told}
    (asked.out / "detection.json").write_text(json.dumps(kept, indent=2))
    return judged(told, asked.neighbour is not None)


def once(files: tuple[Path, ...], target: str, config: BenchConfig) -> BenchResult:
    with tempfile.TemporaryDirectory() as out:
        return compare_files(Path(out), FileComparison(files, target, config))


def judged(told: dict[str, list[str]], disturbed: bool) -> int:
    counts = {name: Counter(map(kind, verdicts)) for name, verdicts in told.items()}
    found, runs = counts["slower.onnx"]["slower"], len(told["slower.onnx"])
    alarms = counts["copy.onnx"]["slower"] + counts["copy.onnx"]["faster"]
    print(f"\nslowdown of {SLOWDOWN:.0%}: found in {found} of {runs} runs; {dict(counts['slower.onnx'])}")
    print(f"copy: called different in {alarms} of {runs} runs; {dict(counts['copy.onnx'])}")
    holds = alarms <= ALARMS * runs and not counts["slower.onnx"]["faster"]
    return 0 if holds and (disturbed or found >= FOUND * runs) else 1


def kind(verdict: str) -> str:
    return next((word for word in ("slower", "faster", "too noisy") if word in verdict), "no difference")


def calibrated(path: Path, place: Path, target: str) -> int:
    """The length of the operator with which `place` takes 3 % longer than `path`."""
    long, length, seen = BenchConfig(processes=20, rounds=300, warmup_s=0.3, metrics=("p50_ms",)), 2000, 0.0
    for _ in range(6):
        slower(path, place, length)
        result = once((path, place), target, long)
        speedup = next(m.speedup for m in result.measurements if m.model.name == place.name)
        assert speedup is not None
        seen = 1 / speedup.estimate - 1
        print(
            f"an operator on {length} numbers: {seen:+.2%} ({1 / speedup.high - 1:+.2%} to {1 / speedup.low - 1:+.2%})"
        )
        if abs(seen - SLOWDOWN) < CLOSE:
            return length
        length = max(round(length * min(SLOWDOWN / max(seen, 0.003), 10)), 1)
    raise SystemExit(f"the slowdown does not settle: {seen:+.2%}; use a quieter machine, or --length")


def slower(path: Path, place: Path, length: int) -> None:
    """Write the network with one more output, of operators on `length` numbers that come from the input."""
    model = onnx.load(path)
    graph, source = model.graph, facts(path).input.name
    numbers: dict[str, np.ndarray] = {
        "ramp": np.linspace(0, 9, length, dtype=np.float32),
        "first": np.zeros(1, np.int64),
    }
    numbers |= {"end": np.ones(1, np.int64), "all": np.array([-1], np.int64)}
    graph.initializer.extend(numpy_helper.from_array(array, f"more.{name}") for name, array in numbers.items())
    steps = (
        ("Reshape", (source, "more.all"), "more.flat"),
        ("Slice", ("more.flat", "more.first", "more.end"), "more.one"),
        ("Mul", ("more.ramp", "more.one"), "more.scaled"),
        ("Sin", ("more.scaled",), "more.waves"),
        ("ReduceMax", ("more.waves",), "more.peak"),
    )
    graph.node.extend(helper.make_node(kind, taken, [made]) for kind, taken, made in steps)
    graph.output.append(helper.make_tensor_value_info("more.peak", TensorProto.FLOAT, [1]))
    onnx.save(model, place)


@contextmanager
def neighbour(core: int | None) -> Iterator[None]:
    if core is None:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY % core]) as busy:
        try:
            yield
        finally:
            busy.kill()


if __name__ == "__main__":
    sys.exit(main())
