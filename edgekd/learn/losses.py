"""Loss terms that more than one method needs. Pure functions of tensors, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.errors import ConfigError


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


def check_weights(**weights: float) -> None:
    """Raises ConfigError unless all are weights that a loss can have."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):  # also true of nan
            raise ConfigError(f"{name} is {weight:g}", hint="use a weight of 0 or more")
