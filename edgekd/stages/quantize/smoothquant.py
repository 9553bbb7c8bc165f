"""SmoothQuant: scale outlier channels of activations down and the weights that consume them up.

Xiao et al., 2022, arXiv 2211.10438, equation 4: with X the input of a matrix product and W its weights, channel j of X
is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and row j of W multiplied by it. X is divided where it is
computed: in the scale and bias of a LayerNormalization, in one node or in pieces, or in the weights of a matrix product
with nothing but a ReLU behind it. Where neither comes before, nothing is done.

Deviations: several products that consume the same X (queries, keys, values) count as one W, as in the authors' code; a
channel that is always 0, or that all weights ignore, keeps its scale instead of an arbitrary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import GraphView
from edgekd.stages.quantize.channel_scaling import (
    LINEAR,
    ChannelRange,
    ScalableChannels,
    constant_of,
    find_scalable_channels,
)

if TYPE_CHECKING:
    import onnx


def find_smoothable(model: onnx.ModelProto) -> list[ScalableChannels]:
    """Return the tensors with scalable channels in front of matrix products."""
    op_types = {node.output[0]: node.op_type for node in model.graph.node}
    return [
        channels
        for channels in find_scalable_channels(model)
        if all(op_types[place.node] in LINEAR for place in channels.path.consumers)
        and not np.isfinite(channels.path.limit)
    ]


def smoothing_factors(
    model: onnx.ModelProto, smoothable: Sequence[ScalableChannels], ranges: Mapping[str, ChannelRange], alpha: float
) -> dict[str, np.ndarray]:
    """Return what the channels of each tensor are to be divided by.

    `ranges` are those of the tensors that the matrix products read.
    """
    view, factors = GraphView(model), {}
    for channels in smoothable:
        consumers = channels.path.consumers
        weights = np.max([place.magnitudes(constant_of(view, place)) for place in consumers], axis=0)
        weights, values = weights.astype(np.float64), ranges[channels.path.end].magnitude
        alive = (weights > 0) & (values > 0)
        factors[channels.tensor] = np.ones(channels.size)
        factors[channels.tensor][alive] = values[alive] ** alpha / weights[alive] ** (1 - alpha)
    return factors
