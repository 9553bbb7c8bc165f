"""Wide ResNet, WRN-d-k: three stages of pre-activation blocks (Zagoruyko & Komodakis, 2016, arXiv 1605.07146).

Deviation: no dropout inside of the blocks; the paper has it as an option.
The sum of a block is a module, `join`: before the normalisation and activation that begin the next block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.models._blocks import Add, check_multiple, init_weights


class PreactivationBlock(nn.Module):
    """Where size or width changes, the shortcut is a convolution of the activated input."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == width
        self.shortcut = None if same else nn.Conv2d(in_channels, width, 1, stride, bias=False)
        self.join = Add()

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        branch = self.conv2(self.act2(self.bn2(self.conv1(active))))
        out: Tensor = self.join(branch, x if self.shortcut is None else self.shortcut(active))
        return out


class WideResNet(nn.Module):
    """(N, channels, H, W) to (N, classes); H and W are halved by stage 2 and again by stage 3."""

    def __init__(self, depth: int, width: float, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [max(1, round(published * width)) for published in (16, 32, 64)]
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stage1 = stage(16, widths[0], blocks, 1)
        self.stage2 = stage(widths[0], widths[1], blocks, 2)
        self.stage3 = stage(widths[1], widths[2], blocks, 2)
        self.bn = nn.BatchNorm2d(widths[2])
        self.act = nn.ReLU()
        self.head = nn.Linear(widths[2], classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.head(self.act(self.bn(x)).mean((2, 3)))
        return logits


def stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [PreactivationBlock(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(PreactivationBlock(in_channels, width, stride), *rest)


@dataclass(frozen=True)
class WideResNetModel(Model):
    depth: int = 16  # d, 6n+4: 10, 16, 22, 28, 40
    width: float = 2.0  # k: the stages have 16k, 32k and 64k channels

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ConfigError(
                f"depth is {self.depth}, which no wide ResNet has", hint="use 6n+4: 10, 16, 22, 28, 34 or 40"
            )
        check_multiple("width", self.width)

    def build(self, classes: int, channels: int) -> nn.Module:
        return WideResNet(self.depth, self.width, classes, channels)


PLUGIN = WideResNetModel
