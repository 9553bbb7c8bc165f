"""Layers that stay float in an INT8 file: their names, and which operators stay float with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.plugins import unknown_name
from edgekd.errors import ConfigError
from edgekd.onnx.graph import DEQUANTIZE, GraphView, attribute, to_array
from edgekd.onnx.ops import WEIGHTED

if TYPE_CHECKING:
    import onnx

ENDS = ("first", "last")  # words for the outermost layers
REQUANTIZED = ("Conv", "ConvTranspose", "Gemm")  # whose float weights ONNX Runtime may quantize
POOLING = ("GlobalAveragePool", "AveragePool", "Flatten", "Reshape", "Squeeze")  # what may come before a last layer


def quantizable_layers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return the weighted operators that are quantized, by name, in the order of the file.

    A layer has the name of its module in torch where that is known, so that files of another opset have the same names;
    else that of its output. Names of nodes may differ between two files of one network.
    """
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in WEIGHTED and n.input[0] not in weights]
    modules = [module_path(node) for node in nodes]
    unique = [name if modules.count(name) == 1 else "" for name in modules]  # some are used twice
    return {name or node.output[0]: node for name, node in zip(unique, nodes, strict=True)}


def module_path(node: onnx.NodeProto) -> str:
    """Return the dotted path of a node's module; empty if it is not known.

    It is stage1.0 for the weight `stage1.0.weight`, which one of torch's exporters keeps, and for the output
    `/stage1/stage1.0/Conv_output_0`, as the other names it.
    """
    weight = str(node.input[1])
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    first, *parts = node.output[0].split("/")[:-1] or [""]
    inner = [part for part, after in zip(parts, [*parts, ""][1:], strict=True) if not after.startswith(f"{part}.")]
    return "" if first else ".".join(inner)


def select_layers(graph: onnx.GraphProto, names: Collection[str]) -> set[str]:
    """Return the outputs of the layers that `names` stand for.

    A name is `first`, `last`, or that of a layer, of its node or of its output. Raises ConfigError for any other name,
    and if no layer is left for INT8.
    """
    layers = quantizable_layers(graph)
    aliases = {alias: node for node in layers.values() for alias in (node.name, node.output[0]) if alias}
    by_name = dict(zip(ENDS, [list(layers.values())[i] for i in (0, -1)], strict=True)) | aliases | layers
    for name in names:
        if name not in by_name:
            raise unknown_name(f"no layer is called `{name}`, so it cannot stay float", name, [*ENDS, *layers])
    outputs = {by_name[name].output[0] for name in names}
    if len(outputs) == len(layers):
        raise ConfigError(
            f"all {len(layers)} layers are to stay float, which leaves nothing to quantize",
            hint="take some out of `keep_float`, or use the FP32 file",
        )
    return outputs


def float_node_outputs(model: onnx.ModelProto, names: Collection[str], float_adds: bool) -> set[str]:
    """Return the first outputs of all operators that are float if the layers `names` are.

    After a float layer these are the operators that no INT8 tensor enters, before it the pooling that only float layers
    read: Q/DQ pairs there would round for no gain in speed. With `float_adds`, an Add with one float branch is float
    even if its skip is not; ONNX Runtime adds integers faster. Raises as `select_layers`.
    """
    if not names:
        return set()
    view = GraphView(model)
    selected = select_layers(model.graph, names)
    quantized = {node.output[0] for node in quantizable_layers(model.graph).values()} - selected

    def consumer_outputs(name: str) -> set[str]:
        return {node.output[0] for node in view.consumers(name)}

    float_outputs = set(selected)
    free: set[str] = set()  # tensors that no layer in INT8 produces or reads
    for node in model.graph.node:
        inputs_free = [name in free for name in node.input if name and name not in view.initializers]
        enough = any if float_adds and node.op_type == "Add" else all
        if inputs_free and enough(inputs_free) and node.output[0] not in quantized:
            float_outputs.add(node.output[0])
        if node.output[0] in float_outputs:
            free.update(name for name in node.output if not quantized & consumer_outputs(name))
    for node in reversed(model.graph.node):
        after = consumer_outputs(node.output[0])
        if node.op_type in POOLING and after and float_outputs.issuperset(after):
            float_outputs.add(node.output[0])
    return float_outputs


def prevent_ort_requantize(model: onnx.ModelProto, float_outputs: Collection[str]) -> None:
    """Rewrite float layers that read an integer tensor, in place, so that ONNX Runtime executes them in float, too.

    When 1.31 loads a file, it quantizes the float weight of an operator between a DequantizeLinear of one scale and a
    QuantizeLinear, with one scale for all channels (WeightBiasQuantization). It leaves those alone whose input has a
    scale per channel: here they are equal, so the numbers are the same. This does not help a layer with a single input
    channel.
    """
    from onnx import helper, numpy_helper

    view, graph = GraphView(model), model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        is_float = node.output[0] in float_outputs and node.op_type in REQUANTIZED
        dequantize = view.producer(node.input[0], DEQUANTIZE) if is_float else None
        if dequantize is not None and node.input[1] in view.initializers:
            channels = in_channels(node, view.initializers[node.input[1]].dims)
            stem = f"{node.output[0]}_float"
            for position, suffix in ((1, "scale"), (2, "zero_point")):
                number = to_array(view.initializers[dequantize.input[position]])
                graph.initializer.append(numpy_helper.from_array(np.full(channels, number), f"{stem}_{suffix}"))
            ends = [dequantize.input[0], f"{stem}_scale", f"{stem}_zero_point"], [f"{stem}_input"]
            nodes.append(helper.make_node(DEQUANTIZE, *ends, f"{stem}_DequantizeLinear", axis=1))
            node.input[0] = f"{stem}_input"
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | view.outputs
    del graph.node[:]
    graph.node.extend(node for node in nodes if used.intersection(node.output))


def in_channels(node: onnx.NodeProto, dims: Sequence[int]) -> int:
    """Return the input channels of an operator, from the shape of its weight."""
    if node.op_type == "Conv":
        return int(dims[1] * attribute(node, "group", 1))
    return int(dims[1] if attribute(node, "transB", 0) else dims[0])
