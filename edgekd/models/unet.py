"""A U-Net for maps: an encoder, a decoder, and skips between maps of equal size (Ronneberger et al., 2015).

Deviations: convolutions are padded, so the output has the size of the image; maps are enlarged by nearest neighbours
and a convolution instead of a transposed one, which quantizes without chequered patterns; two convolutions with
BatchNorm a level. The sum of skip and decoder replaces the concatenation: it costs no channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError


def level(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class Upsample(nn.Module):
    """A level of the decoder: upsample, project to the skip's width, add the skip, refine."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.refine = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        upsampled = F.interpolate(self.narrow(x), scale_factor=2.0, mode="nearest")
        upsampled = upsampled[:, :, : skip.shape[2], : skip.shape[3]]  # of an odd size, half was rounded up
        output: Tensor = self.refine(F.relu(upsampled + skip))
        return output


class UNet(nn.Module):
    """(N, channels, H, W) to (N, outputs, H, W), of any size."""

    def __init__(self, width: int, levels: int, outputs: int, channels: int) -> None:
        super().__init__()
        widths = [width * 2**n for n in range(levels + 1)]
        self.stem = level(channels, width, 1)
        self.down = nn.ModuleList(level(a, b, 2) for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(Upsample(b, a) for a, b in reversed(list(zip(widths, widths[1:], strict=False))))
        self.head = nn.Conv2d(width, outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for lower in self.down:
            skips.append(lower(skips[-1]))
        x = skips.pop()
        for level_up in self.up:
            x = level_up(x, skips.pop())
        output: Tensor = self.head(x)
        return output


@dataclass(frozen=True)
class UNetModel(Model):
    width: int = 16  # channels of the first level; each level down doubles them
    levels: int = 3  # times that the map is halved

    def __post_init__(self) -> None:
        for name in ("width", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use 1 or more; 16 and 3 are usual")

    def build(self, classes: int, channels: int) -> nn.Module:
        return UNet(self.width, self.levels, classes, channels)


PLUGIN = UNetModel
