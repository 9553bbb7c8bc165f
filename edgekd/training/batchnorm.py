"""BatchNorm statistics of sub-networks: where they are, and how to measure them anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = _BatchNorm  # all kinds of BatchNorm; torch has no public name for it


def norms(network: nn.Module) -> list[Norm]:
    return [module for module in network.modules() if isinstance(module, Norm)]


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running means and variances to the averages over `batches` of what each layer sees there.

    Weights that were trained with the statistics of another network are so made to fit their own (as once-for-all
    networks do before a sub-network is used: Cai et al., 2020, arXiv 1908.09791). Leaves `network` in eval mode.
    """
    found = [norm for norm in norms(network) if norm.track_running_stats]
    momenta = [norm.momentum for norm in found]
    network.eval()
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for the plain average
        norm.train()
    for x in batches:
        network(x)
    for norm, momentum in zip(found, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
