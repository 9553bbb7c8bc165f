"""Loss terms that more than one method needs. Pure functions of tensors, computed in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened (N, classes) logits, mean over the batch (Hinton et al., 2015)."""
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of (N, classes) logits."""
    return F.cross_entropy(logits.float(), labels)
