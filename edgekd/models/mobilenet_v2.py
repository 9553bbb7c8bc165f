"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al., 2018, arXiv 1801.04381, table 2).

Deviations: no dropout before the classifier; `depth` and `halvings` are not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

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

EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)  # of the seven stages: t, c, n of the paper
WIDTHS = (16, 24, 32, 64, 96, 160, 320)
BLOCKS = (1, 2, 3, 4, 3, 3, 1)
STEM, TOP = 32, 1280


class MobileNetV2(nn.Module):
    """(N, channels, H, W) to (N, classes)."""

    def __init__(self, width: float, depth: float, halvings: int, classes: int, channels: int) -> None:
        super().__init__()
        first, *rest = strides(halvings)
        step = (1, rest[0], rest[1], rest[2], 1, rest[3], 1)
        in_channels = divisible(STEM * width)
        self.stem = nn.Sequential(*conv_bn(channels, in_channels, 3, first), nn.ReLU6())
        self.stages = nn.ModuleList()
        for t, c, n, s in zip(EXPANSIONS, WIDTHS, repeats(BLOCKS, depth), step, strict=True):
            self.stages.append(stage(in_channels, divisible(c * width), n, s, t))
            in_channels = divisible(c * width)
        top = divisible(TOP * max(1.0, width))  # thin networks keep all features, as in the paper
        self.top = nn.Sequential(*conv_bn(in_channels, top, 1), nn.ReLU6())
        self.head = nn.Linear(top, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.top(x).mean((2, 3)))
        return logits


def stage(in_channels: int, width: int, blocks: int, stride: int, expansion: int) -> nn.Sequential:
    rest = [InvertedResidual(width, expansion * width, width, 3, 1, nn.ReLU6) for _ in range(blocks - 1)]
    return nn.Sequential(InvertedResidual(in_channels, expansion * in_channels, width, 3, stride, nn.ReLU6), *rest)


@dataclass(frozen=True)
class MobileNetV2Model(Model):
    width: float = 1.0  # multiplier of the published channels, in multiples of 8
    depth: float = 1.0  # multiplier of the published blocks of each stage
    halvings: int = 5  # of height and width; 3 suits images of 32 pixels, 2 of 16

    def __post_init__(self) -> None:
        check_multiple("width", self.width)
        check_multiple("depth", self.depth)
        check_halvings(self.halvings)

    def build(self, classes: int, channels: int) -> nn.Module:
        return MobileNetV2(self.width, self.depth, self.halvings, classes, channels)


PLUGIN = MobileNetV2Model
