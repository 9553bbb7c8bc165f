"""A view of an ONNX graph for rules about Q/DQ pairs: who makes and reads a tensor, what is constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.onnx import inspect
from edgekd.onnx.ops import WEIGHTED
from edgekd.targets._jetpack import Jetpack

if TYPE_CHECKING:
    import onnx

if TYPE_CHECKING:
    import onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PAIR = (QUANTIZE, DEQUANTIZE)


@dataclass(frozen=True)
class View:
    """One network, and the JetPack that shall run it."""

    model: onnx.ModelProto
    jetpack: Jetpack

    @cached_property
    def opset(self) -> int:
        return max((e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx")), default=0)

    @cached_property
    def graphs(self) -> list[onnx.GraphProto]:
        """The graph and those inside of its nodes."""
        found = [self.model.graph]
        for graph in found:
            found += [a.g for node in graph.node for a in node.attribute if a.type == a.GRAPH]
        return found

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        return [node for graph in self.graphs for node in graph.node]

    @cached_property
    def pairs(self) -> list[onnx.NodeProto]:
        """Every QuantizeLinear and DequantizeLinear."""
        return [node for node in self.nodes if node.op_type in PAIR]

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        import onnx
        from onnx import helper, numpy_helper

        found = {tensor.name: tensor for graph in self.graphs for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute:
                value = helper.get_attribute_value(node.attribute[0])
                if isinstance(value, (int, float, list)):
                    kind = np.float32 if node.attribute[0].name.startswith("value_float") else np.int64
                    value = numpy_helper.from_array(np.array(value, kind))
                if isinstance(value, onnx.TensorProto):  # no text, and no sparse tensor
                    found[node.output[0]] = value
        return found

    @cached_property
    def fixed(self) -> set[str]:
        """Tensors that do not depend on the input of the network."""
        found = set(self.constants)
        for node in self.nodes:
            if node.input and all(name in found for name in node.input if name):
                found.update(node.output)
        return found

    @cached_property
    def makers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What is known of the tensors' shapes; 0 stands for a size that is not fixed."""
        from onnx import shape_inference

        try:
            graph = shape_inference.infer_shapes(self.model).graph
        except shape_inference.InferenceError:  # an operator that ONNX does not know, or not like this: a rule says so
            graph = self.model.graph
        values = [v for v in (*graph.input, *graph.value_info, *graph.output) if v.type.tensor_type.HasField("shape")]
        found = {v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim) for v in values}
        return found | {name: tuple(tensor.dims) for name, tensor in self.constants.items()}

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it is one of these operators."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def next(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [reader for name in node.output for reader in self.readers.get(name, ())]

    def behind(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What reads a node's output, Q/DQ pairs in between left out."""
        found, seen, waiting = [], set(), self.next(node)[::-1]
        while waiting:
            reader = waiting.pop()
            if id(reader) in seen:  # pairs may fork and meet again, so that there are more ways than nodes
                continue
            seen.add(id(reader))
            if reader.op_type in PAIR:
                waiting += self.next(reader)[::-1]
            else:
                found.append(reader)
        return found

    def quantized(self, name: str) -> bool:
        return self.maker(name, DEQUANTIZE) is not None

    def source(self, name: str) -> str:
        """The float tensor that a Q/DQ pair hides: `x` for x -> Q -> DQ -> name."""
        seen: set[str] = set()  # graphs inside of nodes may use one name for several tensors
        while name not in seen and (node := self.maker(name, *PAIR)) is not None:
            seen.add(name)
            name = node.input[0]
        return name

    def number(self, node: onnx.NodeProto, position: int) -> np.ndarray | None:
        """The constant at an input of a node; None if there is none of real numbers."""
        from onnx import numpy_helper

        tensor = self.constants.get(node.input[position]) if len(node.input) > position else None
        array = None if tensor is None else numpy_helper.to_array(tensor)
        return None if array is None or array.dtype.kind in "OSUc" else array

    def is_per_channel(self, node: onnx.NodeProto) -> bool:
        """Whether a Q or DQ has more than one scale."""
        return prod(self.shapes.get(node.input[1], ())) > 1

    def weighted(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in WEIGHTED)

    def is_quantized_op(self, node: onnx.NodeProto) -> bool:
        """Whether a weighted operator reads INT8 on both sides."""
        return node.op_type in WEIGHTED and all(self.quantized(name) for name in node.input[:2])


def attribute(node: onnx.NodeProto, name: str) -> int | None:
    """A whole-number attribute; None if it is not written."""
    return next((a.i for a in node.attribute if a.name == name), None)


def label(node: onnx.NodeProto | None) -> str:
    """A node's name, or its operator and first output if it has none."""
    if node is None:
        return "(the file)"
    return node.name or f"{node.op_type} -> {node.output[0]}"


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
        {v.name: inspect.tensor_spec(v).shape for v in (*shaped.input, *shaped.value_info, *shaped.output)},
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
