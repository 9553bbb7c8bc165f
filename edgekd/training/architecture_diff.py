"""Differences between a trained network and what its family builds, so that it can be rebuilt from its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from edgekd.errors import ModelError

CHAINS = (nn.Sequential, nn.ModuleList)  # what can be shortened; a ModuleList is run in a loop by its parent


@dataclass(frozen=True)
class ArchitectureDiff:
    """Changes to the architecture of a network. Empty for most methods, which only change weights."""

    lengths: dict[str, int] = field(default_factory=dict)  # by path of one of CHAINS: remaining children
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)  # by path of a layer: in_channels, out_channels


def diff_architectures(original: nn.Module, trained: nn.Module) -> ArchitectureDiff:
    """Return the changes to `original` after which the weights of `trained` fit it.

    An nn.Sequential or nn.ModuleList may be shorter; Conv2d, BatchNorm2d and Linear may have other channels.

    Raises:
        ModelError: if anything else differs.
    """
    modules = dict(trained.named_modules())
    lengths = {
        path: len(modules[path])
        for path, module in original.named_modules()
        if isinstance(module, CHAINS) and len(module) > len(modules.get(path, module))
    }
    channels = {
        path: size
        for path, size in layer_channels(trained)
        if path in dict(original.named_modules()) and dict(layer_channels(original)).get(path) != size
    }
    diff = ArchitectureDiff(lengths, channels)
    rebuilt_shapes, trained_shapes = tensor_shapes(apply_diff(original, diff)), tensor_shapes(trained)
    if rebuilt_shapes != trained_shapes:
        differing = sorted(
            key
            for key in rebuilt_shapes.keys() | trained_shapes.keys()
            if rebuilt_shapes.get(key) != trained_shapes.get(key)
        )
        raise ModelError(
            f"the trained network cannot be rebuilt from its family: {', '.join(differing[:3])} differ",
            hint="a method may shorten an nn.Sequential or nn.ModuleList and change channels, nothing else",
        )
    return diff


def apply_diff(network: nn.Module, diff: ArchitectureDiff) -> nn.Module:
    """Return a copy of `network` with the changes made; layers with other channels have random weights."""
    copied = copy.deepcopy(network)
    for path, length in diff.lengths.items():
        stage = copied.get_submodule(path)
        assert isinstance(stage, CHAINS)
        del stage[length:]
    for path, (in_channels, out_channels) in diff.channels.items():
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, resize_layer(copied.get_submodule(path), in_channels, out_channels))
    return copied


def resize_layer(layer: nn.Module, in_channels: int, out_channels: int) -> nn.Module:
    """Return a layer like `layer` for other numbers of channels, with random weights."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(in_channels, out_channels, layer.bias is not None)
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(out_channels, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    assert isinstance(layer, nn.Conv2d)
    groups = in_channels if layer.groups == layer.in_channels else layer.groups  # a depthwise one stays depthwise
    return nn.Conv2d(
        in_channels,
        out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        groups,
        layer.bias is not None,
        layer.padding_mode,
    )


def layer_channels(network: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and (in_channels, out_channels) of every layer that can be resized."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            yield path, (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Linear):
            yield path, (module.in_features, module.out_features)
        elif isinstance(module, nn.BatchNorm2d):
            yield path, (module.num_features, module.num_features)


def tensor_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state dict."""
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
