"""similarity_preserving: what is alike for the teacher is alike for the student (Tung, Mori, 2019, arXiv 1907.09682).

With the features of a batch as rows, F (b, C H W), and G = F F^T with each row divided by its norm:

    L = labels CE + weight / b^2 sum over pairs of layers of |G_t - G_s|^2 (Frobenius)

The weight is 3000, as in the paper. Channels and sizes of two layers need not agree, so any two networks fit.

Deviations from the paper, and why:
- If no layers are named, one pair is compared: in each network the end of the smallest maps. The paper pairs the ends
  of all blocks of networks alike; foreign families have no such blocks, and the last pair is what others compare, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.method import Batch, Lesson, Losses, Phase, Script
from edgekd.training.feature_method import Both, FeatureMethod, deepest_pairs
from edgekd.training.losses import check_weights


@dataclass(frozen=True)
class SimilarityPreserving(FeatureMethod):
    weight: float = 3000.0  # gamma

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(weight=self.weight)

    def teach(self, lesson: Lesson) -> Script:
        task, both = self.task(lesson), Both(lesson, deepest_pairs(lesson, self.layers))

        def loss(batch: Batch) -> Losses:
            answer, theirs, features = both(batch.x)
            gaps = torch.stack([(similarity(known) - similarity(own)).pow(2).mean() for known, own in features])
            return {**task(answer, theirs, batch.y), "similarity": self.weight * gaps.sum()}

        yield Phase("similarity", trains=(lesson.student,), loss=loss, epochs=lesson.epochs)
        return {"student": lesson.student}


def similarity(feature: Tensor) -> Tensor:
    """How alike the samples of a batch are to a layer: (N, C, H, W) to (N, N), each row of length 1."""
    rows = feature.float().flatten(1)
    with torch.autocast(rows.device.type, enabled=False):  # differences of products need their last digits
        return F.normalize(rows @ rows.T)


PLUGIN = SimilarityPreserving
