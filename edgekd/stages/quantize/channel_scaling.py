"""Channel scaling: find tensors whose channels can be rescaled without changing the network, and rescale them.

The network's function stays the same because the operators that consume such a tensor make up for the change. Used by
cross-layer equalization and SmoothQuant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import GraphView, attribute, replace_constant, to_array
from edgekd.onnx.ops import WEIGHTED, channel_axis

if TYPE_CHECKING:
    import onnx

LINEAR = ("Gemm", "MatMul")
HOMOGENEOUS = (  # f(a x) = a f(x) for every channel and every a > 0, and the channels stay where they are
    *("Relu", "LeakyRelu", "Identity", "Dropout"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
)
RESHAPING = ("Reshape", "Flatten", "Squeeze")


@dataclass(frozen=True)
class ConstantAxis:
    """A constant input of a node, and the axis of it that counts the channels."""

    node: str  # the node's first output
    position: int  # among the inputs of the node
    axis: int
    groups: int = 1  # of a grouped convolution: its other axis is cut into so many, each with channels of its own

    def magnitudes(self, array: np.ndarray) -> np.ndarray:
        """Return the largest magnitude in each channel of the constant."""
        if self.axis == 0:
            largest = np.abs(array).reshape(len(array), -1).max(1)
        else:
            grouped = np.abs(array).reshape(self.groups, len(array) // self.groups, array.shape[1], -1)
            largest = grouped.max((1, 3)).ravel()
        return np.asarray(largest)

    def broadcast(self, factors: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return `factors`, one for each channel, in a form that multiplies a constant of that shape."""
        if self.groups == 1:
            return factors.reshape([-1 if i == self.axis else 1 for i in range(len(shape))])
        rows = np.repeat(factors.reshape(self.groups, -1), shape[0] // self.groups, axis=0)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))


@dataclass(frozen=True)
class ScalableChannels:
    """A tensor whose channels the producer can scale down and the consumers can scale up again."""

    producer: Producer
    path: ScalingPath

    @property
    def tensor(self) -> str:
        return self.producer.tensor

    @property
    def size(self) -> int:
        """How many channels the tensor has."""
        return self.producer.size


@dataclass(frozen=True)
class Producer:
    """The operators that compute a tensor, and their constants that scale its channels. Axes count from the end."""

    tensor: str
    axis: int  # of its channels
    size: int
    constants: tuple[ConstantAxis, ...]  # weights first, then biases
    weighted: bool  # a convolution or matrix product, not a normalization


@dataclass(frozen=True)
class ScalingPath:
    """The way from a tensor to the weighted operators that consume it."""

    tensors: tuple[str, ...]  # from the first to the one that is consumed
    axis: int  # of the channels of the last, counted from the end
    consumers: tuple[ConstantAxis, ...]  # weights
    rectified: bool  # nothing below 0 comes through
    limit: float  # nor anything above this

    @property
    def end(self) -> str:
        """The tensor that the weighted operators read."""
        return self.tensors[-1]


@dataclass(frozen=True)
class ChannelRange:
    """The lowest and the highest value in each channel of a tensor, on calibration inputs."""

    lowest: np.ndarray
    highest: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        return np.asarray(np.maximum(self.highest, -self.lowest))


def find_scalable_channels(model: onnx.ModelProto) -> Iterator[ScalableChannels]:
    """Yield all tensors with scalable channels, in the order of the file. The constants of `model` must be folded."""
    view = GraphView(model)
    for node in model.graph.node:
        producer = producer_of(view, node)
        path = find_path(view, producer.tensor, producer.axis) if producer else None
        if not producer or not path:
            continue
        sizes = {constant_of(view, c).shape[c.axis] * c.groups for c in path.consumers}
        if sizes == {producer.size}:  # a single number in front is no scale of channels
            yield ScalableChannels(producer, path)


def constant_of(view: GraphView, place: ConstantAxis) -> np.ndarray:
    """Return the numbers of a constant input."""
    return to_array(view.initializers[view.producers[place.node].input[place.position]])


def producer_of(view: GraphView, node: onnx.NodeProto) -> Producer | None:
    """Return the node as the producer of its output, if the constants that scale it are known."""
    tensor = node.output[0]
    if node.op_type in WEIGHTED and node.input[1] in view.initializers:
        return weighted_producer(view, node)
    if node.op_type == "LayerNormalization":
        rank = len(view.shapes.get(node.input[0], ()))
        positions = [i for i in (1, 2) if i < len(node.input) and node.input[i]]
        last_axis = attribute(node, "axis", -1) in (-1, rank - 1)
        if last_axis and all(node.input[i] in view.initializers for i in positions):
            constants = tuple(ConstantAxis(tensor, i, 0) for i in positions)
            return Producer(tensor, -1, prod(view.initializers[node.input[1]].dims), constants, weighted=False)
    if node.op_type == "Mul":  # and Add: a normalization in pieces
        consumer = view.only_consumer(tensor)
        for i, name in enumerate(node.input):
            if name in view.initializers and len(view.initializers[name].dims) == 1 and consumer is not None:
                size = int(view.initializers[name].dims[0])
                producer = Producer(tensor, -1, size, (ConstantAxis(tensor, i, 0),), weighted=False)
                return with_added_bias(view, producer, consumer)
    return None


def weighted_producer(view: GraphView, node: onnx.NodeProto) -> Producer | None:
    """Return a convolution or matrix product as a producer, with its bias."""
    shape, tensor, axis = view.shapes[node.input[1]], node.output[0], channel_axis(node)
    if len(shape) < 2 or (node.op_type == "MatMul" and len(shape) != 2):
        return None
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
        return None
    constants: tuple[ConstantAxis, ...] = (ConstantAxis(tensor, 1, axis),)
    size = shape[axis]
    if len(node.input) > 2 and node.input[2]:
        bias = view.initializer_array(node.input[2])
        if bias is None or bias.size != size or bias.shape[-1] != size:
            return None
        constants += (ConstantAxis(tensor, 2, bias.ndim - 1),)
    producer = Producer(tensor, -1 if node.op_type in LINEAR else 1 - len(shape), size, constants, weighted=True)
    consumer = view.only_consumer(tensor)
    if node.op_type == "MatMul" and consumer is not None and consumer.op_type == "Add":
        return with_added_bias(view, producer, consumer)
    return producer


def with_added_bias(view: GraphView, producer: Producer, node: onnx.NodeProto) -> Producer | None:
    """Return the producer with the bias that the Add `node` adds to its last axis."""
    position = 1 - list(node.input).index(producer.tensor)
    bias = view.initializers.get(node.input[position]) if node.op_type == "Add" else None
    if bias is None or tuple(bias.dims) != (producer.size,):
        return None
    constants = (*producer.constants, ConstantAxis(node.output[0], position, 0))
    return replace(producer, tensor=node.output[0], constants=constants)


def find_path(view: GraphView, tensor: str, axis: int) -> ScalingPath | None:
    """Follow operators that keep the channels of a tensor and their scales; None if others read it, too."""
    rectified, limit, tensors = False, float("inf"), [tensor]
    while tensor not in view.outputs:
        consumers = find_consumers(view, tensor, axis)
        if consumers:
            return ScalingPath(tuple(tensors), axis, consumers, rectified, limit)
        node = view.only_consumer(tensor)
        if node is None or node.input[0] != tensor:
            return None
        clips = (
            node.op_type == "Clip" and clip_bound(view, node, 1) == 0 < clip_bound(view, node, 2) and limit == np.inf
        )
        next_axis = axis if clips else output_axis(view, node, tensor, axis)
        if next_axis is None:
            return None
        rectified, limit = rectified or clips or node.op_type == "Relu", clip_bound(view, node, 2) if clips else limit
        tensor, axis = node.output[0], next_axis
        tensors.append(tensor)
    return None


def clip_bound(view: GraphView, node: onnx.NodeProto, position: int) -> float:
    """Return the lowest (1) or highest (2) value of a Clip; nan if it is not known."""
    name = node.input[position] if position < len(node.input) else ""
    if not name:
        return float("-inf") if position == 1 else float("inf")
    bound = view.initializer_array(name)
    return float("nan") if bound is None else float(bound.reshape(()))


def find_consumers(view: GraphView, tensor: str, axis: int) -> tuple[ConstantAxis, ...]:
    """Return the weights that consume a tensor, perhaps in another shape; none if anything else reads it."""
    weights: tuple[ConstantAxis, ...] = ()
    for node in view.consumers(tensor):
        place = consumer_of(view, node, tensor, axis)
        places: tuple[ConstantAxis, ...] = (place,) if place else ()
        if node.op_type in RESHAPING and node.output[0] not in view.outputs and id(node) in view.main_nodes:
            next_axis = output_axis(view, node, tensor, axis)
            places = () if next_axis is None else find_consumers(view, node.output[0], next_axis)
        if not places:
            return ()
        weights += places
    return weights


def consumer_of(view: GraphView, node: onnx.NodeProto, tensor: str, axis: int) -> ConstantAxis | None:
    """Return the weight of a weighted operator for the channels of its input."""
    if node.op_type not in WEIGHTED or node.input[0] != tensor or list(node.input).count(tensor) > 1:
        return None
    if node.input[1] not in view.initializers or id(node) not in view.main_nodes:
        return None
    rank = len(view.shapes[node.input[1]])
    if node.op_type in LINEAR:
        fits = rank == 2 and axis == -1 and not attribute(node, "transA", 0)
        return ConstantAxis(node.output[0], 1, 1 if attribute(node, "transB", 0) else 0) if fits else None
    if axis != 1 - rank:
        return None
    transposed = node.op_type == "ConvTranspose"
    groups = 1 if transposed else attribute(node, "group", 1)
    return ConstantAxis(node.output[0], 1, 0 if transposed else 1, groups)


def output_axis(view: GraphView, node: onnx.NodeProto, tensor: str, axis: int) -> int | None:
    """Return the axis of a node's output that counts the channels of its input; None if it does not keep them."""
    if len(node.output) > 1 and node.op_type != "Dropout":
        return None
    if node.op_type in HOMOGENEOUS:
        return axis
    if node.op_type == "ReduceMean" and axis == -3:  # of (N, C, H, W)
        listed = view.initializer_array(node.input[-1])
        axes = attribute(node, "axes", ()) or ([] if listed is None else listed.ravel().tolist())
        return (axis if attribute(node, "keepdims", 1) else -1) if {i % 4 for i in axes} == {2, 3} else None
    before, after = view.shapes.get(tensor, ()), view.shapes.get(node.output[0], ())
    if node.op_type in RESHAPING and len(before) >= -axis and after:
        only_channels = prod(before[len(before) + axis + 1 :]) == 1  # nothing but the channels is counted behind them
        return -1 if only_channels and before[axis] and after[-1] == before[axis] else None
    return None


def scale_channels(model: onnx.ModelProto, factors: Mapping[str, np.ndarray]) -> list[str]:
    """Divide channels by `factors` in place, and multiply what consumes them.

    Args:
        model: the network; a constant that other nodes use, too, is copied for the one that changes.
        factors: one for each channel, by the name of any tensor on the scaling path.

    Returns: the names of `factors` that were applied.
    """
    nodes, applied = {node.output[0]: node for node in model.graph.node}, []
    for channels in list(find_scalable_channels(model)):
        for tensor in set(channels.path.tensors) & set(factors):
            applied.append(tensor)
            changes = (channels.producer.constants, 1 / factors[tensor]), (channels.path.consumers, factors[tensor])
            for places, change in changes:
                for place in places:
                    multiply_constant(model, nodes[place.node], place, change)
    return applied


def multiply_constant(model: onnx.ModelProto, node: onnx.NodeProto, place: ConstantAxis, factors: np.ndarray) -> None:
    """Multiply the channels of a node's constant by `factors`."""
    array = to_array(GraphView(model).initializers[node.input[place.position]])
    product = array.astype(np.float64) * place.broadcast(factors, array.shape)
    replace_constant(model, node, place.position, product.astype(array.dtype))
