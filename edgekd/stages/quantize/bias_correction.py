"""Bias correction: take the mean error that rounded weights cause in each output channel off the bias.

Nagel et al., 2019, arXiv 1906.04721, section 4.2.1, in its empirical form: b' = b - E[(Q(W) - W) x], with the float
activations x of the calibration inputs. Q(W) is read from the INT8 network that was written without the correction, so
it is what that network holds in any scheme; the error is computed by the layer itself with the weights Q(W) - W, so
borders, strides and groups are exact. A layer without a bias gets one; a MatMul can only use that of an Add after it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import QDQ, GraphView, attribute, replace_constant, to_array
from edgekd.onnx.ops import WEIGHTED, channel_axis
from edgekd.stages.quantize.activations import stream_tensors

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bias:
    """The bias of a layer."""

    holder: onnx.NodeProto  # the layer itself, or the Add after it
    position: int  # among the inputs of the holder
    value: np.ndarray  # (C,)
    factor: float  # that multiplies it


def correct_biases(
    model: onnx.ModelProto, int8: onnx.ModelProto, inputs: np.ndarray, float_outputs: Collection[str]
) -> onnx.ModelProto:
    """Change the biases of the FP32 network `model`, in place, so that they make up for the rounded weights of `int8`.

    Args:
        model: the network that `int8` was made from.
        int8: the network with rounded weights.
        inputs: calibration inputs, (N, ...); one batch of them is in memory.
        float_outputs: the outputs of operators that stay as they are.
    """
    rounded = rounded_weights(int8)
    view = GraphView(model)
    quantized = (n for n in model.graph.node if n.op_type in WEIGHTED and n.output[0] not in float_outputs)
    layers = [node for node in quantized if node.input[1] in rounded]
    biases = {node.output[0]: bias for node in layers if (bias := bias_of(view, node)) is not None}
    correctable = [node for node in layers if node.output[0] in biases]
    log.info("biases corrected in %d of %d layers", len(correctable), len(layers))
    if not correctable:
        return model
    names = [node.input[1] for node in correctable]
    errors = {name: rounded[name] - to_array(view.initializers[name]) for name in names}
    for name, error in mean_errors(model, correctable, errors, inputs).items():
        subtract(model, biases[name], error)
    return model


def rounded_weights(int8: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the weights that an INT8 network computes with, as floats, by their names in the FP32 network."""
    import onnxruntime as ort
    from onnx import helper
    from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

    constants = GraphView(int8).initializers
    origin = {name: name.removesuffix(TENSOR_NAME_QUANT_SUFFIX) for name in constants}
    nodes = []
    for node in int8.graph.node:
        if node.op_type in QDQ and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
            nodes.append(node)
    weights = {n.input[1] for n in int8.graph.node if n.op_type in WEIGHTED} & set(origin) - set(constants)
    outputs = [helper.make_empty_tensor_value_info(name) for name in sorted(weights)]
    if not outputs:
        return {}
    used = {name for node in nodes for name in node.input if name in constants}
    graph = helper.make_graph(nodes, "weights", [], outputs, [constants[name] for name in sorted(used)])
    model = helper.make_model(graph, opset_imports=int8.opset_import, ir_version=int8.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in outputs]
    return {origin[name]: array for name, array in zip(names, session.run(names, {}), strict=True)}


def bias_of(view: GraphView, node: onnx.NodeProto) -> Bias | None:
    """Return the bias of a layer, zeros if it has none; None if it cannot be corrected."""
    weight, position, holder = view.initializers[node.input[1]], 2, node
    size = weight.dims[channel_axis(node)]
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1:  # onnxruntime cannot quantize its bias
        return None
    factor = float(attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
    if node.op_type == "MatMul":
        consumer = view.only_consumer(node.output[0])
        if consumer is None or consumer.op_type != "Add":
            return None
        holder, position = consumer, 1 - list(consumer.input).index(node.output[0])
    elif len(node.input) < 3 or not node.input[2]:
        return Bias(node, 2, np.zeros(size, to_array(weight).dtype), 1.0)
    bias = view.initializer_array(holder.input[position])
    if bias is None or not (bias.size == 1 or bias.shape[-1] == bias.size == size) or not factor:
        return None
    return Bias(holder, position, np.broadcast_to(bias.ravel(), size), factor)


def mean_errors(
    model: onnx.ModelProto, layers: list[onnx.NodeProto], errors: Mapping[str, np.ndarray], inputs: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the mean output in each channel of `layers` with the weights `errors`, (C,), by the layer's output."""
    import onnx
    from onnx import helper, numpy_helper

    network = onnx.ModelProto()
    network.CopyFrom(model)
    twins = {f"{node.output[0]}.error": node for node in layers}
    for name, error in errors.items():
        network.graph.initializer.append(numpy_helper.from_array(error, f"{name}.error"))
    for output, node in twins.items():
        twin = helper.make_node(node.op_type, [node.input[0], f"{node.input[1]}.error"], [output])
        twin.attribute.extend(node.attribute)
        network.graph.node.append(twin)
    sums: dict[str, np.ndarray | float] = dict.fromkeys(twins, 0.0)
    count = 0
    for tensors in stream_tensors(network, list(twins), inputs, "inputs to correct biases by"):
        count += 1
        for output, values in tensors.items():
            axis = values.ndim - 1 if twins[output].op_type == "MatMul" else 1
            other_axes = tuple(i for i in range(values.ndim) if i != axis)
            sums[output] = sums[output] + values.mean(other_axes, dtype=np.float64)
    return {node.output[0]: np.asarray(sums[output]) / count for output, node in twins.items()}


def subtract(model: onnx.ModelProto, bias: Bias, error: np.ndarray) -> None:
    """Take `error`, (C,), off a bias; a layer without one gets one."""
    from onnx import numpy_helper

    holder, position = bias.holder, bias.position
    corrected = (bias.value - error / bias.factor).astype(bias.value.dtype)
    if position < len(holder.input) and holder.input[position]:
        replace_constant(model, holder, position, corrected)
        return
    name = f"{holder.output[0]}.bias"
    model.graph.initializer.append(numpy_helper.from_array(corrected, name))
    del holder.input[position:]
    holder.input.append(name)
