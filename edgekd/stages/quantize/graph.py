"""An ONNX graph at hand: who reads a tensor, its shape, the constants of nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.core import onnx_facts

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Graph:
    """An ONNX graph with what the search for seams asks it again and again."""

    readers: Mapping[str, list[onnx.NodeProto]]
    constants: Mapping[str, np.ndarray]
    shapes: Mapping[str, tuple[int, ...]]
    ends: frozenset[str]  # its outputs

    def only_reader(self, tensor: str) -> onnx.NodeProto | None:
        found = self.readers.get(tensor, [])
        return found[0] if len(found) == 1 and tensor not in self.ends else None


def graph_of(model: onnx.ModelProto) -> Graph:
    import onnx
    from onnx import numpy_helper

    shaped = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in reads(node):
            readers[name].append(node)
    return Graph(
        dict(readers),
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer},
        {v.name: onnx_facts.tensor_spec(v).shape for v in (*shaped.input, *shaped.value_info, *shaped.output)},
        frozenset(value.name for value in model.graph.output),
    )


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those of the graphs inside of it included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from reads(inner)


def bound(graph: Graph, node: onnx.NodeProto, position: int) -> float:
    """Of a Clip: its lowest or highest value."""
    named = node.input[position] if position < len(node.input) else ""
    if not named:
        return float("-inf") if position == 1 else float("inf")
    return float(graph.constants[named].reshape(())) if named in graph.constants else float("nan")


def rank(graph: Graph, tensor: str) -> int:
    return len(graph.shapes.get(tensor, ()))


def value(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def replace_constant(model: onnx.ModelProto, node: onnx.NodeProto, position: int, array: np.ndarray) -> None:
    """Give a node another constant; one that no other node uses keeps its name."""
    from onnx import numpy_helper

    name = node.input[position]
    if sum(list(reads(other)).count(name) for other in model.graph.node) > 1:
        node.input[position] = f"{name}.of.{node.output[0]}"
        model.graph.initializer.append(numpy_helper.from_array(array, node.input[position]))
        return
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(array, name))
