"""Layers: how the weighted operators of an ONNX file are quantized, be it with Q/DQ, QOperator or dynamic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekd.onnx.graph import DEQUANTIZE, GraphView, int_attribute, node_label
from edgekd.onnx.ops import WEIGHTED, channel_axis
from edgekd.stages.explain.float_regions import carried, kind_of

if TYPE_CHECKING:
    import onnx

Form = Literal["Q/DQ", "QOperator", "dynamic"]
DYNAMIC = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
# position of activation, its zero point, weight, the weight's scale
PLACES = {
    "QLinearConv": (0, 2, 3, 4),
    "QGemm": (0, 2, 3, 4),
    "QLinearMatMul": (0, 2, 3, 4),
    "ConvInteger": (0, 2, 1, None),
    "MatMulInteger": (0, 2, 1, None),
    "MatMulIntegerToFloat": (0, 4, 1, 3),
}
SEVEN_BITS = 64  # the largest weight of a reduced range


@dataclass(frozen=True)
class QuantizedLayer:
    """A weighted operator with integer weights."""

    node: str
    op: str
    activation: str  # uint8, int8; dynamic; float where it has no pair
    weight: str  # uint8, int8
    per_channel: bool
    full_range: bool  # more than 7 bits are used
    weakest: int  # the largest step that the weakest channel uses, of 127; of channels that are all 0, none
    channel: int  # which one that is
    depthwise: bool
    summed: int  # products that make up one output number
    leaving: int  # output channels of one group

    def filled(self, sums: int, channels: int) -> float:
        """The share of a register's places that are used by one that sums `sums` products for `channels` channels."""
        places = ceil(self.summed / sums) * sums * ceil(self.leaving / channels) * channels
        return self.summed * self.leaving / places


def form(view: GraphView) -> Form | None:
    """How a file is quantized; None if it is not."""
    ops = {node.op_type for node in view.nodes}
    if ops & set(DYNAMIC):
        return "dynamic"
    if any(op.startswith("QLinear") or op == "QGemm" for op in ops):
        return "QOperator"
    return "Q/DQ" if DEQUANTIZE in ops else None


def layers(view: GraphView) -> list[QuantizedLayer]:
    return list(iterate_layers(view))


def iterate_layers(view: GraphView) -> Iterator[QuantizedLayer]:
    for node in view.nodes:
        if node.op_type in PLACES:
            x, zero, w, scale = PLACES[node.op_type]
            weight = view.constant_input(node, w)
            scales = None if scale is None else view.constant_input(node, scale)
            zeros = view.constant_input(node, zero)
            made = view.producer(node.input[x], "DynamicQuantizeLinear")
            activation = "dynamic" if made is not None else "uint8" if zeros is None else str(zeros.dtype)
        elif node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in view.input_independent:
            weight, scales = integers(view, node.input[1])
            pair = carried(view, node.input[0])
            activation = "float" if pair is None else kind_of(view, pair)
        else:
            continue
        if weight is not None and weight.dtype in (np.int8, np.uint8) and weight.ndim > 1:
            yield layer(view, node, weight, scales, activation)


def integers(view: GraphView, name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The weight as integers behind its DequantizeLinear, and its scales; a float one is rounded as its pair does."""
    pair = view.producer(name, DEQUANTIZE)
    if pair is None:
        return None, None
    scale, stored = view.constant_input(pair, 1), view.constant_input(pair, 0)
    if stored is None and (quantizer := view.producer(pair.input[0], "QuantizeLinear")) is not None:
        floats = view.constant_input(quantizer, 0)
        if floats is not None and scale is not None and kind_of(view, pair) == "int8":
            axis = int_attribute(pair, "axis")
            shaped = scale if scale.size == 1 else along(scale, floats.ndim, 1 if axis is None else axis)
            stored = np.clip(np.round(floats / shaped), -128, 127).astype(np.int8)
    return stored, scale


def along(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """(C,) as a shape that spreads along one axis of an array of that rank."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def layer(
    view: GraphView, node: onnx.NodeProto, weight: np.ndarray, scales: np.ndarray | None, activation: str
) -> QuantizedLayer:
    conv = "Conv" in node.op_type
    axis = 0 if conv and node.op_type != "ConvTranspose" else weight.ndim - 1
    if node.op_type in WEIGHTED:
        axis = channel_axis(node)
    elif node.op_type == "QGemm" and int_attribute(node, "transB"):
        axis = 0
    groups = (int_attribute(node, "group") or 1) if conv else 1
    # unsigned weights have their zero in the middle
    steps = np.abs(weight.astype(np.int32) - (128 if weight.dtype == np.uint8 else 0))
    largest = steps.max(tuple(i for i in range(weight.ndim) if i != axis))
    live = np.where(largest > 0, largest, 999)
    channels = weight.shape[axis]
    return QuantizedLayer(
        node=node_label(node),
        op=node.op_type,
        activation=activation,
        weight=str(weight.dtype),
        per_channel=scales is not None and scales.size > 1,
        full_range=bool(largest.max(initial=0) > SEVEN_BITS),
        weakest=int(live.min()) if largest.any() else 0,
        channel=int(live.argmin()),
        depthwise=groups > 1 and groups == channels,
        summed=prod(weight.shape) // channels,
        leaving=channels // groups,
    )
