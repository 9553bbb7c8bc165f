"""Explicit quantization as TensorRT fuses it: Q/DQ pairs before weighted operators and on the skips of Adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.ops import WEIGHTED, channel_axis, find_skips

if TYPE_CHECKING:
    import onnx

LARGEST = 127  # of INT8 without -128: as many steps to either side of 0


class Pairs:
    """Writes Q/DQ pairs into a graph; one pair serves all quantized readers of a tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.before: dict[str, list[onnx.NodeProto]] = {}  # the pair that is written in front of a node, by its output
        self.made: dict[tuple[str, int | None], str] = {}

    def put(self, reader: onnx.NodeProto, position: int, amax: np.ndarray, axis: int | None = None) -> None:
        """Quantize one input of `reader`. `amax` is the largest magnitude of the tensor, () or one for each channel."""
        from onnx import helper, numpy_helper

        tensor = reader.input[position]
        if (tensor, axis) not in self.made:
            stem = tensor if axis is None else f"{tensor}_axis{axis}"
            numbers = {f"{stem}_scale": scales(amax), f"{stem}_zero_point": np.zeros(amax.shape, np.int8)}
            self.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in numbers.items())
            kinds = ("QuantizeLinear", "DequantizeLinear")
            names = [f"{stem}_{kind}" for kind in kinds]
            ends = [tensor, f"{names[0]}_Output", f"{names[1]}_Output"]
            halves = [
                helper.make_node(kind, [start, *numbers], [end], name)
                for kind, name, start, end in zip(kinds, names, ends[:-1], ends[1:], strict=True)
            ]
            if axis is not None:  # one that is not written is 0 for TensorRT and 1 for ONNX
                for half in halves:
                    half.attribute.append(helper.make_attribute("axis", axis))
            self.before[reader.output[0]] = self.before.get(reader.output[0], []) + halves
            self.made[tensor, axis] = ends[-1]
        reader.input[position] = self.made[tensor, axis]

    def write(self) -> None:
        nodes = [n for node in self.graph.node for n in (*self.before.get(node.output[0], ()), node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)


def scales(amax: np.ndarray) -> np.ndarray:
    """Steps of INT8, float32 and above 0 also where all values are 0."""
    steps = np.asarray(amax / LARGEST, np.float32)
    return np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps)


def explicit(
    model: onnx.ModelProto,
    bounds: Mapping[str, tuple[float, float]],
    per_channel: bool,
    kept: Collection[str] = (),
) -> onnx.ModelProto:
    """`model` quantized in place, with float weights and biases. `bounds` are the ranges of its float tensors; `kept`
    the outputs of operators that stay float.

    Signed and symmetric, zero points written. Conv branches enter their Add unquantized, so that Conv, Add and ReLU
    become one kernel. Operators whose weights are computed from the input stay float, a product of two activations
    does not. Raises ValueError if a tensor has no range. The rules: docs.nvidia.com, TensorRT, explicit quantization.
    """
    from onnx import numpy_helper

    def amax(tensor: str) -> np.ndarray:
        if tensor not in bounds:
            raise ValueError(f"no range is known for the tensor `{tensor}`")
        return np.array(np.abs(bounds[tensor]).max())

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    skips = find_skips(graph)
    pairs = Pairs(graph)
    for node in graph.node:
        if node.output[0] in kept:
            continue
        if node.output[0] in skips:
            position = skips[node.output[0]]
            pairs.put(node, position, amax(node.input[position]))
        if node.op_type not in WEIGHTED or node.input[0] in weights:
            continue
        if node.input[1] in weights:
            array = np.abs(numpy_helper.to_array(weights[node.input[1]]))
            channelled = array.ndim == 2 or node.op_type.startswith("Conv")
            axis = channel_axis(node) if per_channel and channelled else None
            others = tuple(i for i in range(array.ndim) if i != axis)
            pairs.put(node, 0, amax(node.input[0]))
            pairs.put(node, 1, array.max(others), axis)
        elif node.op_type == "MatMul":
            pairs.put(node, 0, amax(node.input[0]))
            pairs.put(node, 1, amax(node.input[1]))
    pairs.write()
    return model
