"""Fake quantization of a network as in its INT8 file, with learned ranges, for quantization-aware training.

Which tensors are quantized is read from an INT8 file (`core.quant_spec.QuantSpec`).

- A BatchNorm behind a convolution is folded into it as the exporter does, with its running statistics: what is trained
  is what is deployed. Batch statistics would quantize other weights in training than in the file (Krishnamoorthi,
  2018, arXiv 1806.08342: switch to the running ones once they are good); scale and shift go on learning.
- Weights: symmetric scales from their largest magnitude, as the quantizers compute them; straight-through gradients.
- Other tensors: both ends of the range are learned. Their gradient is that of the step size of LSQ (Esser et al., 2020,
  arXiv 1902.08153) and of the offset of LSQ+ (Bhalgat et al., 2020, arXiv 2004.09576), scaled by 1 / sqrt(N Q) for N
  numbers of an image and Q steps; the ends count in steps, so that LSQ's balance with the weights holds.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekd.core.artifact import Fingerprint, LearnedRange
from edgekd.core.quant_scheme import QuantScheme
from edgekd.core.quant_spec import QuantSpec
from edgekd.core.tensor_fingerprint import compute_fingerprint, nearest_fingerprint, probe_images
from edgekd.errors import ConfigError
from edgekd.training.exported_graph import ExportedGraph

CLIPS = (torch.ops.aten.hardtanh.default, torch.ops.aten.clamp.default)
TINY = torch.finfo(torch.float32).tiny


def integer_range(scheme: QuantScheme) -> tuple[int, int]:
    """Return the integers of the ends of a range. Values may saturate at -128, too."""
    if scheme.activation == "uint8":
        return 0, 255
    return (-127 if scheme.symmetric_activation else -128), 127


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, float32, as onnxruntime computes them (`compute_scale_zp`); differentiable."""
    first, last = integer_range(scheme)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if scheme.symmetric_activation:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (last - first)
    if scale < TINY:
        return torch.ones_like(scale).float(), torch.zeros_like(scale).float()
    exact = torch.full_like(scale, (first + last) / 2) if scheme.symmetric_activation else first - low / scale
    return scale.float(), (exact + (exact.round() - exact).detach()).float()


class LearnedFakeQuant(nn.Module):
    """Quantizes a tensor to INT8 in a learned range; `floor` and `ceiling` are those of an activation before it.

    An end at zero stays there: the INT8 file may have dropped the ReLU. Beyond the ends of a clip there are no values.
    """

    def __init__(self, low: float, high: float, scheme: QuantScheme, floor: float, ceiling: float) -> None:
        super().__init__()
        first, last = integer_range(scheme)
        self.scheme, self.floor, self.ceiling = scheme, floor, ceiling
        self.signed = low < 0
        self.steps = (last - first) / (2 if scheme.symmetric_activation else 1)
        if scheme.symmetric_activation:
            low, high = -max(-low, high), max(-low, high)
        self.high = nn.Parameter(torch.tensor(high / self.steps))
        if self.signed and not scheme.symmetric_activation:
            self.low = nn.Parameter(torch.tensor(low / self.steps))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the range, float32."""
        high = (self.high * self.steps).clamp(max=self.ceiling)
        if not self.signed:
            return torch.zeros_like(high), high
        low = -high if self.scheme.symmetric_activation else self.low * self.steps
        return low.clamp(min=self.floor), high

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = scale_and_zero_point(*self.bounds(), self.scheme)
        first, last = (0, 255) if self.scheme.activation == "uint8" else (-128, 127)
        gradient_scale = 1 / sqrt(x.numel() / len(x) * self.steps)
        output: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
            x, scale.reshape(1), zero.reshape(1), first, last, gradient_scale
        )
        return output


def fake_quantize_weight(weight: Tensor, axis: int | None, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Return a weight in signed symmetric INT8, and its scales: one for each index of `axis` or (None) one for all."""
    limit = 64 if scheme.reduce_range else 127
    rows = weight.detach().reshape(1, -1) if axis is None else weight.detach().movedim(axis, 0).flatten(1)
    exact = rows.abs().amax(1).double() / limit
    scale = torch.where(exact < TINY, 1.0, exact).float()
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, scale[0], zero[0], -limit, limit), scale
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -limit, limit), scale


