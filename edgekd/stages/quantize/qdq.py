"""Explicit quantization as TensorRT fuses it: Q/DQ pairs before weighted operators and on the skips of Adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import QDQ, GraphView, find_skips
from edgekd.onnx.ops import WEIGHTED, channel_axis

if TYPE_CHECKING:
    import onnx

LARGEST = 127  # of INT8 without -128: as many steps to either side of 0


class QdqWriter:
    """Insert Q/DQ pairs into a graph; one pair serves all quantized consumers of a tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.pairs_before: dict[str, list[onnx.NodeProto]] = {}  # nodes to write in front of a node, by its output
        self.dequantized: dict[tuple[str, int | None], str] = {}  # by tensor and axis: the output of its pair

    def insert(self, consumer: onnx.NodeProto, position: int, amax: np.ndarray, axis: int | None = None) -> None:
        """Quantize an input of `consumer`. `amax` is the largest magnitude of the tensor, () or one per channel."""
        from onnx import helper, numpy_helper

        tensor = consumer.input[position]
        if (tensor, axis) not in self.dequantized:
            stem = tensor if axis is None else f"{tensor}_axis{axis}"
            numbers = {f"{stem}_scale": scales(amax), f"{stem}_zero_point": np.zeros(amax.shape, np.int8)}
            self.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in numbers.items())
            names = [f"{stem}_{op_type}" for op_type in QDQ]
            ends = [tensor, f"{names[0]}_Output", f"{names[1]}_Output"]
            pair = [
                helper.make_node(op_type, [start, *numbers], [end], name)
                for op_type, name, start, end in zip(QDQ, names, ends[:-1], ends[1:], strict=True)
            ]
            if axis is not None:  # one that is not written is 0 for TensorRT and 1 for ONNX
                for node in pair:
                    node.attribute.append(helper.make_attribute("axis", axis))
            self.pairs_before[consumer.output[0]] = self.pairs_before.get(consumer.output[0], []) + pair
            self.dequantized[tensor, axis] = ends[-1]
        consumer.input[position] = self.dequantized[tensor, axis]

    def write(self) -> None:
        """Put the pairs into the graph."""
        nodes = [n for node in self.graph.node for n in (*self.pairs_before.get(node.output[0], ()), node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)


def scales(amax: np.ndarray) -> np.ndarray:
    """Return the steps of INT8, float32 and above 0 also where all values are 0."""
    steps = np.asarray(amax / LARGEST, np.float32)
    return np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps)


def quantize_explicit(
    model: onnx.ModelProto,
    bounds: Mapping[str, tuple[float, float]],
    per_channel: bool,
    float_outputs: Collection[str] = (),
) -> onnx.ModelProto:
    """Quantize `model` in place with Q/DQ pairs; weights and biases stay float.

    Signed and symmetric, zero points written. Conv branches enter their Add unquantized, so that Conv, Add and ReLU
    become one kernel. Operators whose weights are computed from the input stay float, a product of two activations
    does not. The rules: docs.nvidia.com, TensorRT, explicit quantization.

    Args:
        model: the FP32 network, constants folded.
        bounds: the ranges of its float tensors.
        per_channel: a scale for each output channel of a weight.
        float_outputs: the outputs of operators that stay float.

    Raises: ValueError if a tensor has no range.
    """

    def amax(tensor: str) -> np.ndarray:
        if tensor not in bounds:
            raise ValueError(f"no range is known for the tensor `{tensor}`")
        return np.array(np.abs(bounds[tensor]).max())

    view = GraphView(model)
    skips = find_skips(view)
    writer = QdqWriter(model.graph)
    for node in model.graph.node:
        if node.output[0] in float_outputs:
            continue
        if node.output[0] in skips:
            position = skips[node.output[0]]
            writer.insert(node, position, amax(node.input[position]))
        if node.op_type not in WEIGHTED or node.input[0] in view.initializers:
            continue
        weight = view.initializer_array(node.input[1])
        if weight is not None:
            has_channels = weight.ndim == 2 or node.op_type.startswith("Conv")
            axis = channel_axis(node) if per_channel and has_channels else None
            other_axes = tuple(i for i in range(weight.ndim) if i != axis)
            writer.insert(node, 0, amax(node.input[0]))
            writer.insert(node, 1, np.abs(weight).max(other_axes), axis)
        elif node.op_type == "MatMul":
            writer.insert(node, 0, amax(node.input[0]))
            writer.insert(node, 1, amax(node.input[1]))
    writer.write()
    return model
