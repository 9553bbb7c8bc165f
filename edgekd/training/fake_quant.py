"""A network as its INT8 file computes it, for training: same roundings, same places, ranges that learn.

What is rounded where is read from an INT8 file (`core.method.Blueprint`).

- A BatchNorm behind a convolution is folded into it as the exporter does, with its running statistics: what is trained
  is what is deployed. Statistics of batches would round other weights in training than in the file (Krishnamoorthi,
  2018, arXiv 1806.08342: switch to the running ones once they are good); scale and shift go on learning.
- Weights: symmetric steps from their largest magnitude, as the quantizers compute them; gradients pass through.
- Other tensors: both ends of the range learn. Their gradient is that of the step size of LSQ (Esser et al., 2020,
  arXiv 1902.08153) and of the offset of LSQ+ (Bhalgat et al., 2020, arXiv 2004.09576), scaled by 1 / sqrt(N Q) for N
  numbers of an image and Q steps; the ends count in steps, so that LSQ's balance with the weights holds.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekd.core.artifact import Learnt, Mark
from edgekd.core.quant_scheme import Dialect
from edgekd.core.quant_spec import Blueprint
from edgekd.core.tensor_fingerprint import mark, nearest, probe
from edgekd.errors import ConfigError
from edgekd.training.exported_graph import Graph

CLIPS = (torch.ops.aten.hardtanh.default, torch.ops.aten.clamp.default)
TINY = torch.finfo(torch.float32).tiny


def grid(dialect: Dialect) -> tuple[int, int]:
    """The integers between which the ends of a range lie. Values may saturate at -128, too."""
    if dialect.activation == "uint8":
        return 0, 255
    return (-127 if dialect.symmetric_activation else -128), 127


def affine(low: Tensor, high: Tensor, dialect: Dialect) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, float32, as onnxruntime computes them (`compute_scale_zp`); differentiable."""
    first, last = grid(dialect)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if dialect.symmetric_activation:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (last - first)
    if scale < TINY:
        return torch.ones_like(scale).float(), torch.zeros_like(scale).float()
    exact = torch.full_like(scale, (first + last) / 2) if dialect.symmetric_activation else first - low / scale
    return scale.float(), (exact + (exact.round() - exact).detach()).float()


