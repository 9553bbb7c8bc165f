"""What TensorRT takes from an ONNX file, but not as it was meant: one function per rule, as in `error_rules`.

Where a rule speaks of speed, its source is TensorRT's page on explicit quantization and issues of
https://github.com/NVIDIA/TensorRT; nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import DEQUANTIZE, QUANTIZE, GraphView, find_skips, int_attribute, node_label
from edgekd.onnx.ops import WEIGHTED
from edgekd.targets._jetpack import Jetpack

if TYPE_CHECKING:
    import onnx

    Violations = Iterator[tuple[onnx.NodeProto | None, str]]

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh", "Elu", "Gelu")
COMMUTING = ("MaxPool", "Reshape", "Transpose", "Slice", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Split")
BOTH_SIDES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Add", "Mul")  # INT8 if input and output are
TENSOR_CORE = 32  # channels that an INT8 kernel takes at once
INT32 = np.iinfo(np.int32)


def ir(view: GraphView, jetpack: Jetpack) -> Violations:
    version, limit = view.model.ir_version, jetpack.ir
    if version > limit:
        yield None, f"IR version {version}; onnxruntime {jetpack.onnxruntime} on the board loads up to {limit}"


def int64(view: GraphView, jetpack: Jetpack) -> Violations:
    from onnx import TensorProto, numpy_helper

    if jetpack.tensorrt_version >= (9, 0):
        return
    for name, tensor in view.constants.items():
        if tensor.data_type != TensorProto.INT64:
            continue
        numbers = numpy_helper.to_array(tensor)
        if ((numbers < INT32.min) | (numbers > INT32.max)).any():
            for node in view.consumers(name):
                yield node, f"its constant `{name}` exceeds INT32, which TensorRT {jetpack.tensorrt} clamps it to"


def half_quantized(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.weighted_nodes:
        sides = [view.is_dequantized(name) for name in node.input[:2]]
        if any(sides) and not all(sides):
            yield node, f"only its {'activation' if sides[0] else 'weight'} is quantized"


def unfolded_batchnorm(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.weighted_nodes:
        for reader in view.successors_past_qdq(node):
            if reader.op_type == "BatchNormalization" and view.qdq_nodes:
                yield reader, f"it follows `{node_label(node)}` in a quantized network"


def pair_before_activation(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.nodes:
        if node.op_type not in ACTIVATIONS or not view.is_dequantized(node.input[0]):
            continue
        producer = view.producer(view.float_source(node.input[0]), *WEIGHTED)
        if producer is not None:
            yield view.producers[node.input[0]], f"it stands between `{node_label(producer)}` and its {node.op_type}"


def residual(view: GraphView, jetpack: Jetpack) -> Violations:
    adds = {node.output[0]: node for node in view.nodes if node.op_type == "Add"}
    in_int8 = any(view.is_int8_op(node) for node in view.weighted_nodes)
    for graph in view.graphs:
        for output, skip in skips_behind_pairs(view, graph).items():
            node = adds[output]
            sides = [view.is_dequantized(name) for name in node.input]
            if all(sides):
                yield node, "both of its inputs are quantized, so that it does not fuse with the convolution before it"
            elif sides[1 - skip]:
                yield node, "the branch that ends in it is quantized, and not the skip"
            elif in_int8 and not any(sides):
                yield node, "its skip is not quantized, so that its fused convolution writes float"


def skips_behind_pairs(view: GraphView, graph: onnx.GraphProto) -> dict[str, int]:
    """`find_skips` of the graph as it was before it was quantized."""
    import onnx

    model = onnx.ModelProto()
    bare = model.graph
    bare.output.extend(graph.output)
    bare.initializer.extend(onnx.TensorProto(name=name) for name in sorted(view.input_independent))
    for node in graph.node:
        if node.op_type not in (QUANTIZE, DEQUANTIZE) and node.output[0] not in view.input_independent:
            copied = bare.node.add()
            copied.CopyFrom(node)
            copied.input[:] = [
                view.float_source(name) if name not in view.input_independent else name for name in node.input
            ]
    return find_skips(GraphView(model))


def commuting_pair(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.nodes:
        if node.op_type in COMMUTING and view.is_dequantized(node.input[0]):
            for reader in view.successors(node):
                if reader.op_type == QUANTIZE:
                    yield reader, f"it quantizes again what `{node_label(node)}` only moves"


def idle_pair(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.qdq_nodes:
        if node.op_type == QUANTIZE or node.input[0] in view.input_independent or gains(view, node):
            continue
        if node.output[0] in view.outputs:
            yield node, "it only makes an output of the network"
        else:
            kinds = ", ".join(sorted({reader.op_type for reader in view.successors(node)})) or "nothing"
            yield node, f"what reads it runs in float: {kinds}"


def gains(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether something behind a DequantizeLinear can run in INT8; a pair before an activation has its own rule."""
    for reader in view.successors(node):
        quantizes = any(after.op_type == QUANTIZE for after in view.successors(reader))
        moves = reader.op_type in COMMUTING and gains(view, reader)
        fused = reader.op_type == "Add" or reader.op_type in (*WEIGHTED, *ACTIVATIONS, "BatchNormalization")
        if fused or moves or quantizes and reader.op_type in (*BOTH_SIDES, *COMMUTING):
            return True
    return False


def unequal_scales(view: GraphView, jetpack: Jetpack) -> Violations:
    def scale(node: onnx.NodeProto) -> bytes:
        array = view.constant_input(node, 1)
        return b"" if array is None else array.tobytes()

    for name in view.uses:
        twins = [n for n in view.consumers(name) if n.op_type == QUANTIZE and name not in view.input_independent]
        if len({scale(node) for node in twins}) > 1:
            yield twins[1], f"`{name}` is quantized with several scales"
    for node in view.nodes:
        before = [view.producer(name, DEQUANTIZE) for name in node.input] if node.op_type == "Concat" else []
        if len({scale(one) for one in before if one is not None}) > 1:
            yield node, "its inputs have different scales"


def pair_behind_pad(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.weighted_nodes:
        pad = view.producer(view.float_source(node.input[0]), "Pad")
        if pad is not None and view.is_dequantized(node.input[0]):
            yield view.producers[node.input[0]], f"it stands between `{node_label(pad)}` and `{node_label(node)}`"


def old_fusion(view: GraphView, jetpack: Jetpack) -> Violations:
    """Of GPUs before Orin, which only TensorRT 8 still serves."""
    if jetpack.tensorrt_version >= (9, 0):
        return
    for node in view.weighted_nodes:
        if not view.is_int8_op(node):
            continue
        depthwise = node.op_type == "Conv" and (int_attribute(node, "group") or 1) > 1
        kinds = [reader.op_type for reader in view.successors(node)]
        if "LeakyRelu" in kinds:
            yield node, "INT8 does not fuse with LeakyRelu on older GPUs"
        elif depthwise and "Sigmoid" in kinds and "Mul" in kinds:
            yield node, "a depthwise convolution in INT8 does not fuse with SiLU on older GPUs"


def channels(view: GraphView, jetpack: Jetpack) -> Violations:
    for node in view.nodes:
        if node.op_type == "Conv" and view.is_int8_op(node):
            width = (view.shapes.get(view.float_source(node.input[1])) or (0,))[0]
            if width % TENSOR_CORE:
                yield node, f"{width} output channels are padded to {-width // TENSOR_CORE * -TENSOR_CORE} for INT8"
