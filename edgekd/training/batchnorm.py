"""BatchNorm layers, and the re-estimation of their statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = _BatchNorm  # all kinds of BatchNorm; torch has no public name for it


def list_batchnorms(network: nn.Module) -> list[Norm]:
    """Return all BatchNorm layers."""
    return [module for module in network.modules() if isinstance(module, Norm)]


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running means and variances to the averages over `batches`.

    For weights that were trained with the statistics of another network, as in once-for-all networks before a
    sub-network is used (Cai et al., 2020, arXiv 1908.09791). Leaves `network` in eval mode.
    """
    tracked = [norm for norm in list_batchnorms(network) if norm.track_running_stats]
    momenta = [norm.momentum for norm in tracked]
    network.eval()
    for norm in tracked:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for the plain average
        norm.train()
    for x in batches:
        network(x)
    for norm, momentum in zip(tracked, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
