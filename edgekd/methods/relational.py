"""relational: keep the distances and angles between samples (RKD; Park, Kim, Lu, Cho, 2019, arXiv 1904.05068).

With f the features of a sample, averaged over positions, and h the Huber loss with its bend at 1:

    distance: mean over i, j of h(|f_i - f_j| / mu, teacher's), mu the mean distance within the batch
    angle: mean over i, j, k of h(cos of the angle at f_j between f_i and f_k, teacher's)
    L = labels CE + sum over pairs of layers of (distance weight * distance + angle weight * angle)

The weights are 25 and 50, the usual ones for classification (Tian et al., 2020, arXiv 1910.10699). Channels and sizes
of two layers need not agree, so any two networks fit.

Deviations from the paper, and why:
- If no layers are named, f is the end of the smallest maps; of most classifiers that is what the last layer reads.
- Of dense networks, too, f is averaged over positions: relations are between images, not between pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.method import Batch, Lesson, Losses, Phase, Script
from edgekd.training.feature_method import Both, FeatureMethod, deepest_pairs
from edgekd.training.losses import check_weights

EPSILON = 1e-12  # features that are all the same have no scale


@dataclass(frozen=True)
class Relational(FeatureMethod):
    distance: float = 25.0  # weight of the distances
    angle: float = 50.0  # weight of the angles; time and memory grow with the cube of the batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(distance=self.distance, angle=self.angle)

    def teach(self, lesson: Lesson) -> Script:
        task, both = self.task(lesson), Both(lesson, deepest_pairs(lesson, self.layers))

        def loss(batch: Batch) -> Losses:
            answer, theirs, features = both(batch.x)
            distance, angle = torch.stack([gaps(known.float(), own.float()) for known, own in features]).sum(0)
            told = task(answer, theirs, batch.y)
            return {**told, "distance": self.distance * distance, "angle": self.angle * angle}

        yield Phase("relations", trains=(lesson.student,), loss=loss, epochs=lesson.epochs)
        return {"student": lesson.student}


def gaps(known: Tensor, own: Tensor) -> Tensor:
    """How far a student's distances and angles are from the teacher's: (2,)."""
    return torch.stack([F.smooth_l1_loss(s, t) for s, t in zip(relations(own), relations(known), strict=True)])


def relations(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, N) over their mean, and cosines (N, N, N) at the first sample, of a feature (N, C, H, W)."""
    f = feature.mean((2, 3))
    apart = f[None] - f[:, None]
    distances = torch.linalg.vector_norm(apart, dim=2)
    pairs = max(len(f) * (len(f) - 1), 1)
    # not normalize(): between two samples that a student cannot tell apart its gradient explodes
    towards = apart / distances.where(distances > 0, 1.0)[:, :, None]
    with torch.autocast(f.device.type, enabled=False):
        return distances / (distances.sum() / pairs).clamp(min=EPSILON), towards @ towards.mT


PLUGIN = Relational
