"""regression: numbers for every pixel, as maps (N, K, H, W), such as depth; targets are maps, NaN where unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import TensorSpec
from edgekd.core.augment import Augment
from edgekd.core.bench_result import Samples
from edgekd.core.metric import Metric
from edgekd.core.task import Outputs, OutputSpec, Task
from edgekd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 1.25  # the factor of delta1 (Eigen et al., 2014, arXiv 1406.2283)


def delta1(samples: Samples) -> float:
    """Return the percentage of known pixels within a factor of 1.25 of the target."""
    (maps,) = samples.outputs
    known = ~np.isnan(samples.labels)
    values, targets = maps[known], samples.labels[known]
    return 100 * float(((values > targets / NEAR) & (values < targets * NEAR)).mean())


def rmse(samples: Samples) -> float:
    """Return the root of the mean squared error over known pixels, in the unit of the targets."""
    (maps,) = samples.outputs
    known = ~np.isnan(samples.labels)
    return float(np.sqrt(np.mean((maps[known] - samples.labels[known]) ** 2)))


def mae_vs_fp32(samples: Samples) -> float:
    """Return the mean absolute difference from the reference's maps, in the unit of the targets."""
    (maps,), (reference,) = samples.outputs, samples.reference
    return float(np.abs(maps - reference).mean())


LABELS, REFERENCE = ("outputs", "labels"), ("outputs", "reference")
METRICS = {
    "delta1": Metric(
        "pixels within a factor of 1.25 of the truth", "% of pixels within a factor of 1.25", "higher", delta1, LABELS
    ),
    "rmse": Metric("root mean squared error over known pixels", "as the labels", "lower", rmse, LABELS, title="RMSE"),
    "mae_vs_fp32": Metric(
        "mean absolute difference to the maps of the FP32 file",
        "from its FP32 form, as the labels",
        "lower",
        mae_vs_fp32,
        REFERENCE,
        title="deviation",
    ),
}


@dataclass(frozen=True)
class Regression(Task):
    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the mean absolute error over known pixels."""
        from edgekd.training.losses import l1_loss

        return l1_loss(outputs, targets)

    def distill_loss(
        self, outputs: Outputs, teacher_outputs: Outputs, temperature: float = 1.0, standardize: bool = False
    ) -> Tensor:
        """Return the mean absolute difference; maps have no temperature."""
        difference: Tensor = (outputs.float() - teacher_outputs.float()).abs().mean()
        return difference

    def sample_losses(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the mean absolute error of each sample, (N,); infinite where no pixel is known."""
        import torch

        known = ~targets.isnan()
        error = torch.where(known, outputs.float() - targets, 0.0).abs().flatten(1).sum(1)
        count = known.flatten(1).sum(1)
        return torch.where(count > 0, error / count, torch.inf)

    def accuracy(self, outputs: Outputs, targets: Tensor) -> float:
        """Return the fraction of known pixels within a factor of 1.25 of the target."""
        import torch

        known = ~targets.isnan()
        ratio = torch.maximum(outputs / targets, targets / outputs)[known]
        return ((ratio > 0) & (ratio < NEAR)).float().mean().item()

    def unlabelled(self, targets: Tensor) -> Tensor:
        """Return which pixels are unknown, (N, K, H, W) bool."""
        return targets.isnan()

    def fill_targets(self, targets: Tensor, teacher_outputs: Outputs) -> Tensor:
        """Return the targets; of unknown pixels the teacher's values."""
        return teacher_outputs.where(targets.isnan(), targets)  # type: ignore[no-any-return]

    def transform(
        self, images: Tensor, targets: Tensor, augment: Augment, random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Shift and mirror images and maps alike; pixels from outside of the image are unknown."""
        from edgekd.training.dataloader import draw_shift, shift_pixels

        shift = draw_shift(images, augment, random)
        images = shift_pixels(images, shift)
        if augment == Augment():
            return images, targets
        return images, shift_pixels(targets.permute(0, 2, 3, 1), shift, float("nan")).permute(0, 3, 1, 2).contiguous()

    def check_targets(self, split: str, targets: np.ndarray, images: np.ndarray, classes: tuple[str, ...]) -> None:
        """Check that targets are maps of the images' size. Raises DataError."""
        expected = (len(images), len(classes), *images.shape[1:3])
        if not np.issubdtype(targets.dtype, np.floating) or targets.shape != expected:
            raise DataError(
                f"the targets of the {split} split are {targets.dtype} of shape {targets.shape}, not maps",
                hint=f"use float32 of shape {expected}, or choose another `task`",
            )

    def hide_targets(self, targets: np.ndarray) -> np.ndarray:
        """Return maps without a known pixel."""
        return np.full_like(targets, np.nan)

    def outputs(self, num_classes: int, shape: tuple[int, int, int]) -> tuple[OutputSpec, ...]:
        """Return the maps, as large as the image."""
        return (OutputSpec("logits", (num_classes, *shape[1:])),)

    def matches(self, outputs: Sequence[TensorSpec]) -> bool:
        """Tell whether there is one output of maps."""
        return len(outputs) == 1 and len(outputs[0].shape) == 4

    def metrics(self) -> Mapping[str, Metric]:
        """Return delta1, RMSE, and the deviation from the FP32 form."""
        return METRICS

    def agreement(self, outputs: tuple[np.ndarray, ...], reference: tuple[np.ndarray, ...]) -> float:
        """Return the percentage of values within a factor of 1.25 of the reference's."""
        (maps,), (expected,) = outputs, reference
        low, high = np.minimum(expected / NEAR, expected * NEAR), np.maximum(expected / NEAR, expected * NEAR)
        return 100 * float(((maps == expected) | ((maps > low) & (maps < high))).mean())


PLUGIN = Regression
