"""Building blocks and settings that several network families share."""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt

from torch import Tensor, nn

from edgekd.errors import ConfigError

HALVINGS = 5  # of a network for ImageNet: 224 to 7 pixels


class Add(nn.Module):
    """The sum of a residual branch and its shortcut: a module, so that its output can be hooked."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


class InvertedResidual(nn.Module):
    """The inverted residual of MobileNets: expand by 1x1, depthwise convolution, project by 1x1 without activation."""

    def __init__(
        self,
        in_channels: int,
        inner: int,
        width: int,
        kernel: int,
        stride: int,
        act: Callable[[], nn.Module],
        excite: nn.Module | None = None,
    ) -> None:
        super().__init__()
        same = inner == in_channels
        self.expand = nn.Identity() if same else nn.Sequential(*conv_bn(in_channels, inner, 1), act())
        self.spatial = nn.Sequential(*conv_bn(inner, inner, kernel, stride, groups=inner), act())
        self.excite = excite or nn.Identity()
        self.project = nn.Sequential(*conv_bn(inner, width, 1))
        self.join = Add() if stride == 1 and in_channels == width else None

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.project(self.excite(self.spatial(self.expand(x))))
        return branch if self.join is None else self.join(branch, x)


def conv_bn(
    in_channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(width)


def init_weights(network: nn.Module) -> None:
    """Initialise all convolutions as He et al. (2015) do for ReLU, by fan out.

    The fan counts one group (torch's own counts all), else depthwise layers start so weak that the signal is lost.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.out_channels // module.groups * prod(module.kernel_size)
            nn.init.normal_(module.weight, 0.0, sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def divisible(channels: float) -> int:
    """Return the multiple of 8 that is next to `channels`, but no more than a tenth below (MobileNets' rule)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def repeats(counts: tuple[int, ...], depth: float) -> list[int]:
    """Return the blocks of each stage, `depth` times as many as published; at least one."""
    return [max(1, round(count * depth)) for count in counts]


def strides(halvings: int) -> list[int]:
    """Return the strides of the five layers where a network for ImageNet halves height and width.

    With fewer halvings, the first layers have stride 1.
    """
    return [1] * (HALVINGS - halvings) + [2] * halvings


def check_halvings(halvings: int) -> None:
    """Raise ConfigError unless there are 0 to 5 halvings."""
    if not 0 <= halvings <= HALVINGS:
        raise ConfigError(
            f"halvings is {halvings}, but the family halves height and width at most {HALVINGS} times",
            hint="use 5 for images of 224 pixels, 3 for 32 and 2 for 16",
        )


def check_multiple(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is a positive multiplier."""
    if not 0 < value < float("inf"):  # also true of nan
        raise ConfigError(f"{name} is {value}", hint="use a positive multiplier; 1.0 is the published network")
