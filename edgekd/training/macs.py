"""Multiply-accumulates of a forward pass, counted while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgekd.errors import ConfigError


@torch.no_grad()
def count_macs(module: nn.Module, x: Tensor) -> int:
    """Count the MACs of convolutions and linear layers for the batch `x`; other operations count nothing.

    A layer counts as often as it runs. Raises ConfigError if the module has none of these layers.
    """
    counts: list[int] = []

    def count(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # each output value takes one row of the weights; in a transposed convolution each input value
        values = args[0] if isinstance(layer, _ConvTransposeNd) else output
        counts.append(values.numel() * weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    try:
        module(x)
    finally:
        for handle in hooks:
            handle.remove()
    if not counts:
        raise ConfigError(
            f"{type(module).__name__} runs no convolution and no linear layer, so its MACs cannot be counted",
            hint="use a network of torch's layers",
        )
    return sum(counts)