class Rounder(nn.Module):
    """Rounds a tensor to INT8 between two ends that it learns; `floor` and `ceiling` are of an activation before it.

    An end at zero stays there: the INT8 file may have dropped the ReLU. Past the ends of a clip there are no values.
    """

    def __init__(self, low: float, high: float, dialect: Dialect, floor: float, ceiling: float) -> None:
        super().__init__()
        first, last = grid(dialect)
        self.dialect, self.floor, self.ceiling = dialect, floor, ceiling
        self.signed = low < 0
        self.steps = (last - first) / (2 if dialect.symmetric_activation else 1)
        if dialect.symmetric_activation:
            low, high = -max(-low, high), max(-low, high)
        self.high = nn.Parameter(torch.tensor(high / self.steps))
        if self.signed and not dialect.symmetric_activation:
            self.low = nn.Parameter(torch.tensor(low / self.steps))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest, float32."""
        high = (self.high * self.steps).clamp(max=self.ceiling)
        if not self.signed:
            return torch.zeros_like(high), high
        low = -high if self.dialect.symmetric_activation else self.low * self.steps
        return low.clamp(min=self.floor), high

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = affine(*self.bounds(), self.dialect)
        first, last = (0, 255) if self.dialect.activation == "uint8" else (-128, 127)
        share = 1 / sqrt(x.numel() / len(x) * self.steps)
        made: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
            x, scale.reshape(1), zero.reshape(1), first, last, share
        )
        return made


def rounded_weight(weight: Tensor, axis: int | None, dialect: Dialect) -> tuple[Tensor, Tensor]:
    """A weight in signed symmetric INT8, and its scales: one for each index of `axis` or (None) one for all."""
    limit = 64 if dialect.reduce_range else 127
    rows = weight.detach().reshape(1, -1) if axis is None else weight.detach().movedim(axis, 0).flatten(1)
    exact = rows.abs().amax(1).double() / limit
    scale = torch.where(exact < TINY, 1.0, exact).float()
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, scale[0], zero[0], -limit, limit), scale
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -limit, limit), scale


def rounded_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """A bias in INT32: whole numbers of what its integers are worth, the product of both scales."""
    whole = ((bias.double() / scale.double()).round() * scale).float()
    return bias + (whole - bias).detach()


class Rounding:
    """A network that rounds what its INT8 file rounds. `rounders` hold what there is to learn beside its weights."""

    def __init__(self, network: nn.Module, blueprint: Blueprint, x: Tensor) -> None:
        """`x` are images, (2 or more, C, H, W). Raises ConfigError if nothing of the blueprint is in the network."""
        self.graph, self.blueprint = Graph(network.eval(), x[:2]), blueprint
        self.shape, self.device = tuple(x.shape[1:]), x.device
        tensors, weights = self.look()
        owners = [(m, i) for i, tensor in enumerate(blueprint.tensors) for m in tensor.marks]
        self.points = {node: owners[at][1] for node, at in found(tensors, [m for m, _ in owners]).items()}
        kernels = found(weights, [w[0] for w in blueprint.weights])
        self.axes = {n: self.graph.kernels[n] if blueprint.weights[i][1] else None for n, i in kernels.items()}
        if not self.points or not self.axes:
            raise ConfigError(
                f"`{type(network).__name__}` computes nothing of what its INT8 file rounds",
                hint="the export changes the network; report it with the network",
            )
        self.edges = {
            (source, reader)
            for source, i in self.points.items()
            for reader in source.users
            if takes(blueprint.tensors[i].readers, weights.get(reader) or tensors.get(reader))
        }
        self.ranges = {i: self.rounder(i).to(x.device) for i in sorted(set(self.points.values()))}
        self.rounders = nn.ModuleDict({str(i): rounder for i, rounder in self.ranges.items()})
        self.missing = len(blueprint.tensors) - len(self.rounders) + len(blueprint.weights) - len(set(kernels.values()))

    @torch.no_grad()
    def look(self) -> tuple[dict[fx.Node, Mark], dict[fx.Node, Mark]]:
        """The marks of the tensors that change with the image, and of weights by their operation."""
        weights: dict[fx.Node, Mark] = {}

        def weigh(node: fx.Node, args: Any) -> Any:
            weights[node] = mark(args[1].cpu().numpy())
            return args

        x = torch.from_numpy(probe(self.shape)).to(self.device)
        with exact(self.device):
            values = self.graph.run(x, weigh=weigh)
        tensors = {
            node: mark(value.cpu().numpy())
            for node, value in values.items()
            if node in self.graph.moving and isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        }
        return tensors, weights

    def rounder(self, number: int) -> Rounder:
        clips = [n.args for n, i in self.points.items() if i == number and n.target in CLIPS]
        floors = [float(a[1]) for a in clips if len(a) > 1 and isinstance(a[1], (int, float))]
        ceilings = [float(a[2]) for a in clips if len(a) > 2 and isinstance(a[2], (int, float))]
        point = self.blueprint.tensors[number]
        dialect = self.blueprint.dialect
        return Rounder(point.low, point.high, dialect, max(floors, default=-inf), min(ceilings, default=inf))

    def __call__(self, x: Tensor) -> Tensor:
        """The answers to images as the INT8 file gives them, in float32; gradients reach weights and ranges."""
        done: dict[fx.Node, Tensor] = {}

        def read(source: fx.Node, reader: fx.Node, value: Tensor) -> Tensor:
            if (source, reader) not in self.edges:
                return value
            if source not in done:
                done[source] = self.ranges[self.points[source]](value)
            return done[source]

        def weigh(node: fx.Node, args: Any) -> Any:
            return self.weighed(node, args) if node in self.axes else args

        with torch.autocast(x.device.type, enabled=False):
            values = self.graph.run(x, read, weigh)
            answer: Tensor = values[self.graph.answer]
            return read(self.graph.answer, self.graph.nodes[-1], answer)

    def weighed(self, node: fx.Node, args: Any) -> tuple[Any, ...]:
        """The arguments of a weighted operation, its weight rounded, and its bias where the file stores integers."""
        dialect = self.blueprint.dialect
        weight, scale = rounded_weight(args[1], self.axes[node], dialect)
        source = node.all_input_nodes[0]
        bias = args[2] if len(args) > 2 else None
        if bias is not None and dialect.form == "integers" and (source, node) in self.edges:
            entering, _ = affine(*self.ranges[self.points[source]].bounds(), dialect)
            bias = rounded_bias(bias, scale * entering.detach())
        return args[0], weight, *((bias,) if len(args) > 2 else ()), *args[3:]

    @torch.no_grad()
    def learnt(self) -> tuple[Learnt, ...]:
        """The ranges as they are now, for the network as it is now."""
        tensors, _ = self.look()
        nodes = {i: node for node, i in reversed(self.points.items())}  # the first is computed before what shares
        return tuple(
            Learnt(tensors[nodes[i]], *(end.item() for end in rounder.bounds())) for i, rounder in self.ranges.items()
        )


def found(marks: dict[fx.Node, Mark], known: list[Mark]) -> dict[fx.Node, int]:
    """Which of the known tensors each node is; only nodes that are one."""
    near = {node: nearest(own, known) for node, own in marks.items()}
    return {node: i for node, i in near.items() if i is not None}


def takes(readers: tuple[Mark, ...] | None, reader: Mark | None) -> bool:
    return readers is None or (reader is not None and nearest(reader, readers) is not None)


def exact(device: torch.device) -> Any:
    """No TF32 in convolutions: marks must be those of float32."""
    return torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else torch.no_grad()
