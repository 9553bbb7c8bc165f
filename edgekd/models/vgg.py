"""A plain network like VGG: stages of 3x3 convolutions, halved between stages (Simonyan & Zisserman, 2014, 1409.1556).

Deviations: BatchNorm behind each convolution, and one linear layer on the global mean instead of three on the map,
so that images of any size fit and a tenth of the parameters is left. The defaults are the VGG8 of the distillation
benchmarks; VGG13 there is `convs: [2, 2, 2, 4]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.models._blocks import conv_bn, init_weights


class VGG(nn.Module):
    """(N, channels, H, W) to (N, classes); H and W are halved between stages."""

    def __init__(self, widths: tuple[int, ...], convs: tuple[int, ...], classes: int, channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            stage(in_channels, width, count)
            for in_channels, width, count in zip((channels, *widths[:-1]), widths, convs, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(widths[-1], classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Raise ConfigError if the images are too small to be halved that often."""
        least = 2 ** (len(self.stages) - 1)
        if min(x.shape[2:]) < least:
            raise ConfigError(
                f"images of {x.shape[2]}x{x.shape[3]} cannot be halved between {len(self.stages)} stages of VGG",
                hint=f"give {least} pixels or more, or fewer stages in `widths` and `convs`",
            )
        x = self.stages[0](x)
        for stage in self.stages[1:]:
            x = stage(self.pool(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def stage(in_channels: int, width: int, convs: int) -> nn.Sequential:
    layers = nn.Sequential()
    for i in range(convs):
        layers.append(nn.Sequential(*conv_bn(width if i else in_channels, width, 3), nn.ReLU()))
    return layers


@dataclass(frozen=True)
class VGGModel(Model):
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage
    convs: tuple[int, ...] = (1, 1, 1, 2)  # convolutions of each stage

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"widths is {self.widths}", hint="give the channels of each stage, such as 64, 128, 256")
        if len(self.convs) != len(self.widths) or min(self.convs) < 1:
            raise ConfigError(
                f"convs is {self.convs}, for {len(self.widths)} stages", hint="give each stage 1 convolution or more"
            )

    def build(self, classes: int, channels: int) -> nn.Module:
        return VGG(self.widths, self.convs, classes, channels)


PLUGIN = VGGModel
