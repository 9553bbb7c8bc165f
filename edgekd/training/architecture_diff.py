"""How a taught network differs from what its family builds, so that it can be built again from its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from edgekd.errors import ModelError

CHAINS = (nn.Sequential, nn.ModuleList)  # what can be shortened; a list is run in a loop by its owner


@dataclass(frozen=True)
class Surgery:
    """Changes to a network in plain terms. Empty for most methods, which change weights only."""

    lengths: dict[str, int] = field(default_factory=dict)  # of one of CHAINS: children that are left
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)  # of a layer: entering, leaving


def difference(built: nn.Module, made: nn.Module) -> Surgery:
    """What has to be done to `built` so that the weights of `made` fit it.

    Known are an nn.Sequential or nn.ModuleList that is shorter, and Conv2d, BatchNorm2d and Linear with other channels.
    Raises ModelError if more than that differs.
    """
    wanted = dict(made.named_modules())
    lengths = {
        path: len(wanted[path])
        for path, module in built.named_modules()
        if isinstance(module, CHAINS) and len(module) > len(wanted.get(path, module))
    }
    channels = {
        path: size
        for path, size in sizes(made)
        if path in dict(built.named_modules()) and dict(sizes(built)).get(path) != size
    }
    surgery = Surgery(lengths, channels)
    got, want = shapes(operated(built, surgery)), shapes(made)
    if got != want:
        odd = sorted(key for key in got.keys() | want.keys() if got.get(key) != want.get(key))
        raise ModelError(
            f"the taught network cannot be built again from its family: {', '.join(odd[:3])} differ",
            hint="a method may shorten an nn.Sequential or nn.ModuleList and change channels, nothing else",
        )
    return surgery


def operated(network: nn.Module, surgery: Surgery) -> nn.Module:
    """A copy of `network` with the changes made; layers with other channels have random weights."""
    made = copy.deepcopy(network)
    for path, length in surgery.lengths.items():
        stage = made.get_submodule(path)
        assert isinstance(stage, CHAINS)
        del stage[length:]
    for path, (entering, leaving) in surgery.channels.items():
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, resized(made.get_submodule(path), entering, leaving))
    return made


def resized(layer: nn.Module, entering: int, leaving: int) -> nn.Module:
    """A layer like `layer` for other numbers of channels, with random weights."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(entering, leaving, layer.bias is not None)
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(leaving, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    assert isinstance(layer, nn.Conv2d)
    groups = entering if layer.groups == layer.in_channels else layer.groups  # a depthwise one stays depthwise
    return nn.Conv2d(
        entering,
        leaving,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        groups,
        layer.bias is not None,
        layer.padding_mode,
    )


def sizes(network: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Entering and leaving channels of every layer that can be resized."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            yield path, (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Linear):
            yield path, (module.in_features, module.out_features)
        elif isinstance(module, nn.BatchNorm2d):
            yield path, (module.num_features, module.num_features)


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
