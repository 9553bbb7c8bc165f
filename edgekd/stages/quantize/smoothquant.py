"""SmoothQuant: outlier channels of activations are scaled down at the cost of the weights that take them.

Xiao et al., 2022, arXiv 2211.10438, equation 4: with X what enters a matrix product and W its weights, channel j of X
is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and row j of W multiplied by it. X is divided where it is
made: in the scale and bias of a LayerNormalization, in one or in pieces, or in the weights of a matrix product with
nothing but a ReLU behind it. Where neither stands before, nothing is done.

Deviations: several products that take the same X (queries, keys, values) count as one W, as in the authors' code; a
channel that is always 0, or that all weights ignore, keeps its scale instead of a made-up one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgekd.stages.quantize.channel_scaling import LINEAR, Extremes, Seam, seams

if TYPE_CHECKING:
    import onnx


def smoothable(model: onnx.ModelProto) -> list[Seam]:
    """The seams in front of matrix products."""
    kinds = {node.output[0]: node.op_type for node in model.graph.node}
    return [
        seam
        for seam in seams(model)
        if all(kinds[place.node] in LINEAR for place in seam.way.takers) and not np.isfinite(seam.way.limit)
    ]


def smoothing(
    model: onnx.ModelProto, found: list[Seam], seen: Mapping[str, Extremes], alpha: float
) -> dict[str, np.ndarray]:
    """What the channels of each seam are to be divided by. `seen` are the extremes of what the products take."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    factors = {}
    for seam in found:
        arrays = [numpy_helper.to_array(constants[nodes[p.node].input[p.position]]) for p in seam.way.takers]
        weights = np.max([p.magnitudes(a) for p, a in zip(seam.way.takers, arrays, strict=True)], axis=0)
        weights, values = weights.astype(np.float64), seen[seam.way.taken].magnitude
        alive = (weights > 0) & (values > 0)
        factors[seam.tensor] = np.ones(seam.size)
        factors[seam.tensor][alive] = values[alive] ** alpha / weights[alive] ** (1 - alpha)
    return factors
