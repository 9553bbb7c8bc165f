"""Fidelity: what quantization costs each tensor of a network, as a signal-to-noise ratio on real inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.onnx import inspect
from edgekd.onnx.graph import QUANTIZE, GraphView, node_label
from edgekd.onnx.writer import RESCALED
from edgekd.stages.explain.float_regions import ABSORBED
from edgekd.utils import progress
from edgekd.utils.arrays import power_ratio_db

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

IMAGES = 64  # that layers are compared on


@dataclass(frozen=True)
class IntegerTensor:
    """A tensor that is stored as 8-bit integers."""

    float_name: str
    integer_name: str
    scale: float
    zero: int
    lowest: int
    highest: int

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return (np.clip(np.round(values / self.scale) + self.zero, self.lowest, self.highest) - self.zero) * self.scale

    def clipped(self, values: np.ndarray) -> np.ndarray:
        """Which values lie more than a step outside of what the integers reach."""
        steps = np.asarray(values / self.scale + self.zero)
        return np.asarray((steps < self.lowest - 1) | (steps > self.highest + 1))


@dataclass(frozen=True)
class LayerError:
    """What one tensor loses. Ratios of the power of the FP32 values to that of their error, dB."""

    tensor: str
    node: str  # of the FP32 file, that makes it; "" for the input
    own_db: float  # rounding and clipping of this tensor alone
    whole_db: float  # with everything that was lost before it
    clipped: float  # share of the values beyond the range
    used: float  # share of the range that 99.9 % of the values lie in


@dataclass
class Sums:
    signal: float = 0.0
    own: float = 0.0
    whole: float = 0.0
    clipped: int = 0
    values: int = 0
    reach: float = 0.0  # summed over images

    def add(self, step: IntegerTensor, exact: np.ndarray, integers: np.ndarray) -> None:
        exact = exact.astype(np.float64)
        quantized = (integers.astype(np.float64) - step.zero) * step.scale
        self.signal += float((exact**2).sum())
        self.own += float(((step.rounded(exact) - exact) ** 2).sum())
        self.whole += float(((quantized - exact) ** 2).sum())
        self.clipped += int(step.clipped(exact).sum())
        self.values += exact.size
        low, high = np.quantile(exact, [0.0005, 0.9995])
        self.reach += float((high - low) / (step.scale * (step.highest - step.lowest)))

    def loss(self, step: IntegerTensor, node: str, images: int) -> LayerError:
        own_db, whole_db = power_ratio_db(self.signal, self.own), power_ratio_db(self.signal, self.whole)
        clipped, used = self.clipped / max(self.values, 1), min(self.reach / images, 1.0)
        return LayerError(step.float_name, node, own_db, whole_db, clipped, used)


def layer_errors(view: GraphView, path: Path, reference: Path, inputs: np.ndarray) -> list[LayerError]:
    """What each quantized tensor of `path` loses against the tensor of the same name in `reference`; in graph order.

    Runs both with onnxruntime's optimisation off, an image at a time. Tensors of other names are left out, and all
    where channels were rescaled before quantization.
    """
    if rescaled(view):
        return []
    exact = inspect.load(reference)
    makers = {name: node_label(node) for node in exact.graph.node for name in node.output}
    makers |= {inspect.single_input(exact, reference).name: ""}
    steps = [replace(step, float_name=taken_up(exact.graph, view, step.float_name)) for step in integer_tensors(view)]
    steps = [step for step in steps if step.float_name in makers]
    if not steps:
        return []
    sessions = [
        exposed(exact, [s.float_name for s in steps]),
        exposed(inspect.load(path), [s.integer_name for s in steps]),
    ]
    sums = [Sums() for _ in steps]
    batch = max(inspect.single_input(exact, reference).shape[0], 1)
    count = min(len(inputs), IMAGES) // batch
    with progress.progress_bar("error of each layer", count) as advance:
        for i in range(count):
            x = inputs[i * batch : (i + 1) * batch]
            before, after = (run(session, names, x) for session, names in sessions)
            for step, total in zip(steps, sums, strict=True):
                total.add(step, before[step.float_name], after[step.integer_name])
            advance(1)
    return [one.loss(step, makers[step.float_name], count) for step, one in zip(steps, sums, strict=True)]


def rescaled(view: GraphView) -> str:
    """What was done to the channels of inner tensors; empty if nothing was."""
    return next((entry.value for entry in view.model.metadata_props if entry.key == RESCALED), "")


def integer_tensors(view: GraphView) -> list[IntegerTensor]:
    """The activations that are stored as integers, with the name that they have in the FP32 file."""
    tensors: dict[str, IntegerTensor] = {}
    for node in view.nodes:
        if node.op_type == QUANTIZE and node.input[0] not in view.input_independent:
            places, name = (1, 2), node.input[0]
        elif node.op_type.startswith("QLinear") or (node.op_type == "QGemm" and len(node.input) > 8):
            places, name = SCALES.get(node.op_type, (len(node.input) - 2, len(node.input) - 1)), node.output[0]
        else:
            continue
        scale, zero = (view.constant_input(node, place) for place in places)
        if scale is None or scale.size != 1 or (zero is not None and zero.dtype not in (np.int8, np.uint8)):
            continue
        limits = np.iinfo(np.uint8 if zero is None else zero.dtype)
        number = 0 if zero is None else int(zero.ravel()[0])
        plain = name.removesuffix("_quantized")  # as onnxruntime's quantizer calls it
        tensors[plain] = IntegerTensor(
            plain, node.output[0], float(scale.ravel()[0]), number, int(limits.min), int(limits.max)
        )
    return list(tensors.values())


def taken_up(graph: onnx.GraphProto, view: GraphView, name: str) -> str:
    """The tensor of the FP32 graph that an integer one stands for: behind its Relu, if that is gone."""
    readers = [node for node in graph.node if name in node.input]
    if len(readers) == 1 and readers[0].op_type in ABSORBED:
        behind = str(readers[0].output[0])
        if behind not in view.producers and f"{behind}_quantized" not in view.producers:
            return behind
    return name


SCALES = {"QLinearConv": (6, 7), "QLinearMatMul": (6, 7), "QLinearConcat": (0, 1), "QGemm": (7, 8)}  # of the output


def exposed(model: onnx.ModelProto, tensors: list[str]) -> tuple[Any, list[str]]:
    """A session that answers these tensors, and their names."""
    import onnx
    import onnxruntime as ort

    inputs = {value.name for value in model.graph.input}
    wanted = list(dict.fromkeys(tensors))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in inputs)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), wanted


def run(session: Any, names: list[str], x: np.ndarray) -> dict[str, np.ndarray]:
    feed = session.get_inputs()[0].name
    answers = [value.name for value in session.get_outputs()]
    outputs = dict(zip(answers, session.run(answers, {feed: x}) if answers else [], strict=True))
    return {name: x if name == feed else outputs[name] for name in names}
