"""MobileNetV3-Small: inverted residuals with squeeze-and-excite and hard-swish (Howard et al., 2019, arXiv 1905.02244).

Deviations: BatchNorm and initialisation are those of the other families, and there is no dropout before the
classifier; `depth` and `halvings` are not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.models._blocks import (
    InvertedResidual,
    check_halvings,
    check_multiple,
    conv_bn,
    divisible,
    init_weights,
    repeats,
    strides,
)


class Stage(NamedTuple):
    """Rows of the paper's table 2 with the same output width."""

    inner: tuple[int, ...]  # expanded channels of each block
    width: int
    kernel: int
    excited: bool
    act: type[nn.Module]


STAGES = (
    Stage((16,), 16, 3, True, nn.ReLU),
    Stage((72, 88), 24, 3, False, nn.ReLU),
    Stage((96, 240, 240), 40, 5, True, nn.Hardswish),
    Stage((120, 144), 48, 5, True, nn.Hardswish),
    Stage((288, 576, 576), 96, 5, True, nn.Hardswish),
)
STEM, TOP, HIDDEN = 16, 576, 1024


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.expand(self.act(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return x * scale


class MobileNetV3(nn.Module):
    """(N, channels, H, W) to (N, classes)."""

    def __init__(self, width: float, depth: float, halvings: int, classes: int, channels: int) -> None:
        super().__init__()
        first, *rest = strides(halvings)
        step = (rest[0], rest[1], rest[2], 1, rest[3])
        counts = repeats(tuple(len(s.inner) for s in STAGES), depth)
        in_channels, top, hidden = (divisible(published * width) for published in (STEM, TOP, HIDDEN))
        self.stem = nn.Sequential(*conv_bn(channels, in_channels, 3, first), nn.Hardswish())
        self.stages = nn.ModuleList()
        for published, count, stride in zip(STAGES, counts, step, strict=True):
            self.stages.append(stage(published, in_channels, width, count, stride))
            in_channels = divisible(published.width * width)
        self.top = nn.Sequential(*conv_bn(in_channels, top, 1), nn.Hardswish())
        self.head = nn.Sequential(nn.Linear(top, hidden), nn.Hardswish(), nn.Linear(hidden, classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.top(x).mean((2, 3)))
        return logits


def stage(published: Stage, in_channels: int, width: float, blocks: int, stride: int) -> nn.Sequential:
    """More blocks than published are like the last one."""
    layers, out_channels = nn.Sequential(), divisible(published.width * width)
    for i in range(blocks):
        inner = divisible(published.inner[min(i, len(published.inner) - 1)] * width)
        excite = SqueezeExcite(inner, divisible(inner / 4)) if published.excited else None
        step = stride if i == 0 else 1
        layers.append(InvertedResidual(in_channels, inner, out_channels, published.kernel, step, published.act, excite))
        in_channels = out_channels
    return layers


@dataclass(frozen=True)
class MobileNetV3Model(Model):
    width: float = 1.0  # multiplier of the published channels, in multiples of 8
    depth: float = 1.0  # multiplier of the published blocks of each stage
    halvings: int = 5  # of height and width; 3 suits images of 32 pixels, 2 of 16

    def __post_init__(self) -> None:
        check_multiple("width", self.width)
        check_multiple("depth", self.depth)
        check_halvings(self.halvings)

    def build(self, classes: int, channels: int) -> nn.Module:
        return MobileNetV3(self.width, self.depth, self.halvings, classes, channels)


PLUGIN = MobileNetV3Model
