"""What TensorRT refuses in an ONNX file: one function a rule, each yields nodes and what is wrong with them.

Read from the importers of https://github.com/onnx/onnx-tensorrt, release/8.2-GA to 10.1. A node of None is the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import DEQUANTIZE, QUANTIZE, GraphView, int_attribute, node_label
from edgekd.onnx.ops import channel_axis
from edgekd.targets._jetpack import Jetpack

if TYPE_CHECKING:
    import onnx

    Violations = Iterator[tuple[onnx.NodeProto | None, str]]

NEVER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
BIASED = ("Conv", "ConvTranspose", "Gemm")


def opset(view: GraphView, jetpack: Jetpack) -> Violations:
    low, high = jetpack.opset
    if not low <= view.opset <= high:
        yield None, f"opset {view.opset}; TensorRT {jetpack.tensorrt} reads {low} to {high}"


def operator(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.nodes:
        if node.domain == "com.microsoft" or node.op_type in NEVER:
            full = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            yield node, f"no TensorRT has the operator {full}"


def constant(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        for position, what in enumerate(("scale", "zero point"), start=1):
            name = node.input[position] if len(node.input) > position else ""
            if name and name not in view.constants:
                yield node, f"its {what} `{name}` is computed, not a constant"


def scale_type(view: GraphView, jetpack: Jetpack) -> Violations:
    from onnx import TensorProto

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for node in view.qdq_nodes:
        tensor = view.constants.get(node.input[1])
        if tensor is None or tensor.data_type == TensorProto.FLOAT:
            continue
        if tensor.data_type not in halves or view.opset < 19:
            yield node, f"its scale is {kind(tensor.data_type)} in opset {view.opset}"


def scale_positive(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        scale = view.constant_input(node, 1)
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            yield node, f"a scale is {float(scale.min())}"


def zero_point_written(view: GraphView, jetpack: Jetpack) -> Violations:
    """ONNX takes a missing zero point for uint8, TensorRT for int8; TensorRT 8 wants all three inputs."""
    for node in view.qdq_nodes:
        if len(node.input) > 2 and node.input[2]:
            continue
        typed = node.op_type == DEQUANTIZE or int_attribute(node, "output_dtype")
        if jetpack.tensorrt_version < (10, 0) or not typed:
            yield node, "it has no zero point"


def zero_point_zero(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        zeros = view.constant_input(node, 2)
        if zeros is not None and zeros.astype(np.float32).any():
            worst = zeros.astype(np.float32).ravel()[np.abs(zeros.astype(np.float32)).argmax()]
            yield node, f"its zero point is {worst:.0f}: the quantization is asymmetric"


def zero_point_size(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        scale, zeros = view.constant_input(node, 1), view.constant_input(node, 2)
        if scale is not None and zeros is not None and scale.size != zeros.size:
            yield node, f"it has {scale.size} scales and {zeros.size} zero points"


def integer_type(view: GraphView, jetpack: Jetpack) -> Violations:
    from onnx import TensorProto

    since: dict[int, int] = {
        TensorProto.INT8: 0,
        TensorProto.FLOAT8E4M3FN: 19,
        TensorProto.INT4: 21,
        TensorProto.FLOAT4E2M1: 23,
    }
    biases = bias_pairs(view)
    for node in view.qdq_nodes:
        tensor = view.constants.get(node.input[2]) if len(node.input) > 2 else None
        if tensor is None or id(node) in biases:
            continue
        if tensor.data_type not in since:
            yield node, f"it quantizes to {kind(tensor.data_type)}"
        elif view.opset < since[tensor.data_type]:
            yield node, f"it quantizes to {kind(tensor.data_type)}, which needs opset {since[tensor.data_type]}"


def per_channel_activation(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        if node.input[0] not in view.input_independent and view.is_per_channel(node):
            yield node, "an activation has a scale for each channel"


def per_channel_size(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        scale, shape = view.shapes.get(node.input[1], ()), view.shapes.get(node.input[0], ())
        if node.input[0] not in view.input_independent or not view.is_per_channel(node) or not shape:
            continue
        axis = int_attribute(node, "axis")
        axis = 1 if axis is None else axis
        if not -len(shape) <= axis < len(shape) or scale != (shape[axis],):
            yield node, f"its scales have shape {scale}, which does not fit axis {axis} of {shape}"


def per_channel_opset(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        if view.opset < 13 and view.is_per_channel(node):
            yield node, f"a scale for each channel needs opset 13, this is {view.opset}"


def axis_written(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        if view.is_per_channel(node) and int_attribute(node, "axis") is None:
            yield node, "its axis is not written: ONNX takes 1, TensorRT 0"


def axis_place(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.weighted_nodes:
        weight = view.producer(node.input[1], DEQUANTIZE)
        if weight is None or not view.is_per_channel(weight) or len(view.shapes.get(weight.input[0], ())) < 2:
            continue
        axis, rank = int_attribute(weight, "axis"), len(view.shapes[weight.input[0]])
        if axis is not None and axis % rank != channel_axis(node):
            yield weight, f"it scales axis {axis} of a {node.op_type}'s weight, not axis {channel_axis(node)}"


def folded_weight(view: GraphView, jetpack: Jetpack) -> Violations:
    if jetpack.tensorrt_version >= (10, 0):
        return
    biases = bias_pairs(view)
    for node in view.qdq_nodes:
        integers = node.op_type == DEQUANTIZE and view.producer(node.input[0], QUANTIZE) is None
        if integers and node.input[0] in view.input_independent and id(node) not in biases:
            yield node, f"its weight is stored as integers, which TensorRT {jetpack.tensorrt} refuses"


def quantized_bias(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.weighted_nodes:
        if node.op_type in BIASED and len(node.input) > 2 and view.is_dequantized(node.input[2]):
            yield view.producers[node.input[2]], f"the bias of `{node_label(node)}` is quantized"


def bias_pairs(view: GraphView) -> set[int]:
    """The id of every DequantizeLinear that makes a bias."""
    biased = [
        n for n in view.weighted_nodes if n.op_type in BIASED and len(n.input) > 2 and view.is_dequantized(n.input[2])
    ]
    return {id(view.producers[node.input[2]]) for node in biased}


def kind(data_type: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(data_type))
