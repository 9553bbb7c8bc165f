"""One view of an ONNX graph: which node produces a tensor, which nodes consume it, which tensors are constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.onnx.ops import WEIGHTED

if TYPE_CHECKING:
    import onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
QDQ = (QUANTIZE, DEQUANTIZE)


@dataclass(frozen=True)
class GraphView:
    """Look up producers, consumers, constants and shapes in a model, its nested graphs (of If, Loop, Scan) included.

    Each lookup is computed on first use and then kept: make a new view after the model has changed. Nodes and tensors
    are those of the model itself, so that they can be edited through the view.
    """

    model: onnx.ModelProto

    @cached_property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return max((e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx")), default=0)

    @cached_property
    def graphs(self) -> list[onnx.GraphProto]:
        """The main graph, then the nested ones."""
        graphs = [self.model.graph]
        for graph in graphs:
            graphs += [a.g for node in graph.node for a in node.attribute if a.type == a.GRAPH]
        return graphs

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        return [node for graph in self.graphs for node in graph.node]

    @cached_property
    def qdq_nodes(self) -> list[onnx.NodeProto]:
        """Every QuantizeLinear and DequantizeLinear."""
        return [node for node in self.nodes if node.op_type in QDQ]

    @cached_property
    def weighted_nodes(self) -> list[onnx.NodeProto]:
        """Convolutions and matrix products."""
        return [node for node in self.nodes if node.op_type in WEIGHTED]

    @cached_property
    def outputs(self) -> frozenset[str]:
        """The names of the model's outputs."""
        return frozenset(value.name for value in self.model.graph.output)

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """The constants of the main graph that are stored beside its nodes, by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """All constants by name: initializers, those of nested graphs, and the values of Constant nodes."""
        import onnx
        from onnx import helper, numpy_helper

        constants = {tensor.name: tensor for graph in self.graphs for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute:
                value = helper.get_attribute_value(node.attribute[0])
                if isinstance(value, (int, float, list)):
                    dtype = np.float32 if node.attribute[0].name.startswith("value_float") else np.int64
                    value = numpy_helper.from_array(np.array(value, dtype))
                if isinstance(value, onnx.TensorProto):  # no text, and no sparse tensor
                    constants[node.output[0]] = value
        return constants

    @cached_property
    def input_independent(self) -> set[str]:
        """The names of tensors that do not depend on the input of the network."""
        names = set(self.constants)
        for node in self.nodes:
            if node.input and all(name in names for name in node.input if name):
                names.update(node.output)
        return names

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that computes each tensor, by name."""
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def uses(self) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
        """By the name of each tensor, the nodes that read it, each with the position among its inputs."""
        uses: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for position, name in enumerate(node.input):
                uses.setdefault(name, []).append((node, position))
        return uses

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that are known, by the names of tensors; a size that is not fixed is 0."""
        from onnx import shape_inference

        try:
            graph = shape_inference.infer_shapes(self.model, data_prop=True).graph
        except shape_inference.InferenceError:  # an operator that ONNX does not know, or not like this: a rule says so
            graph = self.model.graph
        values = [v for v in (*graph.input, *graph.value_info, *graph.output) if v.type.tensor_type.HasField("shape")]
        shapes = {v.name: tuple(max(dim.dim_value, 0) for dim in v.type.tensor_type.shape.dim) for v in values}
        return shapes | {name: tuple(tensor.dims) for name, tensor in self.constants.items()}

    @cached_property
    def main_nodes(self) -> set[int]:
        """The ids of the nodes of the main graph; the others are nested."""
        return {id(node) for node in self.nodes[: len(self.model.graph.node)]}

    def producer(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """Return the node that computes a tensor; None if there is none, or it is no operator of these types."""
        node = self.producers.get(name)
        return node if node is not None and (not op_types or node.op_type in op_types) else None

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor, each once."""
        return list({id(node): node for node, _ in self.uses.get(name, ())}.values())

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Return the only node that reads a tensor, once; None if it is nested, or the tensor is an output."""
        uses = self.uses.get(name, ())
        if len(uses) != 1 or name in self.outputs or id(uses[0][0]) not in self.main_nodes:
            return None
        return uses[0][0]

    def successors(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that read the outputs of a node."""
        return [consumer for name in node.output for consumer in self.consumers(name)]

    def successors_past_qdq(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that read the outputs of a node, Q/DQ pairs in between left out."""
        successors, seen, pending = [], set(), self.successors(node)[::-1]
        while pending:
            consumer = pending.pop()
            if id(consumer) in seen:  # pairs may fork and meet again, so that there are more ways than nodes
                continue
            seen.add(id(consumer))
            if consumer.op_type in QDQ:
                pending += self.successors(consumer)[::-1]
            else:
                successors.append(consumer)
        return successors

    def is_dequantized(self, name: str) -> bool:
        """Whether a tensor comes out of a DequantizeLinear."""
        return self.producer(name, DEQUANTIZE) is not None

    def float_source(self, name: str) -> str:
        """Return the float tensor before a Q/DQ pair: `x` for x -> Q -> DQ -> name."""
        seen: set[str] = set()  # nested graphs may use one name for several tensors
        while name not in seen and (node := self.producer(name, *QDQ)) is not None:
            seen.add(name)
            name = node.input[0]
        return name

    def initializer_array(self, name: str) -> np.ndarray | None:
        """Return the numbers of an initializer of the main graph; None if there is none of that name."""
        return to_array(self.initializers[name]) if name in self.initializers else None

    def constant_input(self, node: onnx.NodeProto, position: int) -> np.ndarray | None:
        """Return the constant at an input of a node; None if there is none of real numbers."""
        tensor = self.constants.get(node.input[position]) if len(node.input) > position else None
        array = None if tensor is None else to_array(tensor)
        return None if array is None or array.dtype.kind in "OSUc" else array

    def is_per_channel(self, node: onnx.NodeProto) -> bool:
        """Whether a Q or DQ has more than one scale."""
        return prod(self.shapes.get(node.input[1], ())) > 1

    def is_int8_op(self, node: onnx.NodeProto) -> bool:
        """Whether a weighted operator reads INT8 on both sides."""
        return node.op_type in WEIGHTED and all(self.is_dequantized(name) for name in node.input[:2])


def to_array(tensor: onnx.TensorProto) -> np.ndarray:
    """Return the numbers of a tensor."""
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or the default if it is not written."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def int_attribute(node: onnx.NodeProto, name: str) -> int | None:
    """Return a whole-number attribute, of whatever type the file claims it to be; None if it is not written."""
    return next((a.i for a in node.attribute if a.name == name), None)


def node_label(node: onnx.NodeProto | None) -> str:
    """Return a node's name, or its operator and first output if it has none."""
    if node is None:
        return "(the file)"
    return node.name or f"{node.op_type} -> {node.output[0]}"


def find_skips(view: GraphView) -> dict[str, int]:
    """Find the residual connections of the main graph.

    Returns: by the output of every Add that ends a weighted branch, the position of its other input, the skip. Where
    both inputs end a branch, the shorter one (the projection) is the skip.
    """
    constants = set(view.initializers)
    branch_ends: set[str] = set()  # tensors that a weighted operator, and perhaps its bias, computed for one consumer
    depth: dict[str, int] = {}  # weighted operators on the longest path to a tensor
    skips: dict[str, int] = {}
    for node in view.model.graph.node:
        is_weighted, is_add = node.op_type in WEIGHTED, node.op_type == "Add"
        depth |= dict.fromkeys(node.output, max((depth.get(name, 0) for name in node.input), default=0) + is_weighted)
        if is_add and not constants & set(node.input) and node.input[0] != node.input[1]:
            branches = [i for i in (0, 1) if node.input[i] in branch_ends]
            if branches:
                longest = max(branches, key=lambda i: depth[node.input[i]])
                skips[node.output[0]] = 1 - longest
        is_bias = is_add and constants & set(node.input) and branch_ends & set(node.input)
        uses = len(view.uses.get(node.output[0], ())) + (node.output[0] in view.outputs)
        if (is_weighted or is_bias) and uses == 1:
            branch_ends.add(node.output[0])
    return skips


def replace_constant(model: onnx.ModelProto, node: onnx.NodeProto, position: int, array: np.ndarray) -> None:
    """Give a node another constant; one that no other node uses keeps its name."""
    from onnx import numpy_helper

    name, view = node.input[position], GraphView(model)
    if len(view.uses[name]) > 1:
        node.input[position] = f"{name}.of.{node.output[0]}"
        model.graph.initializer.append(numpy_helper.from_array(array, node.input[position]))
        return
    view.initializers[name].CopyFrom(numpy_helper.from_array(array, name))


def all_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Yield the graph, nested graphs and functions of a file that need not be valid."""
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        pending += [inner for node in graph.node for inner in nested_graphs(node)]


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside of a node, whatever type its attributes claim."""
    for attr in node.attribute:
        yield from (attr.g, *attr.graphs) if attr.HasField("g") else attr.graphs


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield everything that holds numbers, wherever it is."""
    for graph in all_graphs(model):
        if hasattr(graph, "initializer"):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attr in (attr for node in graph.node for attr in node.attribute):
            yield from (*attr.tensors, attr.t) if attr.HasField("t") else attr.tensors
            for sparse in sparse_tensors(attr):
                yield from (sparse.values, sparse.indices)


def sparse_tensors(attr: onnx.AttributeProto) -> Iterator[onnx.SparseTensorProto]:
    """Yield the sparse tensors of an attribute."""
    more = attr.sparse_tensors
    yield from (*more, attr.sparse_tensor) if attr.HasField("sparse_tensor") else more


def sparse_shapes(model: onnx.ModelProto) -> Iterator[list[int]]:
    """Yield the shapes of sparse tensors, which a runtime fills up with zeros."""
    for graph in all_graphs(model):
        yield from (list(sparse.dims) for sparse in getattr(graph, "sparse_initializer", ()))
        for attr in (attr for node in graph.node for attr in node.attribute):
            yield from (list(sparse.dims) for sparse in sparse_tensors(attr))
