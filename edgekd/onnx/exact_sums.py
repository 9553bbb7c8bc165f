"""Compute sums of 8-bit products in onnxruntime exactly, as a processor with VNNI does."""

from __future__ import annotations

import platform
from collections import defaultdict
from typing import TYPE_CHECKING

from edgekd.utils.cpu import flags, saturates

if TYPE_CHECKING:
    import onnx

# x86 without VNNI adds products of uint8 and int8 up by twos in 16 bits, where they saturate; signed activations too,
# which onnxruntime shifts to uint8. With this entry it takes kernels that are exact: the answers are those of a
# processor with VNNI, bit for bit. Where there is VNNI it changes no answer, but doubles their time
ENTRIES = {"session.x64quantprecision": "1"}


def exact_entries() -> dict[str, str]:
    """Return the session config entries that keep sums from saturating on this processor; none where they never do."""
    return dict(ENTRIES) if saturates(platform.machine(), flags()) else {}


def unshare(model: onnx.ModelProto) -> bool:
    """Give every reader of a dequantized constant its own copy of it, in place; return whether any was shared.

    For ENTRIES: onnxruntime 1.31 gives each layer's weights another form, and cannot load a network where two layers
    have the same weights, or the same zero point of them.
    """
    import onnx

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    readers: defaultdict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers[name].append((node, place))
    copies: list[onnx.NodeProto] = []
    shared = False
    for node in graph.node:
        first = quantizers.get(node.input[0], node) if node.op_type == "DequantizeLinear" else None
        if first is None or first.input[0] not in constants:
            continue
        chain = [node] if first is node else [first, node]
        used = readers[node.output[0]]
        shared |= len(used) > 1 or any(len(readers[name]) > len(chain) for one in chain for name in one.input)
        for reader, place in used:
            end = f".copy{len(copies)}"  # what is left unread, onnxruntime drops
            for one in chain:
                copy = onnx.NodeProto()
                copy.CopyFrom(one)
                copy.name, copy.output[0] = one.name and one.name + end, one.output[0] + end
                for i, name in enumerate(one.input):
                    if name:
                        copy.input[i] = name + end
                copies.append(copy)
            for name in dict.fromkeys(name for one in chain for name in one.input if name in constants):
                tensor = graph.initializer.add()
                tensor.CopyFrom(constants[name])
                tensor.name = name + end
            reader.input[place] = node.output[0] + end
    for copy in reversed(copies):
        graph.node.insert(0, copy)  # they read constants only
    return shared
