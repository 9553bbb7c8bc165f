"""classification: one class for each image, as logits (N, classes); labels are class numbers, -1 where unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgekd.core.artifact import TensorSpec
from edgekd.core.augment import Augment
from edgekd.core.bench_result import Samples
from edgekd.core.metric import Metric, hit_rate
from edgekd.core.task import Outputs, OutputSpec, Task
from edgekd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def correct(samples: Samples) -> np.ndarray:
    """Return for each image whether its highest logit is that of its class, (images,) bool."""
    (logits,) = samples.outputs
    return np.asarray(logits.argmax(1) == samples.labels)


def agreeing(samples: Samples) -> np.ndarray:
    """Return for each image whether the reference has the same top class, (images,) bool."""
    (logits,), (reference,) = samples.outputs, samples.reference
    return np.asarray(logits.argmax(1) == reference.argmax(1))


METRICS = {
    "top1": hit_rate("images whose highest logit is the right class", "top-1", "%", ("outputs", "labels"), correct),
    "agreement": hit_rate(
        "images that get the same class as in FP32",
        "agreement",
        "% with its FP32 form",
        ("outputs", "reference"),
        agreeing,
    ),
}


@dataclass(frozen=True)
class Classification(Task):
    class_logits: ClassVar[bool] = True

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the cross-entropy of (N, classes) logits with (N,) labels."""
        from edgekd.training.losses import cross_entropy

        return cross_entropy(outputs, targets)

    def distill_loss(
        self, outputs: Outputs, teacher_outputs: Outputs, temperature: float = 1.0, standardize: bool = False
    ) -> Tensor:
        """Return the divergence of softened logits, as `losses.kd_loss` has it."""
        from edgekd.training.losses import kd_loss

        return kd_loss(outputs, teacher_outputs, temperature, standardize)

    def sample_losses(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each sample, (N,); infinite for an unlabelled one."""
        import torch.nn.functional as F

        losses = F.cross_entropy(outputs.float(), targets.clamp(min=0), reduction="none")
        return losses.masked_fill(targets < 0, float("inf"))

    def accuracy(self, outputs: Outputs, targets: Tensor) -> float:
        """Return the fraction of samples with the highest logit at their class."""
        return float((outputs.argmax(1) == targets).float().mean().item())

    def chance(self, num_classes: int) -> float | None:
        """Return the accuracy of guessing one of the classes."""
        return 1 / num_classes

    def unlabelled(self, targets: Tensor) -> Tensor:
        """Return which samples have no class, (N,) bool."""
        return targets < 0

    def fill_targets(self, targets: Tensor, teacher_outputs: Outputs) -> Tensor:
        """Return the labels; of unlabelled samples the teacher's top class."""
        return teacher_outputs.argmax(1).where(targets < 0, targets)  # type: ignore[no-any-return]

    def transform(
        self, images: Tensor, targets: Tensor, augment: Augment, random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Shift and mirror the images; their classes stay."""
        from edgekd.training.dataloader import draw_shift, shift_pixels

        return shift_pixels(images, draw_shift(images, augment, random)), targets

    def check_targets(self, split: str, targets: np.ndarray, images: np.ndarray, classes: tuple[str, ...]) -> None:
        """Check that labels are class numbers, and that every class has an image. Raises DataError."""
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            raise DataError(
                f"the labels of the {split} split are {targets.dtype} of shape {targets.shape}, not class numbers",
                hint="use integers of shape (N,), or choose another `task`",
            )
        missing = set(range(len(classes))) - set(np.unique(targets).tolist())
        if missing:
            names = ", ".join(classes[i] for i in sorted(missing))
            raise DataError(f"the {split} split has no image of {names}", hint="give every class more images")

    def hide_targets(self, targets: np.ndarray) -> np.ndarray:
        """Return labels of no class."""
        return np.full_like(targets, -1)

    def sample_classes(self, targets: np.ndarray) -> np.ndarray | None:
        """Return the labels."""
        return targets

    def outputs(self, num_classes: int, shape: tuple[int, int, int]) -> tuple[OutputSpec, ...]:
        """Return one row of logits."""
        return (OutputSpec("logits", (num_classes,)),)

    def matches(self, outputs: Sequence[TensorSpec]) -> bool:
        """Tell whether there is one output of rows."""
        return len(outputs) == 1 and len(outputs[0].shape) == 2

    def metrics(self) -> Mapping[str, Metric]:
        """Return top-1 accuracy, and agreement with the FP32 form."""
        return METRICS

    def agreement(self, outputs: tuple[np.ndarray, ...], reference: tuple[np.ndarray, ...]) -> float:
        """Return the percentage of images with the same top class."""
        (logits,), (expected,) = outputs, reference
        return float(100 * (logits.argmax(1) == expected.argmax(1)).mean())


PLUGIN = Classification
