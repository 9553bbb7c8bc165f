"""ShuffleNetV2: half of the channels pass a unit untouched, then all are shuffled (Ma et al., 2018, arXiv 1807.11164).

Parameters are named as in torchvision, whose checkpoints therefore load.
With fewer than 5 `halvings` the stem has no stride, and with fewer than 4 nothing is pooled behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.models._blocks import check_halvings, conv_bn, init_weights, strides


class Shuffle(nn.Module):
    """Two halves of the channels, interleaved. The batch is written as -1: so its ONNX shape is a constant."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        _, channels, height, width = left.shape
        both = torch.cat([left, right], 1).reshape(-1, 2, channels, height, width)
        return both.transpose(1, 2).reshape(-1, 2 * channels, height, width)


class BasicUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch2 = branch(width // 2, width // 2, 1)
        self.shuffle = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        passed, used = x.chunk(2, 1)
        out: Tensor = self.shuffle(passed, self.branch2(used))
        return out


class FirstUnit(nn.Module):
    """The first of a stage: both branches see all channels, and together make as many as the stage has."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        spatial = conv_bn(in_channels, in_channels, 3, stride, groups=in_channels)
        self.branch1 = nn.Sequential(*spatial, *conv_bn(in_channels, width // 2, 1), nn.ReLU())
        self.branch2 = branch(in_channels, width // 2, stride)
        self.shuffle = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shuffle(self.branch1(x), self.branch2(x))
        return out


class ShuffleNetV2(nn.Module):
    """(N, channels, H, W) to (N, classes)."""

    def __init__(
        self, widths: tuple[int, ...], blocks: tuple[int, ...], halvings: int, classes: int, channels: int
    ) -> None:
        super().__init__()
        stem, width2, width3, width4, top = widths
        step = strides(halvings)
        self.conv1 = nn.Sequential(*conv_bn(channels, stem, 3, step[0]), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1) if step[1] > 1 else nn.Identity()
        self.stage2 = stage(stem, width2, blocks[0], step[2])
        self.stage3 = stage(width2, width3, blocks[1], step[3])
        self.stage4 = stage(width3, width4, blocks[2], step[4])
        self.conv5 = nn.Sequential(*conv_bn(width4, top, 1), nn.ReLU())
        self.fc = nn.Linear(top, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))
        logits: Tensor = self.fc(self.conv5(x).mean((2, 3)))
        return logits


def branch(in_channels: int, width: int, stride: int) -> nn.Sequential:
    spatial = conv_bn(width, width, 3, stride, groups=width)
    return nn.Sequential(*conv_bn(in_channels, width, 1), nn.ReLU(), *spatial, *conv_bn(width, width, 1), nn.ReLU())


def stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(FirstUnit(in_channels, width, stride), *(BasicUnit(width) for _ in range(blocks - 1)))


@dataclass(frozen=True)
class ShuffleNetModel(Model):
    # channels of the stem, three stages, and the last convolution; 1.0x. Others of the paper, with its stem of 24:
    # 0.5x 48 96 192 1024, 1.5x 176 352 704 1024, 2x 244 488 976 2048
    widths: tuple[int, ...] = (24, 116, 232, 464, 1024)
    blocks: tuple[int, ...] = (4, 8, 4)  # of the three stages
    halvings: int = 5  # of height and width; 3 suits images of 32 pixels, 2 of 16

    def __post_init__(self) -> None:
        if len(self.widths) != 5 or min(self.widths) < 1 or any(width % 2 for width in self.widths[1:4]):
            raise ConfigError(
                f"widths is {self.widths}",
                hint="give five numbers of channels: stem, three stages (even: units split them), last convolution",
            )
        if len(self.blocks) != 3 or min(self.blocks) < 1:
            raise ConfigError(
                f"blocks is {self.blocks}", hint="give three stages 1 block or more each, such as 4, 8, 4"
            )
        check_halvings(self.halvings)

    def build(self, classes: int, channels: int) -> nn.Module:
        return ShuffleNetV2(self.widths, self.blocks, self.halvings, classes, channels)


PLUGIN = ShuffleNetModel
