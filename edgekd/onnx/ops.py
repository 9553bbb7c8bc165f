"""Facts about ONNX operators."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def channel_axis(node: onnx.NodeProto) -> int:
    """Which axis of the weight of a weighted operator counts its output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)):
        return 0
    return 1


def find_skips(graph: onnx.GraphProto) -> dict[str, int]:
    """Output of every Add that takes up a weighted branch -> position of its other input, the skip.

    Where both inputs end a branch, the shorter one (the projection) is the skip.
    """
    constants = {tensor.name for tensor in graph.initializer}
    reads = Counter([*(name for node in graph.node for name in node.input), *(value.name for value in graph.output)])
    ends: set[str] = set()  # tensors that a weighted operator, and perhaps its bias, computed for one reader
    depth: dict[str, int] = {}  # weighted operators on the longest way to a tensor
    found: dict[str, int] = {}
    for node in graph.node:
        own = node.op_type in WEIGHTED
        depth |= dict.fromkeys(node.output, max((depth.get(name, 0) for name in node.input), default=0) + own)
        adds = node.op_type == "Add"
        if adds and not constants & set(node.input) and node.input[0] != node.input[1]:
            branches = [i for i in (0, 1) if node.input[i] in ends]
            if branches:
                longest = max(branches, key=lambda i: depth[node.input[i]])
                found[node.output[0]] = 1 - longest
        bias = adds and constants & set(node.input) and ends & set(node.input)
        if (own or bias) and reads[node.output[0]] == 1:
            ends.add(node.output[0])
    return found
