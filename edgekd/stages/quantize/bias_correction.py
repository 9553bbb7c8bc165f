"""Bias correction: the mean error that rounded weights make in each output channel is taken off the bias.

Nagel et al., 2019, arXiv 1906.04721, section 4.2.1, in its empirical form: b' = b - E[(Q(W) - W) x], with the float
activations x of the calibration inputs. Q(W) is read from the INT8 network that was made without the correction, so it
is what that network holds in any dialect; the error is computed by the layer itself with the weights Q(W) - W, so
borders, strides and groups are exact. A layer that has no bias gets one; a MatMul only takes that of an Add behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import Graph, graph_of, replace_constant, value
from edgekd.onnx.ops import WEIGHTED, channel_axis
from edgekd.stages.quantize.activations import streamed

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)
PAIR = ("QuantizeLinear", "DequantizeLinear")


def corrected(
    model: onnx.ModelProto, int8: onnx.ModelProto, inputs: np.ndarray, kept: Collection[str]
) -> onnx.ModelProto:
    """The FP32 network `model`, in place, with biases that make up for the weights of `int8`, which was made from it.

    `inputs` are calibration inputs, (N, ...); one batch of them is in memory. Operators with an output in `kept` stay
    as they are.
    """
    rounded = rounded_weights(int8)
    graph = graph_of(model)
    rounding = (node for node in model.graph.node if node.op_type in WEIGHTED and node.output[0] not in kept)
    layers = [node for node in rounding if node.input[1] in rounded]
    places = {node.output[0]: place for node in layers if (place := bias_of(graph, node)) is not None}
    able = [node for node in layers if node.output[0] in places]
    log.info("biases corrected in %d of %d layers", len(able), len(layers))
    if not able:
        return model
    errors = {n.input[1]: rounded[n.input[1]] - graph.constants[n.input[1]] for n in able}
    for name, error in mean_errors(model, able, errors, inputs).items():
        shift(model, *places[name], error)
    return model


def rounded_weights(int8: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights that an INT8 network computes with, as floats, by their names in the FP32 network."""
    import onnxruntime as ort
    from onnx import helper
    from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    origin = {name: name.removesuffix(TENSOR_NAME_QUANT_SUFFIX) for name in constants}
    nodes = []
    for node in int8.graph.node:
        if node.op_type in PAIR and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
            nodes.append(node)
    read = {n.input[1] for n in int8.graph.node if n.op_type in WEIGHTED} & set(origin) - set(constants)
    outputs = [helper.make_empty_tensor_value_info(name) for name in sorted(read)]
    if not outputs:
        return {}
    used = {name for node in nodes for name in node.input if name in constants}
    graph = helper.make_graph(nodes, "weights", [], outputs, [constants[name] for name in sorted(used)])
    model = helper.make_model(graph, opset_imports=int8.opset_import, ir_version=int8.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in outputs]
    return {origin[name]: array for name, array in zip(names, running.run(names, {}), strict=True)}


def bias_of(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int, np.ndarray, float] | None:
    """Where the bias of a layer is: the node and the position among its inputs; its value, and what multiplies it."""
    size, position, holder = graph.constants[node.input[1]].shape[channel_axis(node)], 2, node
    if node.op_type == "ConvTranspose" and value(node, "group", 1) > 1:  # which onnxruntime cannot quantize with a bias
        return None
    factor = float(value(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
    if node.op_type == "MatMul":
        after = graph.only_reader(node.output[0])
        if after is None or after.op_type != "Add":
            return None
        holder, position = after, 1 - list(after.input).index(node.output[0])
    elif len(node.input) < 3 or not node.input[2]:
        return node, 2, np.zeros(size, graph.constants[node.input[1]].dtype), 1.0
    bias = graph.constants.get(holder.input[position])
    if bias is None or not (bias.size == 1 or bias.shape[-1] == bias.size == size) or not factor:
        return None
    return holder, position, np.broadcast_to(bias.ravel(), size), factor


def mean_errors(
    model: onnx.ModelProto, layers: list[onnx.NodeProto], errors: Mapping[str, np.ndarray], inputs: np.ndarray
) -> dict[str, np.ndarray]:
    """The mean of each output channel of `layers` for the weights `errors`, by the name of the layer's output."""
    import onnx
    from onnx import helper, numpy_helper

    twins = onnx.ModelProto()
    twins.CopyFrom(model)
    ends = {f"{node.output[0]}.error": node for node in layers}
    for name, error in errors.items():
        twins.graph.initializer.append(numpy_helper.from_array(error, f"{name}.error"))
    for end, node in ends.items():
        twin = helper.make_node(node.op_type, [node.input[0], f"{node.input[1]}.error"], [end])
        twin.attribute.extend(node.attribute)
        twins.graph.node.append(twin)
    sums: dict[str, np.ndarray | float] = dict.fromkeys(ends, 0.0)
    count = 0
    for seen in streamed(twins, list(ends), inputs, "inputs to correct biases by"):
        count += 1
        for end, answer in seen.items():
            axis = answer.ndim - 1 if ends[end].op_type == "MatMul" else 1
            rest = tuple(i for i in range(answer.ndim) if i != axis)
            sums[end] = sums[end] + answer.mean(rest, dtype=np.float64)
    return {node.output[0]: np.asarray(sums[end]) / count for end, node in ends.items()}


def shift(
    model: onnx.ModelProto, holder: onnx.NodeProto, position: int, bias: np.ndarray, factor: float, error: np.ndarray
) -> None:
    from onnx import numpy_helper

    made = (bias - error / factor).astype(bias.dtype)
    if position < len(holder.input) and holder.input[position]:
        replace_constant(model, holder, position, made)
        return
    name = f"{holder.output[0]}.bias"
    model.graph.initializer.append(numpy_helper.from_array(made, name))
    del holder.input[position:]
    holder.input.append(name)
