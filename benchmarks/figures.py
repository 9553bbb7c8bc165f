"""The figures of docs/results/digits.md that need no data: start-up, training speed, and what the digits build reaches.

make figures        (about five minutes on two cores; writes runs/figures/figures.md)
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from edgekd.core.artifact import File
from edgekd.core.augment import Augment
from edgekd.core.dataset import PreparedDataset, Split, SplitArrays
from edgekd.core.method import Phase
from edgekd.models.resnet import ResNet
from edgekd.tasks.classification import Classification
from edgekd.training.dataloader import ArrayLoader
from edgekd.training.trainer import TrainConfig, Trainer
from edgekd.utils.cpu import flags

OUT = Path("runs/figures")
RUNS = 5
IMAGES = 4096


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    lines = [f"Measured {time.strftime('%Y-%m-%d %H:%M')}, {machine()}", "", "| figure | value |", "| --- | --- |"]
    lines += [f"| {what} | {value} |" for what, value in [*start_up(), *training(), *digits()]]
    (OUT / "figures.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {torch.get_num_threads()} threads, {' '.join(flags())}, torch {torch.__version__}"


def seconds(*words: str) -> list[float]:
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgekd", *words], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return taken


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} {unit} ({min(values):.3g} to {max(values):.3g}, {len(values)} runs)"


def start_up() -> list[tuple[str, str]]:
    return [("`edgekd --help`", spread(seconds("--help"), "s"))]


def training() -> list[tuple[str, str]]:
    """Images a second of a ResNet-20 student alone, batch 256, random 32x32 images, with the trainer itself."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    arrays = SplitArrays(images, random.integers(0, 10, IMAGES))
    none = Split(File(Path(), ""), File(Path(), ""))
    classes, mean, std = tuple("0123456789"), (0.5,) * 3, (0.25,) * 3
    dataset = PreparedDataset(none, none, none, classes, (3, 32, 32), mean, std, Classification())
    rows = []
    rates: dict[str, list[float]] = {"bf16": [], "fp32": []}
    for _ in range(RUNS):  # in turn, so that a slow moment of the machine meets both
        for precision, taken in rates.items():
            taken.append(rate(precision, arrays, dataset))
    for precision, taken in rates.items():
        rows.append((f"ResNet-20 alone, batch 256, {precision}", spread(taken, "images/s")))
    ratios = [fast / slow for fast, slow in zip(rates["bf16"], rates["fp32"], strict=True)]
    return [*rows, ("bf16 over fp32, pair by pair", spread(ratios, "times"))]


def rate(precision: str, arrays: SplitArrays, dataset: PreparedDataset) -> float:
    device = torch.device("cpu")
    feed = ArrayLoader(arrays, dataset, Augment(crop=4, flip=True), device)
    config = TrainConfig(batch=256, precision="bf16" if precision == "bf16" else "fp32")
    trainer = Trainer(feed, feed, config, 0, device)
    network = ResNet(20, 16).build(10, 3).to(memory_format=torch.channels_last)
    phase = Phase("speed", (network,), lambda b: {"task": dataset.task.loss(network(b.x), b.y)}, 1)
    network.train()
    optimiser = trainer.optimiser(phase)
    started = time.perf_counter()
    trainer.epoch(phase, 0, optimiser, 0)
    return IMAGES / (time.perf_counter() - started)


def digits() -> list[tuple[str, str]]:
    """A whole build of the embedded default, and a second one with nothing changed."""
    shutil.rmtree(OUT / "digits", ignore_errors=True)
    words = ("build", "digits", "--target", "cpu", "--out", str(OUT / "digits"))
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "edgekd", *words], check=True)
    first = time.perf_counter() - started
    again = seconds(*words)
    record = json.loads((OUT / "digits" / "report.json").read_text())
    (bench,) = record["benches"]
    models = {m["model"]["name"]: m for m in bench["measurements"]}
    teacher, fp32, int8 = models["teacher fp32"], models["kpn fp32"], models["kpn int8"]
    ratio = int8["speedup"]
    return [
        ("digits: first build", f"{first:.0f} s"),
        ("digits: second build, nothing changed", spread(again, "s")),
        ("digits: MACs, teacher over student", f"{teacher['contestant']['macs'] / int8['contestant']['macs']:.1f}"),
        (
            "digits: top-1 teacher / student fp32 / int8",
            " / ".join(f"{m['readings']['top1']:.2f}" for m in (teacher, fp32, int8)),
        ),
        (
            "digits: median latency, teacher fp32 over student int8",
            f"{ratio['mid']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})",
        ),
        ("digits: A/A control", f"{bench['aa']['mid']:.3f} ({bench['aa']['low']:.3f}-{bench['aa']['high']:.3f})"),
    ]


if __name__ == "__main__":
    main()
