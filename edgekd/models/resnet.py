"""ResNet of the CIFAR family: three stages of basic blocks, depth 6n+2 (He et al., 2016, section 4.2).

Deviation: where a stage changes width or size the shortcut is a 1x1 convolution with BatchNorm (the
paper's option B, not A), because it exports and quantizes like every other convolution.
The sum of a block is a module, `join`, so that its pre-activation output can be hooked.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError


class Add(nn.Module):
    """The sum of a residual branch and its shortcut, before the activation."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, width, 1, stride)
        self.join = Add()
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(self.join(branch, self.shortcut(x)))
        return out


class CifarResNet(nn.Module):
    """(N, channels, H, W) to (N, classes); H and W are halved by stage 2 and again by stage 3."""

    def __init__(self, depth: int, width: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(*conv_bn(channels, width, 3, 1), nn.ReLU())
        self.stage1 = stage(width, width, blocks, 1)
        self.stage2 = stage(width, 2 * width, blocks, 2)
        self.stage3 = stage(2 * width, 4 * width, blocks, 2)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def conv_bn(in_channels: int, width: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width))


def stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, width, stride), *rest)


@dataclass(frozen=True)
class ResNet(Model):
    depth: int = 20  # 6n+2: 8, 14, 20, 32, 44, 56, 110
    width: int = 16  # channels of the first stage; the others have 2 and 4 times as many

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ConfigError(
                f"depth is {self.depth}, which no ResNet of the CIFAR family has",
                hint="use 6n+2: 8, 14, 20, 26, 32, 44, 56 or 110",
            )
        if self.width < 1:
            raise ConfigError(f"width is {self.width}", hint="use 1 or more channels; 16 is the family's own")

    def build(self, classes: int, channels: int) -> nn.Module:
        return CifarResNet(self.depth, self.width, classes, channels)


PLUGIN = ResNet
