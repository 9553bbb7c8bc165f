"""Measure how much accuracy INT8 costs in each layer, and how much latency it costs to keep a layer float."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgekd.core.artifact import File, OnnxModel
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Samples
from edgekd.core.metric import Metric
from edgekd.core.mixed_precision import EvalScores, LayerSensitivity
from edgekd.core.target import Target
from edgekd.core.task import Task
from edgekd.onnx import inspect
from edgekd.onnx.session import run_outputs
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.intervals import accuracy_lost, jackknifed
from edgekd.stages.quantize.float_layers import quantizable_layers, select_layers
from edgekd.stages.quantize.quantize import Int8Options, snr_db, write_int8
from edgekd.stages.quantize.ranges import Ranges, load_prepared
from edgekd.utils import progress
from edgekd.utils.arrays import save_array

LAYER_IMAGES = 2048  # validation images to evaluate single layers on, at most
TIMED_INPUTS = 64
# many files, one layer each; what seems to cost nothing is measured again with the candidates
SINGLES_BENCH = BenchConfig(rounds=12, calls_per_round=20, warmup_s=0.1, metrics=("p50_ms",), processes=1)
NONE = np.zeros(0)


@dataclass(frozen=True)
class QuantizableModel:
    """An FP32 network, and how its INT8 files are written."""

    name: str
    path: Path  # the file to evaluate
    timed_path: Path  # the file to time; takes one input at a time
    calibration: np.ndarray  # inputs, (N, ...)
    ranges: Ranges
    options: Int8Options  # its `keep_float` are float in every candidate
    macs: int

    def write(self, path: Path, target: Path, keep_float: Collection[str]) -> OnnxModel:
        """Write `path`, one of the two files, in INT8 to `target`, but for the layers `keep_float`."""
        options = self.options.as_onnx()
        options = replace(options, keep_float=(*options.keep_float, *keep_float))
        return write_int8(path, target, self.calibration, self.ranges, options, self.macs)


@dataclass(frozen=True)
class EvalSet:
    """What files are evaluated on."""

    inputs: np.ndarray  # (N, C, H, W)
    labels: np.ndarray
    fp32_outputs: tuple[np.ndarray, ...]  # each (N, ...)
    task: Task

    @classmethod
    def of(cls, fp32: Path, inputs: np.ndarray, labels: np.ndarray, task: Task) -> EvalSet:
        """Return a set with the outputs of the file `fp32`."""
        return cls(inputs, labels, run_outputs(fp32, inputs), task)

    def part(self, count: int) -> EvalSet:
        """Return `count` samples or fewer, spread evenly, since files are often sorted by class."""
        picks = np.linspace(0, len(self.inputs) - 1, min(count, len(self.inputs))).astype(np.int64)
        outputs = tuple(output[picks] for output in self.fp32_outputs)
        return EvalSet(self.inputs[picks], self.labels[picks], outputs, self.task)

    def fp32_accuracy(self) -> float:
        """Return FP32's accuracy by the primary metric of the task, percent."""
        return primary_metric(self.task).compute(Samples(NONE, NONE, self.fp32_outputs, (), self.labels))

    def evaluate(self, path: Path) -> EvalScores:
        """Return the scores of a file."""
        outputs = run_outputs(path, self.inputs)
        samples = Samples(NONE, NONE, outputs, self.fp32_outputs, self.labels)
        noise = snr_db(*(np.concatenate([part.ravel() for part in parts]) for parts in (self.fp32_outputs, outputs)))
        return EvalScores(primary_metric(self.task).compute(samples), accuracy_drop(samples, self.task), noise)


def primary_metric(task: Task) -> Metric:
    return task.metrics()[task.primary_metric]


def accuracy_drop(samples: Samples, task: Task) -> Interval:
    """Return the points of the primary metric that the reference is ahead on the same images."""
    metric = primary_metric(task)
    if metric.hits:
        return accuracy_lost(metric.hits(replace(samples, outputs=samples.reference)), metric.hits(samples))

    def points_behind(part: Samples) -> float:
        return metric.compute(replace(part, outputs=part.reference)) - metric.compute(part)

    return jackknifed(points_behind, samples)


def measure_layers(model: QuantizableModel, eval_set: EvalSet, ends_only: bool) -> list[LayerSensitivity]:
    """Return every layer that can stay float, with the cost of INT8 in it alone, the noisiest first; none is timed yet.

    With `ends_only`, only the first and the last layer of the network.
    """
    network = load_prepared(model.path)
    spec = inspect.single_input(network, model.path)
    sizes = inspect.shapes(network, spec, model.path)
    always_float = select_layers(network.graph, model.options.keep_float)
    nodes = {n: node for n, node in quantizable_layers(network.graph).items() if node.output[0] not in always_float}
    names = list(nodes)
    if ends_only:
        names = [names[0], names[-1]] if len(nodes) > 2 else []  # one has to stay in INT8
    layers = []
    with (
        TemporaryDirectory(prefix="edgekd-") as folder,
        progress.progress_bar("layers alone in INT8", len(names)) as advance,
    ):
        for name in names:
            int8 = model.write(model.path, Path(folder, "alone.onnx"), nodes.keys() - {name})
            macs = (inspect.node_macs(nodes[name], sizes) or 0) // max((1, *spec.shape[:1]))
            scores = eval_set.evaluate(int8.file.path)
            layers.append(LayerSensitivity(name, nodes[name].op_type, macs, scores, None))
            advance()
    return sorted(layers, key=lambda layer: layer.int8_alone.snr_db)


def measure_latency_ratios(
    out: Path,
    model: QuantizableModel,
    float_sets: Sequence[Collection[str]],
    target_name: str,
    target: Target,
    config: BenchConfig,
) -> tuple[BenchResult, list[Interval], Interval]:
    """Time INT8 files with these sets of float layers, and the FP32 file, interleaved.

    Returns: the benchmark, the latency of each file over that of the first, and the same of the FP32 file. `out` keeps
    the samples.
    """
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        files = {
            f"mix {number}": model.write(model.timed_path, Path(folder, f"{number}.onnx"), keep_float)
            for number, keep_float in enumerate(float_sets)
        }
        files["fp32"] = inspect.describe(model.timed_path, "fp32", model.macs)
        save_array(out / "inputs.npy", np.ascontiguousarray(model.calibration[:TIMED_INPUTS]))
        entries = tuple(
            BenchmarkEntry(label, "student", "", onnx.precision, onnx.file, onnx.macs, onnx.parameters)
            for label, onnx in files.items()
        )
        inputs = File.of(out / "inputs.npy")
        request = BenchmarkRequest(entries, target_name, target, inputs, None, entries[0].name, config)
        result = benchmark(out, request)
    for path in out.glob("*.onnx"):  # they can be written again, and are many
        path.unlink()
    speedups = {m.model.name: m.speedup or Interval(1, 1, 1) for m in result.measurements}
    *ratios, fp32 = (Interval(1 / s.high, 1 / s.estimate, 1 / s.low) for s in (speedups[label] for label in files))
    return result, ratios, fp32
