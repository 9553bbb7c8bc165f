"""ResNet for ImageNet: four stages of basic or bottleneck blocks (He et al., 2016, arXiv 1512.03385, table 1).

Parameters are named as in torchvision, whose checkpoints therefore load. As there, the 3x3 convolution of a
bottleneck has the stride, not the first 1x1 (deviation: it is more accurate).
With fewer than 5 `halvings` the stem is 3x3 without a stride, and with fewer than 4 nothing is pooled behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.models._blocks import Add, check_halvings, check_multiple, conv_bn, init_weights, strides


class BasicBlock(nn.Module):
    EXPANSION = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 3, stride)
        self.act1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(width, width, 3)
        self.downsample = shortcut(in_channels, width, stride)
        self.join = Add()
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(self.join(branch, self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    EXPANSION = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
        self.act1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride)
        self.act2 = nn.ReLU()
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.downsample = shortcut(in_channels, 4 * width, stride)
        self.join = Add()
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        out: Tensor = self.act3(self.join(self.bn3(self.conv3(inner)), self.downsample(x)))
        return out


BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {  # by depth: kind, number in each stage
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ImagenetResNet(nn.Module):
    """(N, channels, H, W) to (N, classes)."""

    def __init__(self, depth: int, width: float, halvings: int, classes: int, channels: int) -> None:
        super().__init__()
        block, counts = BLOCKS[depth]
        widths = [max(1, round(published * width)) for published in (64, 128, 256, 512)]
        out_channels = [block.EXPANSION * width for width in widths]
        step = strides(halvings)
        self.conv1, self.bn1 = conv_bn(channels, widths[0], 7 if step[0] > 1 else 3, step[0])
        self.act1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if step[1] > 1 else nn.Identity()
        self.layer1 = stage(block, widths[0], widths[0], counts[0], 1)
        self.layer2 = stage(block, out_channels[0], widths[1], counts[1], step[2])
        self.layer3 = stage(block, out_channels[1], widths[2], counts[2], step[3])
        self.layer4 = stage(block, out_channels[2], widths[3], counts[3], step[4])
        self.fc = nn.Linear(out_channels[3], classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def shortcut(in_channels: int, width: int, stride: int) -> nn.Module:
    same = stride == 1 and in_channels == width
    return nn.Identity() if same else nn.Sequential(*conv_bn(in_channels, width, 1, stride))


def stage(block: type[BasicBlock | Bottleneck], in_channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    rest = [block(block.EXPANSION * width, width, 1) for _ in range(count - 1)]
    return nn.Sequential(block(in_channels, width, stride), *rest)


@dataclass(frozen=True)
class ImagenetResNetModel(Model):
    depth: int = 18  # 18, 34 or 50
    width: float = 1.0  # multiplier of the published channels
    halvings: int = 5  # of height and width; 3 suits images of 32 pixels, 2 of 16

    def __post_init__(self) -> None:
        if self.depth not in BLOCKS:
            raise ConfigError(
                f"depth is {self.depth}, which this family has not",
                hint=f"use {', '.join(map(str, BLOCKS))}; `resnet` has the depths of the CIFAR family",
            )
        check_multiple("width", self.width)
        check_halvings(self.halvings)

    def build(self, classes: int, channels: int) -> nn.Module:
        return ImagenetResNet(self.depth, self.width, self.halvings, classes, channels)


PLUGIN = ImagenetResNetModel
