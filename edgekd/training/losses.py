"""Loss terms that several methods share. Pure functions of tensors, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ConfigError


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of (N, classes) logits with (N,) labels; -1 is no label, and 0 if there is none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def l1_loss(maps: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute error of (N, K, H, W) maps; NaN is an unknown value, and 0 if none is known."""
    labelled = ~targets.isnan()
    error = torch.where(labelled, maps.float() - targets, 0.0).abs()
    return error.sum() / labelled.sum().clamp(min=1)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float, standardize_logits: bool = False) -> Tensor:
    """Return T^2 KL(teacher || student) of softened (N, classes) logits, mean over the batch (Hinton et al., 2015)."""
    log_p, log_q = (
        F.log_softmax((standardize(z) if standardize_logits else z.float()) / temperature, dim=1)
        for z in (student, teacher)
    )
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def standardize(logits: Tensor) -> Tensor:
    """Bring each row of (N, classes) logits to mean 0 and deviation 1 (Sun et al., 2024, arXiv 2403.01427)."""
    z = logits.float()
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def to_float32(x: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_weights(**weights: float) -> None:
    """Raise ConfigError unless all are finite numbers of 0 or more."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):  # also true of nan
            raise ConfigError(f"{name} is {weight:g}", hint="use a weight of 0 or more")


def check_fractions(**fractions: float) -> None:
    """Raise ConfigError unless all are between 0 and 1."""
    for name, fraction in fractions.items():
        if not 0 <= fraction <= 1:
            raise ConfigError(f"{name} is {fraction:g}", hint="use a fraction between 0 and 1")


def check_temperature(temperature: float, usual: int = 4) -> None:
    """Raise ConfigError unless the temperature is a finite number above 0."""
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature:g}", hint=f"use a number above 0; {usual} is usual")


def resolve_ce_weight(ce_weight: float | None, kd_weight: float) -> float:
    """Return the weight of the supervised loss, 1 - kd_weight if it is None. Raise ConfigError if it is below 0."""
    weight = 1 - kd_weight if ce_weight is None else ce_weight
    if not 0 <= weight < float("inf"):
        raise ConfigError(
            f"ce_weight is {weight:g}", hint="set `ce_weight` to 0 or more; if unset, it is 1 - kd_weight"
        )
    return weight
