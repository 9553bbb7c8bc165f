"""Loss terms that more than one method needs. Pure functions of tensors, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ConfigError


def supervised(answer: Tensor, truth: Tensor) -> Tensor:
    """What labels say of an answer; samples and pixels without a label say nothing, and only them gives 0.

    Cross-entropy of (N, classes) logits with (N,) labels, -1 for none; mean absolute error of (N, K, H, W) maps, NaN
    for none.
    """
    if truth.is_floating_point():
        known = ~truth.isnan()
        gap = torch.where(known, answer.float() - truth, 0.0).abs()
        return gap.sum() / known.sum().clamp(min=1)
    total = F.cross_entropy(answer.float(), truth, ignore_index=-1, reduction="sum")
    return total / (truth >= 0).sum().clamp(min=1)


def imitation(answer: Tensor, teacher: Tensor, temperature: float, standardise: bool = False) -> Tensor:
    """What a teacher's answer says: `soft_kl` of logits, mean absolute error of (N, K, H, W) maps."""
    if answer.ndim == 4:
        return (answer.float() - teacher.float()).abs().mean()
    return soft_kl(answer, teacher, temperature, standardise)


def soft_kl(student: Tensor, teacher: Tensor, temperature: float, standardise: bool = False) -> Tensor:
    """T^2 KL(teacher || student) of softened (N, classes) logits, mean over the batch (Hinton et al., 2015)."""
    log_p, log_q = (
        F.log_softmax((standardised(z) if standardise else z.float()) / temperature, dim=1) for z in (student, teacher)
    )
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def standardised(logits: Tensor) -> Tensor:
    """(N, classes) logits with mean 0 and standard deviation 1 in each row (Sun et al., 2024, arXiv 2403.01427)."""
    z = logits.float()
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def precise(x: Tensor) -> Tensor:
    """In float32; in float64 if it is so already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_weights(**weights: float) -> None:
    """Raises ConfigError unless all are weights that a loss can have."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):  # also true of nan
            raise ConfigError(f"{name} is {weight:g}", hint="use a weight of 0 or more")


def check_shares(**shares: float) -> None:
    """Raises ConfigError unless all lie between 0 and 1."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is {share:g}", hint="use a share between 0 and 1")


def check_temperature(temperature: float, usual: int = 4) -> None:
    """Raises ConfigError unless logits can be softened by it."""
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature:g}", hint=f"use a number above 0; {usual} is usual")


def labels_weight(labels: float | None, weight: float) -> float:
    """The weight of the labels' loss; if it is not set, what that of the answers leaves of 1.

    Raises ConfigError if it is none that a loss can have.
    """
    found = 1 - weight if labels is None else labels
    if not 0 <= found < float("inf"):
        raise ConfigError(f"the labels' loss has weight {found:g}", hint="set `labels` to 0 or more")
    return found
