"""Calibration beside other tools: peak memory of entropy ranges, seconds of min-max ranges, and whole runs of Olive.

    python benchmarks/calibration.py [--olive /path/to/its/environment/bin/python]

One MobileNetV2 (3 x 96 x 96, random weights: they change neither memory nor time) and noise for images. Every figure is
of a process of its own, by turns with what it is compared with, and its peak is the resident memory that the system
reports of that process, mapped images included. Seconds are of the processor (user and system) and of the clock. Of
min-max ranges only the calibration is timed, of Olive and of `edgekd quantize` the whole command, both with unsigned
activations, weights per channel and min-max ranges.

Olive (`pip install olive-ai requests 'pydantic<2.14' torch onnxruntime`) needs an environment of its own; it is left
out without one. Its messages to its maker are turned off. Quote ratios of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COUNTS = (16, 128, 256, 1024)  # images in a file
MADE = """
import sys
from pathlib import Path
import numpy as np, torch
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.stages.export.export import ExportConfig, export
from edgekd.tasks.classification import Classification
torch.manual_seed(0)
out, size, *counts = Path(sys.argv[1]), *map(int, sys.argv[2:])
images = np.random.default_rng(0).standard_normal((max(counts), 3, size, size), np.float32)
outputs = Classification().outputs(10, (3, size, size))
export(out, "network", MobileNetV2Model().build(10, 3), images[:8], outputs, ExportConfig())
for count in counts:
    np.savez(out / f"images-{count}.npz", image=images[:count])
"""
OURS = """
import logging, sys, time
from pathlib import Path
from edgekd.onnx.inspect import facts
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate
import onnx, onnxruntime.quantization
model, images, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
start, used = time.perf_counter(), time.process_time()
calibrate(model, load_calibration(images, facts(model).input), QuantizeConfig(method=method))
print("seconds", time.process_time() - used, time.perf_counter() - start)
"""
THEIRS = """
import sys, time
import numpy as np
from onnxruntime.quantization import create_calibrator
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod
model, images, method, folder = sys.argv[1:]
class Reader(CalibrationDataReader):
    def __init__(self, array):
        self.feeds = iter([{"image": array[i : i + 1]} for i in range(len(array))])
    def get_next(self):
        return next(self.feeds, None)
start, used = time.perf_counter(), time.process_time()
kind = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}[method]
calibrator = create_calibrator(model, None, f"{folder}/augmented.onnx", kind)
calibrator.collect_data(Reader(np.load(images)["image"]))
calibrator.compute_data()
print("seconds", time.process_time() - used, time.perf_counter() - start)
"""
FEED = """
import numpy as np
import torch
from olive.data.registry import Registry
class Images(torch.utils.data.Dataset):
    def __init__(self, path):
        self.images = np.load(path)["image"]
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return {"image": self.images[index]}, 0
@Registry.register_dataset()
def images(data_dir, **kwargs):
    return Images(data_dir)
