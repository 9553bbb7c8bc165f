"""Sensitivity: what INT8 costs in each layer alone, and what it costs in latency to keep that layer float."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from edgekd.core.artifact import File, OnnxModel
from edgekd.core.bench_result import BenchResult, Contestant, Interval, Trial
from edgekd.core.mixed_precision import Layer, Marks
from edgekd.core.quant_scheme import Dialect
from edgekd.core.target import Target
from edgekd.metrics._compute import readings
from edgekd.onnx import inspect, session
from edgekd.stages.bench.benchmark import benchmark
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.intervals import jackknifed, lost, right
from edgekd.stages.quantize.auto_method import JUDGES
from edgekd.stages.quantize.float_layers import chosen, layers
from edgekd.stages.quantize.quantize import convert, in_pairs, ratio_db
from edgekd.stages.quantize.ranges import Ranges, prepared
from edgekd.utils import progress
from edgekd.utils.arrays import save_array

RANKED = 2048  # validation images that single layers are judged on, at most
TIMED = 64  # inputs that are timed
# many files, one layer each; what seems to cost nothing is looked at again with the mixes
SINGLES = BenchConfig(blocks=12, calls=20, warmup_s=0.1, metrics=("p50_ms",), sessions=1)
NONE = np.zeros(0)


@dataclass(frozen=True)
class Subject:
    """A network in FP32, and how its INT8 files are made."""

    answering: Path  # the file whose answers are judged
    timed: Path  # the file whose calls are timed; takes one input at a time
    known: np.ndarray  # calibration inputs, (N, ...)
    dialect: Dialect
    ranges: Ranges
    macs: int
    base: tuple[str, ...] = ()  # layers that stay float in every mix
    correct_bias: bool = False

    def write(self, path: Path, target: Path, floats: Collection[str]) -> OnnxModel:
        """`path`, one of its two files, in INT8 but for `floats` and the base."""
        known, form, kept = self.known, in_pairs(self.dialect), (*self.base, *floats)
        return convert(path, target, known, form, self.ranges, self.macs, kept, self.correct_bias)


@dataclass(frozen=True)
class Exam:
    """What files are judged on: network inputs (N, C, H, W), their labels, and what FP32 answers."""

    inputs: np.ndarray
    labels: np.ndarray
    want: np.ndarray

    @classmethod
    def of(cls, fp32: Path, inputs: np.ndarray, labels: np.ndarray) -> Exam:
        return cls(inputs, labels, session.answers(fp32, inputs))

    def part(self, most: int) -> Exam:
        """So many of them, spread evenly, for files are often sorted by class."""
        picks = np.linspace(0, len(self.inputs) - 1, min(most, len(self.inputs))).astype(np.int64)
        return Exam(self.inputs[picks], self.labels[picks], self.want[picks])

    def accuracy(self) -> tuple[str, float]:
        """The metric that judges these labels, and what FP32 reaches by it, percent."""
        (found,) = readings(Trial(NONE, NONE, self.want, NONE, self.labels), JUDGES).items()
        return found

    def marks(self, path: Path) -> Marks:
        trial = Trial(NONE, NONE, session.answers(path, self.inputs), self.want, self.labels)
        (percent,) = readings(trial, JUDGES).values()
        return Marks(percent, drop(trial), ratio_db(self.want, trial.logits))


class Behind:
    """Points by which maps are less accurate than those of the reference; as a metric, for its interval."""

    unit = "points"
    better: Literal["higher", "lower"] = "lower"
    needs = 0
    reads: tuple[str, ...] = ("logits", "reference", "labels")
    maps: bool | None = True

    def __call__(self, trial: Trial) -> float:
        (own,) = readings(trial, JUDGES).values()
        (theirs,) = readings(replace(trial, logits=trial.reference), JUDGES).values()
        return theirs - own


def drop(trial: Trial) -> Interval:
    """Points of accuracy that the reference is ahead on the same images."""
    if trial.logits.ndim == 2:
        return lost(right(trial.reference, trial.labels), right(trial.logits, trial.labels))
    return jackknifed(Behind(), trial)


def ranked(subject: Subject, exam: Exam, outermost: bool) -> list[Layer]:
    """Every layer that can be freed, with what INT8 costs in it alone, the noisiest first; none has a price yet.

    With `outermost`, the first and the last of the network only.
    """
    graph = prepared(subject.answering)
    spec = inspect.single_input(graph, subject.answering)
    sizes = inspect.shapes(graph, spec, subject.answering)
    fixed = chosen(graph.graph, subject.base)
    free = {name: node for name, node in layers(graph.graph).items() if node.output[0] not in fixed}
    looked = list(free)
    if outermost:
        looked = [looked[0], looked[-1]] if len(free) > 2 else []  # one has to stay in INT8
    found = []
    with (
        TemporaryDirectory(prefix="edgekd-") as folder,
        progress.bar("layers alone in INT8", len(looked)) as advance,
    ):
        for name, node in ((name, free[name]) for name in looked):
            made = subject.write(subject.answering, Path(folder, "alone.onnx"), free.keys() - {name})
            macs = (inspect.node_macs(node, sizes) or 0) // max((1, *spec.shape[:1]))
            found.append(Layer(name, node.op_type, macs, exam.marks(made.file.path), None))
            advance()
    return sorted(found, key=lambda layer: layer.alone.snr_db)


def timed(
    out: Path,
    subject: Subject,
    mixes: Sequence[Collection[str]],
    name: str,
    target: Target,
    config: BenchConfig,
) -> tuple[BenchResult, list[Interval], Interval]:
    """The prices of mixes, then of the float file: latencies by turns over that of the first mix. `out` keeps samples.

    `name` is the target's.
    """
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        files = {
            f"mix {number}": subject.write(subject.timed, Path(folder, f"{number}.onnx"), floats)
            for number, floats in enumerate(mixes)
        }
        files["fp32"] = inspect.described(subject.timed, "fp32", subject.macs)
        save_array(out / "inputs.npy", np.ascontiguousarray(subject.known[:TIMED]))
        asked = tuple(
            Contestant(label, "student", "", made.precision, made.file, made.macs, made.parameters)
            for label, made in files.items()
        )
        result = benchmark(out, asked, name, target, File.of(out / "inputs.npy"), None, asked[0].name, config)
    for path in out.glob("*.onnx"):  # they can be made again, and are many
        path.unlink()
    speedups = {m.contestant.name: m.speedup or Interval(1, 1, 1) for m in result.measurements}
    *prices, fp32 = (Interval(1 / s.high, 1 / s.mid, 1 / s.low) for s in (speedups[label] for label in files))
    return result, prices, fp32
