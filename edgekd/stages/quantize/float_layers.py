"""Layers that stay float in an INT8 file: what they are called, and which operators stay float with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.plugins import unknown
from edgekd.errors import ConfigError
from edgekd.onnx.ops import WEIGHTED

if TYPE_CHECKING:
    import onnx

ENDS = ("first", "last")  # words for the outermost layers
MENDED = ("Conv", "ConvTranspose", "Gemm")  # whose float weights ONNX Runtime may quantize
POOLED = ("GlobalAveragePool", "AveragePool", "Flatten", "Reshape", "Squeeze")  # what may stand before a last layer


def layers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The weighted operators that are quantized, by name, in the order of the file.

    A layer is called like its module in torch where that can be told, so that files of another opset have the same
    names; else like its output. Names of nodes may differ between two files of one network.
    """
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in WEIGHTED and n.input[0] not in weights]
    modules = [module(node) for node in nodes]
    alone = [name if modules.count(name) == 1 else "" for name in modules]  # some are used twice
    return {name or node.output[0]: node for name, node in zip(alone, nodes, strict=True)}


def module(node: onnx.NodeProto) -> str:
    """The dotted path of a node's module: stage1.0 of the weight `stage1.0.weight`, which one of torch's exporters
    keeps, or of the output `/stage1/stage1.0/Conv_output_0`, as the other calls it. Empty if it is neither."""
    weight = str(node.input[1])
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    first, *parts = node.output[0].split("/")[:-1] or [""]
    inner = [part for part, after in zip(parts, [*parts, ""][1:], strict=True) if not after.startswith(f"{part}.")]
    return "" if first else ".".join(inner)


def chosen(graph: onnx.GraphProto, names: Collection[str]) -> set[str]:
    """The outputs of the layers that `names` stay for: `first`, `last`, names of layers, of their nodes or outputs.

    Raises ConfigError for a name that is none of these, and if no layer is left for INT8.
    """
    known = layers(graph)
    others = {alias: node for node in known.values() for alias in (node.name, node.output[0]) if alias}
    called = dict(zip(ENDS, [list(known.values())[i] for i in (0, -1)], strict=True)) | others | known
    for name in names:
        if name not in called:
            raise unknown(f"no layer is called `{name}`, so it cannot stay float", name, [*ENDS, *known])
    found = {called[name].output[0] for name in names}
    if len(found) == len(known):
        raise ConfigError(
            f"all {len(known)} layers are to stay float, which leaves nothing to quantize",
            hint="take some out of `floats`, or use the FP32 file",
        )
    return found


def staying(graph: onnx.GraphProto, names: Collection[str], adds: bool) -> set[str]:
    """The first outputs of all operators that are float if the layers `names` are. Raises as `chosen` does.

    Behind a float layer these are the operators that nothing in INT8 enters, before it the pooling that only float
    layers read: Q/DQ pairs there would round for no gain in speed. With `adds`, an Add that takes up a float branch is
    float even if its skip is not; ONNX Runtime adds integers faster.
    """
    if not names:
        return set()
    own = chosen(graph, names)
    quantized = {node.output[0] for node in layers(graph).values()} - own
    constants = {tensor.name for tensor in graph.initializer}
    readers: defaultdict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node.output[0])
    kept = set(own)
    free: set[str] = set()  # tensors that no layer in INT8 makes or reads
    for node in graph.node:
        entering = [name in free for name in node.input if name and name not in constants]
        enough = any if adds and node.op_type == "Add" else all
        if entering and enough(entering) and node.output[0] not in quantized:
            kept.add(node.output[0])
        if node.output[0] in kept:
            free.update(name for name in node.output if not quantized.intersection(readers[name]))
    for node in reversed(graph.node):
        after = readers[node.output[0]]
        if node.op_type in POOLED and after and kept.issuperset(after):
            kept.add(node.output[0])
    return kept


def shield(graph: onnx.GraphProto, kept: Collection[str]) -> None:
    """See to it that layers in `kept` that read an integer tensor are float when ONNX Runtime executes them, too.

    When 1.31 loads a file, it quantizes the float weight of an operator between a DequantizeLinear of one scale and a
    QuantizeLinear, with one scale for all channels (WeightBiasQuantization). It leaves those alone whose
    input has a scale per channel: here they are equal, so the numbers are the same. One with a single input
    channel cannot be told apart so.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        half = makers.get(node.input[0]) if node.output[0] in kept and node.op_type in MENDED else None
        if half is not None and half.op_type == "DequantizeLinear" and node.input[1] in constants:
            channels = entering(node, constants[node.input[1]].dims)
            stem = f"{node.output[0]}_float"
            for position, kind in ((1, "scale"), (2, "zero_point")):
                one = numpy_helper.to_array(constants[half.input[position]])
                graph.initializer.append(numpy_helper.from_array(np.full(channels, one), f"{stem}_{kind}"))
            ends = [half.input[0], f"{stem}_scale", f"{stem}_zero_point"], [f"{stem}_input"]
            nodes.append(helper.make_node("DequantizeLinear", *ends, f"{stem}_DequantizeLinear", axis=1))
            node.input[0] = f"{stem}_input"
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if used.intersection(node.output))


def entering(node: onnx.NodeProto, dims: Sequence[int]) -> int:
    """Input channels of an operator, from the shape of its weight."""
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv":
        return int(dims[1] * attributes.get("group", 1))
    return int(dims[1] if attributes.get("transB") else dims[0])