"""


@dataclass(frozen=True)
class Ran:
    """What one process took."""

    peak_mb: float
    used_s: float  # processor, of the whole process or of the part that it timed itself
    clock_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--olive", type=Path, help="the Python of an environment that has olive-ai")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--size", type=int, default=96, help="height and width of an image")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    process([sys.executable, "-c", MADE, str(out), str(asked.size), *map(str, COUNTS)])
    lines, kept = [f"MobileNetV2, 3 x {asked.size} x {asked.size}; load {os.getloadavg()[0]:.1f}"], {}
    for title, sides, readings in comparisons(out, asked.olive):
        found = by_turns(sides, asked.repeats)
        kept[title] = {name: [vars(ran) for ran in runs] for name, runs in found.items()}
        lines += [title, *(line for reading in readings for line in told(found, reading))]
        print("\n".join(lines[-1 - 3 * len(readings) :]), flush=True)
    if asked.olive is None:
        lines.append("Olive is left out: no environment was named with --olive")
        print(lines[-1])
    (out / "calibration.json").write_text(json.dumps(kept, indent=2))
    (out / "calibration.txt").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Reading:
    """A part of what processes took, and the goal for the ratio of the first to the second."""

    field: str
    words: str
    unit: str
    at_most: bool
    goal: float


Sides = dict[str, Callable[[], Ran]]


def comparisons(out: Path, olive: Path | None) -> list[tuple[str, Sides, tuple[Reading, ...]]]:
    """Title, what is compared, and what is read of it."""

    def ours(method: str, count: int) -> Callable[[], Ran]:
        return lambda: process([sys.executable, "-c", OURS, *files(count), method])

    def theirs(method: str, count: int) -> Callable[[], Ran]:
        return lambda: process([sys.executable, "-c", THEIRS, *files(count), method, str(out)])

    def files(count: int) -> tuple[str, str]:
        return str(out / "network.onnx"), str(out / f"images-{count}.npz")

    def seconds(at_most: bool, goal: float) -> tuple[Reading, ...]:
        kinds = (("used_s", "processor"), ("clock_s", "clock"))
        return tuple(Reading(field, words, "s", at_most, goal) for field, words in kinds)

    entropy: Sides = {"edgekd, 1024 images": ours("entropy", 1024), "edgekd, 16 images": ours("entropy", 16)}
    against: Sides = {
        "onnxruntime, 128 images": theirs("entropy", 128),
        "edgekd, 128 images": ours("entropy", 128),
    }
    minmax: Sides = {"edgekd, 256 images": ours("minmax", 256), "onnxruntime, 256 images": theirs("minmax", 256)}
    found = [
        ("entropy ranges", entropy, (Reading("peak_mb", "peak", "MB", True, 1.5),)),
        ("entropy ranges, against onnxruntime", against, (Reading("peak_mb", "peak", "MB", False, 5.0),)),
        ("min-max ranges", minmax, seconds(True, 1.0)),
    ]
    if olive is not None:
        model, images = files(256)
        words = [sys.executable, "-m", "edgekd", "quantize", model, "--calib", images, "--out", str(out / "int8.onnx")]
        whole: Sides = {"olive": lambda: by_olive(olive, out, model, images), "edgekd quantize": lambda: process(words)}
        found.append(("whole runs, 256 images", whole, seconds(False, 2.0)))
    return found


def by_olive(python: Path, out: Path, model: str, images: str) -> Ran:
    """Olive's static quantization by its own command, without what an earlier run left in its cache."""
    name = f"olive-{time.time_ns()}"
    (out / "feed.py").write_text(FEED)
    int8 = {"activation_type": "uint8", "precision": "int8", "per_channel": True, "quant_format": "QDQ"}
    calib = {
        "name": "calib",
        "user_script": str(out / "feed.py"),
        "load_dataset_config": {"type": "images", "data_dir": images},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "default_dataloader", "batch_size": 1},
    }
    config = {
        "input_model": {"type": "ONNXModel", "model_path": model},
        "data_configs": [calib],
        "passes": {
            "int8": {"type": "OnnxStaticQuantization", "data_config": "calib", "calibrate_method": "MinMax", **int8}
        },
        "output_dir": str(out / name),
        "cache_dir": str(out / f"{name}-cache"),
    }
    (out / "olive.json").write_text(json.dumps(config))
    ran = process([str(python), "-m", "olive", "run", "--config", str(out / "olive.json")])
    if not (out / name / "model.onnx").exists():
        raise SystemExit("Olive ended without an INT8 file")
    return ran


def process(words: list[str]) -> Ran:
    """Run a command to its end. This process stays small: a child begins with the peak of the one that starts it."""
    quiet = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
    started = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet)
    said = child.stdout.read() if child.stdout else ""
    _, status, usage = os.wait4(child.pid, 0)
    took = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(said[-3000:])
    own = [line.split()[1:] for line in said.splitlines() if line.startswith("seconds ")]
    used, clock = map(float, own[0]) if own else (usage.ru_utime + usage.ru_stime, took)
    return Ran(usage.ru_maxrss / 1024, used, clock)


def by_turns(sides: Sides, repeats: int) -> dict[str, list[Ran]]:
    found: dict[str, list[Ran]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in sorted(sides, reverse=bool(number % 2)):
            found[name].append(sides[name]())
    return found


def told(found: dict[str, list[Ran]], asked: Reading) -> list[str]:
    """The median of the ratios decides: both sides of a pair saw the machine alike."""
    read = {name: [float(getattr(ran, asked.field)) for ran in runs] for name, runs in found.items()}
    lines = [
        f"  {name}: {asked.words} {statistics.median(values):.4g} {asked.unit} "
        f"({min(values):.4g} to {max(values):.4g}, {len(values)} runs)"
        for name, values in read.items()
    ]
    ratios = sorted(a / b for a, b in zip(*read.values(), strict=True))
    mid = statistics.median(ratios)
    met = mid <= asked.goal if asked.at_most else mid >= asked.goal
    goal = f"{'at most' if asked.at_most else 'at least'} {asked.goal:g}: {'met' if met else 'NOT met'}"
    return [*lines, f"  ratio {mid:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); goal: {goal}"]


if __name__ == "__main__":
    main()
