"""fitnet: hints in the middle, then softened logits (Romero et al., 2015, arXiv 1412.6550).

    stage 1: hint_weight / 2 mean over samples, channels and positions of
             (teacher's middle feature - regressor(student's))^2, for the student's front part and the regressor
    stage 2: ce_weight CE + kd_weight T^2 KL(teacher || student) for the whole student; the regressor is dropped

Deviations from the paper, and why:
- The loss of stage 1 is a mean, not a sum, so that one learning rate suits layers of any size; a mean is small beside
  a cross-entropy, hence the weight. Its value is a guess: 1, 10 and 100 did not differ beyond the noise of two seeds.
- The regressor is a 1x1 convolution with BatchNorm instead of a larger one: the layers have equal size. BatchNorm
  adapts to the teacher's scale, so strong features do not make the steps of stage 1 too long.
- Stage 2 keeps the weight of softened logits, which the paper lets fall: it is the plain softened-logits method, so a
  comparison with it shows the effect of the hint. Each stage has its own learning-rate schedule.
- The middle is defined for any two networks: the last layers of the middle one of the map sizes that both have.
- A teacher of other classes can give the hint only (`kd_weight: 0`); labels alone count in stage 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.feature_method import FeatureMethod, PairedForward, equal_pairs
from edgekd.training.layer_matching import LayerMatch
from edgekd.training.losses import check_weights
from edgekd.training.teachers import get_teacher


@dataclass(frozen=True)
class FitNet(FeatureMethod):
    """Settings of FitNets."""

    hint_weight: float = 10.0
    stage1_fraction: float = 0.3  # of the budget
    kd_weight: float = 0.9  # of the teacher's softened logits, or of its maps, in stage 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(hint_weight=self.hint_weight)
        if not 0 < self.stage1_fraction < 1:
            raise ConfigError(
                f"stage1_fraction is {self.stage1_fraction}", hint="use a fraction between 0 and 1, such as 0.3"
            )

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        stage1 = max(1, round(self.stage1_fraction * ctx.epochs))
        if stage1 >= ctx.epochs:
            raise ConfigError(
                f"{ctx.epochs} epochs leave none for stage 2 (stage 1 takes {stage1})",
                hint="increase the epochs, or decrease stage1_fraction",
            )
        pairs = equal_pairs(ctx, self.layers)
        pairs = pairs if self.layers else [pairs[len(pairs) // 2]]
        device = next(ctx.first_batches(1)).images.device
        output_losses, forward = self.output_losses(ctx), PairedForward(ctx, pairs)
        regressors = [build_regressor(pair).to(device) for pair in pairs]

        def hints(batch: Batch) -> Losses:
            _, _, features = forward(batch.images)
            losses = [
                hint_loss(teacher, r(student)) for r, (teacher, student) in zip(regressors, features, strict=True)
            ]
            return {"hint": self.hint_weight * torch.stack(losses).sum()}

        def finish(batch: Batch) -> Losses:
            logits = ctx.student(batch.images)
            with torch.no_grad():
                teacher = (
                    get_teacher(ctx)(batch.images) if self.kd_weight else logits
                )  # without kd_weight it is not used
            return output_losses(logits, teacher, batch.labels)

        yield Phase("hint", trains=(ctx.student, *regressors), loss=hints, epochs=stage1)
        yield Phase("finish", trains=(ctx.student,), loss=finish, epochs=ctx.epochs - stage1)
        return {"student": ctx.student}


def build_regressor(pair: LayerMatch) -> nn.Module:
    """Return a 1x1 convolution with BatchNorm from the student's channels to the teacher's."""
    channels = pair.teacher.channels
    return nn.Sequential(nn.Conv2d(pair.student.channels, channels, 1, bias=False), nn.BatchNorm2d(channels))


def hint_loss(teacher: Tensor, regressed: Tensor) -> Tensor:
    """Return half the mean squared error of two (N, C, H, W) features."""
    return (teacher.float() - regressed.float()).pow(2).mean() / 2


PLUGIN = FitNet
