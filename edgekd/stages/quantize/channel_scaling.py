"""Seams: tensors whose channels may be scaled without a trace, what computes and what takes them making up for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import Graph, bound, graph_of, rank, replace_constant, value
from edgekd.onnx.ops import WEIGHTED, channel_axis

if TYPE_CHECKING:
    import onnx

LINEAR = ("Gemm", "MatMul")
KEEPING = (  # f(a x) = a f(x) for every channel and every a > 0, and the channels stay where they are
    *("Relu", "LeakyRelu", "Identity", "Dropout"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
)
SHAPING = ("Reshape", "Flatten", "Squeeze")


@dataclass(frozen=True)
class Place:
    """A constant of a node, and where in it the channels of a seam are."""

    node: str  # its first output
    position: int  # among the inputs of the node
    axis: int
    groups: int = 1  # of a grouped convolution: its other axis is cut into so many, each with channels of its own

    def magnitudes(self, array: np.ndarray) -> np.ndarray:
        """The largest magnitude in each channel."""
        if self.axis == 0:
            found = np.abs(array).reshape(len(array), -1).max(1)
        else:
            cut = np.abs(array).reshape(self.groups, len(array) // self.groups, array.shape[1], -1)
            found = cut.max((1, 3)).ravel()
        return np.asarray(found)

    def spread(self, factors: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """`factors`, one for each channel, in a form that multiplies a constant of that shape."""
        if self.groups == 1:
            return factors.reshape([-1 if i == self.axis else 1 for i in range(len(shape))])
        rows = np.repeat(factors.reshape(self.groups, -1), shape[0] // self.groups, axis=0)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))


@dataclass(frozen=True)
class Seam:
    """A tensor with what scales its channels down, and what scales them up again. Axes count from the end."""

    maker: Maker
    way: Way

    @property
    def tensor(self) -> str:
        return self.maker.tensor

    @property
    def size(self) -> int:
        """How many channels it has."""
        return self.maker.size


@dataclass(frozen=True)
class Maker:
    """What computes a tensor."""

    tensor: str
    axis: int  # of its channels
    size: int
    places: tuple[Place, ...]  # weights first, then biases
    weighted: bool  # a convolution or matrix product, not a normalization


@dataclass(frozen=True)
class Way:
    """From a tensor to the weighted operators that take it."""

    tensors: tuple[str, ...]  # from the first to the one that is taken
    axis: int  # of the channels of the last
    takers: tuple[Place, ...]  # weights
    rectified: bool  # nothing below 0 comes through
    limit: float  # nor anything above this

    @property
    def taken(self) -> str:
        return self.tensors[-1]


@dataclass(frozen=True)
class Extremes:
    """The lowest and the highest number in each channel of a tensor, on calibration inputs."""

    lowest: np.ndarray
    highest: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        return np.asarray(np.maximum(self.highest, -self.lowest))


def seams(model: onnx.ModelProto) -> Iterator[Seam]:
    """All seams, in the order of the file. The constants of `model` must be folded."""
    graph = graph_of(model)
    nodes = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        made = maker(graph, node)
        way = way_of(graph, made.tensor, made.axis) if made else None
        if not made or not way:
            continue
        taken = {graph.constants[nodes[p.node].input[p.position]].shape[p.axis] * p.groups for p in way.takers}
        if taken == {made.size}:  # a single number in front is no scale of channels
            yield Seam(made, way)


def maker(graph: Graph, node: onnx.NodeProto) -> Maker | None:
    """The node as what makes its output, if the constants that scale it are known."""
    tensor = node.output[0]
    if node.op_type in WEIGHTED and node.input[1] in graph.constants:
        return weighted(graph, node)
    if node.op_type == "LayerNormalization" and value(node, "axis", -1) in (-1, rank(graph, node.input[0]) - 1):
        held = [i for i in (1, 2) if i < len(node.input) and node.input[i]]
        if all(node.input[i] in graph.constants for i in held):
            places = tuple(Place(tensor, i, 0) for i in held)
            return Maker(tensor, -1, graph.constants[node.input[1]].size, places, weighted=False)
    if node.op_type == "Mul":  # and Add: a normalization in pieces
        after = graph.only_reader(tensor)
        for i, name in enumerate(node.input):
            if name in graph.constants and graph.constants[name].ndim == 1 and after is not None:
                start = Maker(tensor, -1, graph.constants[name].size, (Place(tensor, i, 0),), weighted=False)
                return added(graph, start, after)
    return None


def weighted(graph: Graph, node: onnx.NodeProto) -> Maker | None:
    weight, tensor, axis = graph.constants[node.input[1]], node.output[0], channel_axis(node)
    if weight.ndim < 2 or (node.op_type == "MatMul" and weight.ndim != 2):
        return None
    if node.op_type == "ConvTranspose" and value(node, "group", 1) != 1:
        return None
    places: tuple[Place, ...] = (Place(tensor, 1, axis),)
    size = weight.shape[axis]
    if len(node.input) > 2 and node.input[2]:
        bias = graph.constants.get(node.input[2])
        if bias is None or bias.size != size or bias.shape[-1] != size:
            return None
        places += (Place(tensor, 2, bias.ndim - 1),)
    made = Maker(tensor, -1 if node.op_type in LINEAR else 1 - weight.ndim, size, places, weighted=True)
    after = graph.only_reader(tensor)
    if node.op_type == "MatMul" and after is not None and after.op_type == "Add":
        return added(graph, made, after)
    return made


def added(graph: Graph, made: Maker, node: onnx.NodeProto) -> Maker | None:
    """With the bias that the Add `node` adds to its last axis."""
    position = 1 - list(node.input).index(made.tensor)
    bias = graph.constants.get(node.input[position])
    if node.op_type != "Add" or bias is None or bias.shape != (made.size,):
        return None
    return replace(made, tensor=node.output[0], places=(*made.places, Place(node.output[0], position, 0)))


def way_of(graph: Graph, tensor: str, axis: int) -> Way | None:
    """Through operators that keep the channels of a tensor and their scales; None if others read it, too."""
    rectified, limit, tensors = False, float("inf"), [tensor]
    while tensor not in graph.ends:
        takers = takers_of(graph, tensor, axis)
        if takers:
            return Way(tuple(tensors), axis, takers, rectified, limit)
        node = graph.only_reader(tensor)
        if node is None or node.input[0] != tensor:
            return None
        cut = node.op_type == "Clip" and bound(graph, node, 1) == 0 < bound(graph, node, 2) and limit == np.inf
        moved = axis if cut else carried(graph, node, tensor, axis)
        if moved is None:
            return None
        rectified, limit = rectified or cut or node.op_type == "Relu", bound(graph, node, 2) if cut else limit
        tensor, axis = node.output[0], moved
        tensors.append(tensor)
    return None


def takers_of(graph: Graph, tensor: str, axis: int) -> tuple[Place, ...]:
    """Who takes a tensor, perhaps in another shape; none if anything else reads it."""
    found: tuple[Place, ...] = ()
    for node in graph.readers.get(tensor, []):
        place = taker(graph, node, tensor, axis)
        places: tuple[Place, ...] = (place,) if place else ()
        if node.op_type in SHAPING and node.output[0] not in graph.ends:
            moved = carried(graph, node, tensor, axis)
            places = () if moved is None else takers_of(graph, node.output[0], moved)
        if not places:
            return ()
        found += places
    return found


def taker(graph: Graph, node: onnx.NodeProto, tensor: str, axis: int) -> Place | None:
    """Where a weighted operator has the weights for the channels of its input."""
    if node.op_type not in WEIGHTED or node.input[0] != tensor or list(node.input).count(tensor) > 1:
        return None
    weight = graph.constants.get(node.input[1])
    if weight is None:
        return None
    if node.op_type in LINEAR:
        fits = weight.ndim == 2 and axis == -1 and not value(node, "transA", 0)
        return Place(node.output[0], 1, 1 if value(node, "transB", 0) else 0) if fits else None
    if axis != 1 - weight.ndim:
        return None
    turned = node.op_type == "ConvTranspose"
    return Place(node.output[0], 1, 0 if turned else 1, 1 if turned else value(node, "group", 1))


def carried(graph: Graph, node: onnx.NodeProto, tensor: str, axis: int) -> int | None:
    """Which axis of a node's output counts the channels of its input; None if it does not keep them."""
    if len(node.output) > 1 and node.op_type != "Dropout":
        return None
    if node.op_type in KEEPING:
        return axis
    if node.op_type == "ReduceMean" and axis == -3:  # of (N, C, H, W)
        listed = value(node, "axes", ()) or graph.constants.get(node.input[-1], np.zeros(0)).ravel().tolist()
        return (axis if value(node, "keepdims", 1) else -1) if {i % 4 for i in listed} == {2, 3} else None
    before, after = graph.shapes.get(tensor, ()), graph.shapes.get(node.output[0], ())
    if node.op_type in SHAPING and len(before) >= -axis and after:
        alone = prod(before[len(before) + axis + 1 :]) == 1  # nothing but the channels is counted behind them
        return -1 if alone and before[axis] and after[-1] == before[axis] else None
    return None


def scale(model: onnx.ModelProto, factors: Mapping[str, np.ndarray]) -> list[str]:
    """Divide the channels of seams by `factors`, which are known by a tensor on the way, and multiply what takes them.

    In place; the tensors that were found. A constant that other nodes use, too, is copied for the one that changes.
    """
    nodes, found = {node.output[0]: node for node in model.graph.node}, []
    for seam in list(seams(model)):
        for tensor in set(seam.way.tensors) & set(factors):
            found.append(tensor)
            for places, change in ((seam.maker.places, 1 / factors[tensor]), (seam.way.takers, factors[tensor])):
                for place in places:
                    multiply(model, nodes[place.node], place, change)
    return found


def multiply(model: onnx.ModelProto, node: onnx.NodeProto, place: Place, factors: np.ndarray) -> None:
    from onnx import numpy_helper

    name = node.input[place.position]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    made = array.astype(np.float64) * place.spread(factors, array.shape)
    replace_constant(model, node, place.position, made.astype(array.dtype))
