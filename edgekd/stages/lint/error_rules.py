"""What TensorRT refuses in an ONNX file: one function a rule, each yields nodes and what is wrong with them.

Read from the importers of https://github.com/onnx/onnx-tensorrt, release/8.2-GA to 10.1. A node of None is the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import DEQUANTIZE, QUANTIZE, View, attribute, label
from edgekd.onnx.ops import channel_axis

if TYPE_CHECKING:
    import onnx

    Found = Iterator[tuple[onnx.NodeProto | None, str]]

NEVER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
BIASED = ("Conv", "ConvTranspose", "Gemm")


def opset(view: View) -> Found:
    low, high = view.jetpack.opset
    if not low <= view.opset <= high:
        yield None, f"opset {view.opset}; TensorRT {view.jetpack.tensorrt} reads {low} to {high}"


def operator(view: View) -> Found:
    for node in view.nodes:
        if node.domain == "com.microsoft" or node.op_type in NEVER:
            full = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            yield node, f"no TensorRT has the operator {full}"


def constant(view: View) -> Found:
    for node in view.pairs:
        for position, what in enumerate(("scale", "zero point"), start=1):
            name = node.input[position] if len(node.input) > position else ""
            if name and name not in view.constants:
                yield node, f"its {what} `{name}` is computed, not a constant"


def scale_type(view: View) -> Found:
    from onnx import TensorProto

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for node in view.pairs:
        tensor = view.constants.get(node.input[1])
        if tensor is None or tensor.data_type == TensorProto.FLOAT:
            continue
        if tensor.data_type not in halves or view.opset < 19:
            yield node, f"its scale is {kind(tensor.data_type)} in opset {view.opset}"


def scale_positive(view: View) -> Found:
    for node in view.pairs:
        scale = view.number(node, 1)
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            yield node, f"a scale is {float(scale.min())}"


def zero_point_written(view: View) -> Found:
    """ONNX takes a missing zero point for uint8, TensorRT for int8; TensorRT 8 wants all three inputs."""
    for node in view.pairs:
        if len(node.input) > 2 and node.input[2]:
            continue
        typed = node.op_type == DEQUANTIZE or attribute(node, "output_dtype")
        if view.jetpack.tensorrt_version < (10, 0) or not typed:
            yield node, "it has no zero point"


def zero_point_zero(view: View) -> Found:
    for node in view.pairs:
        zeros = view.number(node, 2)
        if zeros is not None and zeros.astype(np.float32).any():
            worst = zeros.astype(np.float32).ravel()[np.abs(zeros.astype(np.float32)).argmax()]
            yield node, f"its zero point is {worst:.0f}: the quantization is asymmetric"


def zero_point_size(view: View) -> Found:
    for node in view.pairs:
        scale, zeros = view.number(node, 1), view.number(node, 2)
        if scale is not None and zeros is not None and scale.size != zeros.size:
            yield node, f"it has {scale.size} scales and {zeros.size} zero points"


def integer_type(view: View) -> Found:
    from onnx import TensorProto

    since: dict[int, int] = {
        TensorProto.INT8: 0,
        TensorProto.FLOAT8E4M3FN: 19,
        TensorProto.INT4: 21,
        TensorProto.FLOAT4E2M1: 23,
    }
    biases = bias_pairs(view)
    for node in view.pairs:
        tensor = view.constants.get(node.input[2]) if len(node.input) > 2 else None
        if tensor is None or id(node) in biases:
            continue
        if tensor.data_type not in since:
            yield node, f"it quantizes to {kind(tensor.data_type)}"
        elif view.opset < since[tensor.data_type]:
            yield node, f"it quantizes to {kind(tensor.data_type)}, which needs opset {since[tensor.data_type]}"


def per_channel_activation(view: View) -> Found:
    for node in view.pairs:
        if node.input[0] not in view.fixed and view.is_per_channel(node):
            yield node, "an activation has a scale for each channel"


def per_channel_size(view: View) -> Found:
    for node in view.pairs:
        scale, shape = view.shapes.get(node.input[1], ()), view.shapes.get(node.input[0], ())
        if node.input[0] not in view.fixed or not view.is_per_channel(node) or not shape:
            continue
        axis = attribute(node, "axis")
        axis = 1 if axis is None else axis
        if not -len(shape) <= axis < len(shape) or scale != (shape[axis],):
            yield node, f"its scales have shape {scale}, which does not fit axis {axis} of {shape}"


def per_channel_opset(view: View) -> Found:
    for node in view.pairs:
        if view.opset < 13 and view.is_per_channel(node):
            yield node, f"a scale for each channel needs opset 13, this is {view.opset}"


def axis_written(view: View) -> Found:
    for node in view.pairs:
        if view.is_per_channel(node) and attribute(node, "axis") is None:
            yield node, "its axis is not written: ONNX takes 1, TensorRT 0"


def axis_place(view: View) -> Found:
    for node in view.weighted():
        weight = view.maker(node.input[1], DEQUANTIZE)
        if weight is None or not view.is_per_channel(weight) or len(view.shapes.get(weight.input[0], ())) < 2:
            continue
        axis, rank = attribute(weight, "axis"), len(view.shapes[weight.input[0]])
        if axis is not None and axis % rank != channel_axis(node):
            yield weight, f"it scales axis {axis} of a {node.op_type}'s weight, not axis {channel_axis(node)}"


def folded_weight(view: View) -> Found:
    if view.jetpack.tensorrt_version >= (10, 0):
        return
    biases = bias_pairs(view)
    for node in view.pairs:
        integers = node.op_type == DEQUANTIZE and view.maker(node.input[0], QUANTIZE) is None
        if integers and node.input[0] in view.fixed and id(node) not in biases:
            yield node, f"its weight is stored as integers, which TensorRT {view.jetpack.tensorrt} refuses"


def quantized_bias(view: View) -> Found:
    for node in view.weighted():
        if node.op_type in BIASED and len(node.input) > 2 and view.quantized(node.input[2]):
            yield view.makers[node.input[2]], f"the bias of `{label(node)}` is quantized"


def bias_pairs(view: View) -> set[int]:
    """The id of every DequantizeLinear that makes a bias."""
    biased = [n for n in view.weighted() if n.op_type in BIASED and len(n.input) > 2 and view.quantized(n.input[2])]
    return {id(view.makers[node.input[2]]) for node in biased}


def kind(data_type: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(data_type))
