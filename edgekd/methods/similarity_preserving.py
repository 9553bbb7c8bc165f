"""similarity_preserving: match the teacher's similarities between samples (Tung, Mori, 2019, arXiv 1907.09682).

With the features of a batch as rows, F (b, C H W), and G = F F^T with each row divided by its norm:

    L = ce_weight CE + similarity_weight / b^2 sum over pairs of layers of |G_t - G_s|^2 (Frobenius)

The weight is 3000, as in the paper. Channels and sizes of two layers need not agree, so it works with any two networks.

Deviations from the paper, and why:
- If no layers are named, one pair is compared: in each network the last layer of the smallest maps. The paper
  pairs the ends of all blocks of similar networks; other families have no such blocks, and other papers also compare
  the last pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.core.method import Batch, Losses, Phase, PhaseGenerator, TrainingContext
from edgekd.training.feature_method import FeatureMethod, PairedForward, deepest_pairs
from edgekd.training.losses import check_weights


@dataclass(frozen=True)
class SimilarityPreserving(FeatureMethod):
    """Settings of similarity-preserving distillation."""

    similarity_weight: float = 3000.0  # gamma

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(similarity_weight=self.similarity_weight)

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        output_losses, forward = self.output_losses(ctx), PairedForward(ctx, deepest_pairs(ctx, self.layers))

        def loss(batch: Batch) -> Losses:
            logits, teacher, features = forward(batch.images)
            gaps = torch.stack([(similarity(t) - similarity(s)).pow(2).mean() for t, s in features])
            return {**output_losses(logits, teacher, batch.labels), "similarity": self.similarity_weight * gaps.sum()}

        yield Phase("similarity", trains=(ctx.student,), loss=loss, epochs=ctx.epochs)
        return {"student": ctx.student}


def similarity(feature: Tensor) -> Tensor:
    """Return the similarities between the samples of a batch, from (N, C, H, W): (N, N), each row of norm 1."""
    rows = feature.float().flatten(1)
    with torch.autocast(rows.device.type, enabled=False):  # differences of products need their last digits
        return F.normalize(rows @ rows.T)


PLUGIN = SimilarityPreserving
