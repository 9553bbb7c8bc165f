"""relational: match distances and angles between samples (RKD; Park, Kim, Lu, Cho, 2019, arXiv 1904.05068).

With f the features of a sample, averaged over positions, and h the Huber loss with its bend at 1:

    distance: mean over i, j of h(|f_i - f_j| / mu, teacher's), mu the mean distance within the batch
    angle: mean over i, j, k of h(cos of the angle at f_j between f_i and f_k, teacher's)
    L = ce_weight CE + sum over pairs of layers of (distance_weight distance + angle_weight angle)

The weights are 25 and 50, the usual ones for classification (Tian et al., 2020, arXiv 1910.10699). Channels and sizes
of two layers may differ, so it works with any two networks.

Deviations from the paper, and why:
- If no layers are named, f is the last layer of the smallest maps; of most classifiers that is the input of
  the last layer.
- Of networks that answer with maps, too, f is averaged over positions: relations are between images, not between
  pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.method import Batch, Losses, Phase, PhaseGenerator, TrainingContext
from edgekd.training.feature_method import FeatureMethod, PairedForward, deepest_pairs
from edgekd.training.losses import check_weights

EPSILON = 1e-12  # features that are all the same have no scale


@dataclass(frozen=True)
class Relational(FeatureMethod):
    """Settings of relational knowledge distillation."""

    distance_weight: float = 25.0
    angle_weight: float = 50.0  # time and memory of the angles grow with the cube of the batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(distance_weight=self.distance_weight, angle_weight=self.angle_weight)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        output_losses, forward = self.output_losses(ctx), PairedForward(ctx, deepest_pairs(ctx, self.layers))

        def loss(batch: Batch) -> Losses:
            logits, teacher, features = forward(batch.images)
            distance, angle = torch.stack([relation_losses(t.float(), s.float()) for t, s in features]).sum(0)
            losses = output_losses(logits, teacher, batch.labels)
            return {**losses, "distance": self.distance_weight * distance, "angle": self.angle_weight * angle}

        yield Phase("relations", trains=(ctx.student,), loss=loss, epochs=ctx.epochs)
        return {"student": ctx.student}


def relation_losses(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the losses of the student's distances and angles, (2,), from two (N, C, H, W) features."""
    return torch.stack([F.smooth_l1_loss(s, t) for s, t in zip(relations(student), relations(teacher), strict=True)])


def relations(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances (N, N) over their mean, and cosines (N, N, N) at the first sample, of a feature (N, C, H, W)."""
    f = feature.mean((2, 3))
    apart = f[None] - f[:, None]
    distances = torch.linalg.vector_norm(apart, dim=2)
    pairs = max(len(f) * (len(f) - 1), 1)
    # not normalize(): between two samples that a student cannot tell apart its gradient explodes
    towards = apart / distances.where(distances > 0, 1.0)[:, :, None]
    with torch.autocast(f.device.type, enabled=False):
        return distances / (distances.sum() / pairs).clamp(min=EPSILON), towards @ towards.mT


PLUGIN = Relational
