"""fitnet: hints in the middle, then softened logits (Romero et al., 2015, arXiv 1412.6550).

    stage 1: hint / 2 mean over samples, channels and positions of (teacher's middle feature - regressor(student's))^2
             for the student's front part and the regressor
    stage 2: labels CE + logits T^2 KL(teacher || student) for the whole student; the regressor is gone

Deviations from the paper, and why:
- The loss of stage 1 is a mean, not a sum, so that one learning rate serves for layers of any size; as a mean alone is
  small beside a cross-entropy, it is weighed. The weight is a guess: 1, 10 and 100 did not differ beyond two seeds.
- The regressor is a 1x1 convolution with BatchNorm instead of a larger one: the layers have equal size. BatchNorm
  takes on the teacher's scale, so strong features do not make the steps of stage 1 too long.
- Stage 2 keeps the weight of softened logits, which the paper lets fall: it is the plain softened-logits method, so a
  comparison with that one shows what the hint is worth. Each stage runs through a learning-rate schedule of its own.
- The middle is found on any two networks: of the sizes that both have, the middle one, where its last layers end.
- A teacher of other classes can give the hint only (`logits: 0`); labels alone count in stage 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.feature_method import Both, FeatureMethod, equal_pairs
from edgekd.training.layer_matching import Candidate
from edgekd.training.losses import check_weights
from edgekd.training.teachers import teacher


@dataclass(frozen=True)
class FitNet(FeatureMethod):
    hint: float = 10.0  # weight of the hint
    stage1: float = 0.3  # share of the budget
    logits: float = 0.9  # weight of softened logits in stage 2; dense: of the teacher's answers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(hint=self.hint)
        if not 0 < self.stage1 < 1:
            raise ConfigError(f"stage1 is {self.stage1}", hint="use a share of the budget between 0 and 1, such as 0.3")

    def teach(self, lesson: Lesson) -> Script:
        first = max(1, round(self.stage1 * lesson.epochs))
        if first >= lesson.epochs:
            raise ConfigError(
                f"{lesson.epochs} epochs leave none for stage 2 (stage 1 takes {first})",
                hint="give more epochs, or less stage1",
            )
        pairs = equal_pairs(lesson, self.layers)
        pairs = pairs if self.layers else [pairs[len(pairs) // 2]]
        device = next(lesson.sample(1)).x.device
        task, both = self.task(lesson), Both(lesson, pairs)
        regressors = [regressor(pair).to(device) for pair in pairs]

        def imitate(batch: Batch) -> Losses:
            _, _, features = both(batch.x)
            gaps = [gap(known, r(own)) for r, (known, own) in zip(regressors, features, strict=True)]
            return {"hint": self.hint * torch.stack(gaps).sum()}

        def finish(batch: Batch) -> Losses:
            answer = lesson.student(batch.x)
            with torch.no_grad():
                theirs = teacher(lesson)(batch.x) if self.logits else answer  # without logits it is not read
            return task(answer, theirs, batch.y)

        yield Phase("hint", trains=(lesson.student, *regressors), loss=imitate, epochs=first)
        yield Phase("finish", trains=(lesson.student,), loss=finish, epochs=lesson.epochs - first)
        return {"student": lesson.student}


def regressor(pair: Candidate) -> nn.Module:
    """From the student's channels to the teacher's."""
    channels = pair.teacher.channels
    return nn.Sequential(nn.Conv2d(pair.student.channels, channels, 1, bias=False), nn.BatchNorm2d(channels))


def gap(known: Tensor, regressed: Tensor) -> Tensor:
    return (known.float() - regressed.float()).pow(2).mean() / 2


PLUGIN = FitNet
