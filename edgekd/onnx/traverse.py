"""Everything that an ONNX model holds, also within nodes and functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, those inside of its nodes, and the functions with theirs."""
    waiting: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [inner for node in graph.node for inner in inside(node)]


def inside(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All that hold numbers, wherever they are."""
    for graph in graphs(model):
        if hasattr(graph, "initializer"):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (*attribute.tensors, attribute.t) if attribute.HasField("t") else attribute.tensors
            for sparse in sparse_in(attribute):
                yield from (sparse.values, sparse.indices)


def sparse_in(attribute: onnx.AttributeProto) -> Iterator[onnx.SparseTensorProto]:
    more = attribute.sparse_tensors
    yield from (*more, attribute.sparse_tensor) if attribute.HasField("sparse_tensor") else more


def sparse_shapes(model: onnx.ModelProto) -> Iterator[list[int]]:
    """Of those tensors that a runtime fills up with zeros."""
    for graph in graphs(model):
        yield from (list(sparse.dims) for sparse in getattr(graph, "sparse_initializer", ()))
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (list(sparse.dims) for sparse in sparse_in(attribute))
