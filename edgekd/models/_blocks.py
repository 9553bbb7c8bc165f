"""Pieces that several families of networks are made of, and the settings that they share."""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt

from torch import Tensor, nn

from edgekd.errors import ConfigError

HALVINGS = 5  # of a network for ImageNet: 224 to 7 pixels


class Join(nn.Module):
    """The sum of a residual branch and its shortcut: a layer of its own, so that it can be tapped."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


class Inverted(nn.Module):
    """The inverted residual of MobileNets: widen by 1x1, filter each channel, narrow by 1x1 without activation."""

    def __init__(
        self,
        entering: int,
        inner: int,
        width: int,
        kernel: int,
        stride: int,
        act: Callable[[], nn.Module],
        excite: nn.Module | None = None,
    ) -> None:
        super().__init__()
        same = inner == entering
        self.expand = nn.Identity() if same else nn.Sequential(*conv_bn(entering, inner, 1), act())
        self.spatial = nn.Sequential(*conv_bn(inner, inner, kernel, stride, groups=inner), act())
        self.excite = excite or nn.Identity()
        self.project = nn.Sequential(*conv_bn(inner, width, 1))
        self.join = Join() if stride == 1 and entering == width else None

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.project(self.excite(self.spatial(self.expand(x))))
        return branch if self.join is None else self.join(branch, x)


def conv_bn(
    entering: int, width: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(entering, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(width)


def initialise(network: nn.Module) -> None:
    """Draw all convolutions as He et al. (2015) do for ReLU, by fan out: what one input pixel contributes to.

    The fan counts one group (torch's own counts all), else depthwise layers begin so weak that the signal is lost.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.out_channels // module.groups * prod(module.kernel_size)
            nn.init.normal_(module.weight, 0.0, sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def divisible(channels: float) -> int:
    """The multiple of 8 that is next to `channels`, but no more than a tenth below (MobileNets' rule)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def repeats(counts: tuple[int, ...], depth: float) -> list[int]:
    """Blocks of each stage, `depth` times as many as published; at least one."""
    return [max(1, round(count * depth)) for count in counts]


def strides(halvings: int) -> list[int]:
    """Of the five layers where a network for ImageNet halves height and width: the earliest do not, if fewer do."""
    return [1] * (HALVINGS - halvings) + [2] * halvings


def check_halvings(halvings: int) -> None:
    if not 0 <= halvings <= HALVINGS:
        raise ConfigError(
            f"halvings is {halvings}, but the family halves height and width at most {HALVINGS} times",
            hint="use 5 for images of 224 pixels, 3 for 32 and 2 for 16",
        )


def check_multiple(name: str, value: float) -> None:
    """`value` is a multiplier of a published network."""
    if not 0 < value < float("inf"):  # also true of nan
        raise ConfigError(f"{name} is {value}", hint="use a positive multiplier; 1.0 is the published network")