def fake_quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return a bias in INT32: multiples of its scale, the product of the scales of input and weight."""
    whole = ((bias.double() / scale.double()).round() * scale).float()
    return bias + (whole - bias).detach()


class FakeQuantModel:
    """A network with the fake quantization of its INT8 file. `quantizers` hold the learned ranges."""

    def __init__(self, network: nn.Module, quant_spec: QuantSpec, images: Tensor) -> None:
        """Match the network with the specification.

        Args:
            images: (2 or more, C, H, W).

        Raises:
            ConfigError: if no tensor or weight of the specification is in the network.
        """
        self.graph, self.quant_spec = ExportedGraph(network.eval(), images[:2]), quant_spec
        self.shape, self.device = tuple(images.shape[1:]), images.device
        tensors, weights = self.fingerprint_nodes()
        owners = [(m, i) for i, tensor in enumerate(quant_spec.tensors) for m in tensor.fingerprints]
        self.points = {node: owners[at][1] for node, at in match_nodes(tensors, [m for m, _ in owners]).items()}
        kernels = match_nodes(weights, [w[0] for w in quant_spec.weights])
        self.axes = {n: self.graph.kernels[n] if quant_spec.weights[i][1] else None for n, i in kernels.items()}
        if not self.points or not self.axes:
            raise ConfigError(
                f"`{type(network).__name__}` computes no tensor that its INT8 file quantizes",
                hint="the export changes the network; report it with the network",
            )
        self.edges = {
            (source, reader)
            for source, i in self.points.items()
            for reader in source.users
            if is_reader(quant_spec.tensors[i].readers, weights.get(reader) or tensors.get(reader))
        }
        self.ranges = {i: self.build_quantizer(i).to(images.device) for i in sorted(set(self.points.values()))}
        self.quantizers = nn.ModuleDict({str(i): quantizer for i, quantizer in self.ranges.items()})
        self.missing = (
            len(quant_spec.tensors) - len(self.quantizers) + len(quant_spec.weights) - len(set(kernels.values()))
        )

    @torch.no_grad()
    def fingerprint_nodes(self) -> tuple[dict[fx.Node, Fingerprint], dict[fx.Node, Fingerprint]]:
        """Return the fingerprints of the tensors that depend on the image, and of weights, by node."""
        weights: dict[fx.Node, Fingerprint] = {}

        def weigh(node: fx.Node, args: Any) -> Any:
            weights[node] = compute_fingerprint(args[1].cpu().numpy())
            return args

        x = torch.from_numpy(probe_images(self.shape)).to(self.device)
        with without_tf32(self.device):
            values = self.graph.run(x, weigh=weigh)
        tensors = {
            node: compute_fingerprint(value.cpu().numpy())
            for node, value in values.items()
            if node in self.graph.dependent
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and value.numel()
        }
        return tensors, weights

    def build_quantizer(self, number: int) -> LearnedFakeQuant:
        """Return the quantizer of a tensor of the specification, with the bounds of the activation before it."""
        clips = [n.args for n, i in self.points.items() if i == number and n.target in CLIPS]
        floors = [float(a[1]) for a in clips if len(a) > 1 and isinstance(a[1], (int, float))]
        ceilings = [float(a[2]) for a in clips if len(a) > 2 and isinstance(a[2], (int, float))]
        point = self.quant_spec.tensors[number]
        scheme = self.quant_spec.scheme
        return LearnedFakeQuant(point.low, point.high, scheme, max(floors, default=-inf), min(ceilings, default=inf))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of the INT8 file for images, in float32; gradients reach weights and ranges."""
        quantized: dict[fx.Node, Tensor] = {}

        def read(source: fx.Node, reader: fx.Node, value: Tensor) -> Tensor:
            if (source, reader) not in self.edges:
                return value
            if source not in quantized:
                quantized[source] = self.ranges[self.points[source]](value)
            return quantized[source]

        def weigh(node: fx.Node, args: Any) -> Any:
            return self.quantized_arguments(node, args) if node in self.axes else args

        with torch.autocast(x.device.type, enabled=False):
            values = self.graph.run(x, read, weigh)
            output: Tensor = values[self.graph.output]
            return read(self.graph.output, self.graph.nodes[-1], output)

    def quantized_arguments(self, node: fx.Node, args: Any) -> tuple[Any, ...]:
        """Return the arguments of a weighted operation: weight quantized, and bias if the file stores integers."""
        scheme = self.quant_spec.scheme
        weight, scale = fake_quantize_weight(args[1], self.axes[node], scheme)
        source = node.all_input_nodes[0]
        bias = args[2] if len(args) > 2 else None
        if bias is not None and scheme.format == "qdq" and (source, node) in self.edges:
            input_scale, _ = scale_and_zero_point(*self.ranges[self.points[source]].bounds(), scheme)
            bias = fake_quantize_bias(bias, scale * input_scale.detach())
        return args[0], weight, *((bias,) if len(args) > 2 else ()), *args[3:]

    @torch.no_grad()
    def learned_ranges(self) -> tuple[LearnedRange, ...]:
        """Return the current ranges, with the fingerprints of the current network."""
        tensors, _ = self.fingerprint_nodes()
        nodes = {i: node for node, i in reversed(self.points.items())}  # the first is computed before what shares
        return tuple(
            LearnedRange(tensors[nodes[i]], *(end.item() for end in quantizer.bounds()))
            for i, quantizer in self.ranges.items()
        )


def match_nodes(fingerprints: dict[fx.Node, Fingerprint], candidates: list[Fingerprint]) -> dict[fx.Node, int]:
    """Return for each node the index of the candidate with its fingerprint; nodes without one are left out."""
    near = {node: nearest_fingerprint(fingerprint, candidates) for node, fingerprint in fingerprints.items()}
    return {node: i for node, i in near.items() if i is not None}


def is_reader(readers: tuple[Fingerprint, ...] | None, reader: Fingerprint | None) -> bool:
    return readers is None or (reader is not None and nearest_fingerprint(reader, readers) is not None)


def without_tf32(device: torch.device) -> Any:
    """Return a context without TF32 in convolutions: fingerprints are those of float32."""
    return torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else torch.no_grad()
