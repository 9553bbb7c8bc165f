"""curriculum: easy images first, ordered by the loss of the student itself; wraps any method.

Instance-level sequence learning (Zhao, Sun, Dong, Dong, Li, 2021, arXiv 2106.10885): a snapshot of the student early
in its training scores every training image, the scores order the images, the student continues with the easy ones, and
this is repeated. With E the epochs of the student:

    difficulty = loss of the image for the current student, as the task defines it
    rank       = fraction of the images of its class that are easier                   (0 to below 1)
    stage 0: epochs up to warmup E, all images: the snapshot that scores first
    stage k: up to warmup E + (full - warmup) E k / n, images with rank < start + (1 - start)(k - 1) / n
    then all images, to the end                    (fewer stages where they would have less than an epoch)

with n = `num_stages`, and warmup, start and full the settings that end in `_fraction`. The phases of the base
method are split where a stage ends; learning-rate schedule and `Batch.progress` continue over the splits. The student
scores again wherever a part of a phase begins.

Deviations from the paper, and why:
- Only the abstract could be read. Score and pacing are therefore the simplest that it allows: loss, and equal steps.
- Images are ordered within their class, so that the first stages lack no class.
- An unlabelled image is scored against the teacher's output. If no teacher knows all classes, it comes in last.
- Phases that train neither the student nor a copy of it, such as those of a dictionary, and phases that select their
  own images, stay as they are. Before a first phase of the student is over there is no score: all images are used.
- Each part starts with fresh momentum, as every phase does.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.method import Batch, Losses, Method, Phase, PhaseGenerator, TrainingContext
from edgekd.errors import ConfigError
from edgekd.training.teachers import class_columns, teacher_logits


@dataclass(frozen=True)
class CurriculumStage:
    """A stage: the epoch at which it ends, and its images."""

    end: int  # in epochs of the student
    fraction: float  # of the images


@dataclass(frozen=True)
class Curriculum(Method):
    """Settings of the curriculum."""

    base: Method  # the method that trains in this order
    warmup_fraction: float = 0.1  # of the budget, before the first score
    start_fraction: float = 0.4  # of the images, in the first stage
    full_fraction: float = 0.6  # of the budget, after which all images are used
    num_stages: int = 3  # in which the set grows

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "start_fraction", "full_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a fraction between 0 and 1")
        if self.warmup_fraction >= self.full_fraction:
            raise ConfigError(
                f"warmup_fraction ({self.warmup_fraction}) is not below full_fraction ({self.full_fraction})",
                hint="increase full_fraction",
            )
        if self.num_stages < 1:
            raise ConfigError(f"num_stages is {self.num_stages}", hint="use 1 or more")

    @property
    def needs_target(self) -> bool:
        return self.base.needs_target

    def phases(self, ctx: TrainingContext) -> PhaseGenerator:
        stages = self.plan(ctx.epochs)
        phases = self.base.phases(ctx)
        epoch, trained = 0, False
        summary: list[dict[str, Any]] = []
        step = partial(next, phases)
        while True:
            try:
                phase = step()
            except StopIteration as end:
                ctx.log_choice("curriculum", summary)
                return end.value  # type: ignore[no-any-return]
            students = trained_students(phase, ctx.student) if phase.samples is None else []
            if students:
                for first, last, fraction in split_stages(epoch, epoch + phase.epochs, stages):
                    samples = easiest_images(ctx, students, fraction) if trained and fraction < 1 else None
                    part = phase_part(phase, first - epoch, last - epoch)
                    summary.append({"phase": part.name, "epochs": part.epochs, "samples": samples and len(samples)})
                    result = yield dataclasses.replace(part, samples=samples)
                    trained = True
            else:
                result = yield phase
            epoch += phase.epochs
            step = partial(phases.send, result)

    def plan(self, epochs: int) -> tuple[CurriculumStage, ...]:
        """Return the stages for a budget; fewer where they would have less than an epoch each."""
        warmup = max(1, round(self.warmup_fraction * epochs))
        full = max(warmup + 1, round(self.full_fraction * epochs))
        if full >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for all images (first score after {warmup}, growing until {full})",
                hint="use 3 epochs or more, or decrease full_fraction",
            )
        count = min(self.num_stages, full - warmup)
        growing = [
            CurriculumStage(
                warmup + round((full - warmup) * (k + 1) / count),
                self.start_fraction + (1 - self.start_fraction) * k / count,
            )
            for k in range(count)
        ]
        return CurriculumStage(warmup, 1.0), *growing, CurriculumStage(epochs, 1.0)


def trained_students(phase: Phase, student: nn.Module) -> list[nn.Module]:
    """Return the students that a phase trains: the student, if any of its parameters is trained, and copies of it."""
    keys, parameters = student.state_dict().keys(), {id(p) for p in student.parameters()}
    copies = [m for m in phase.trains if m is not student and m.state_dict().keys() == keys]
    trains_student = any(id(p) in parameters for m in phase.trains for p in m.parameters())
    return [student, *copies] if trains_student else copies


def split_stages(begin: int, end: int, stages: tuple[CurriculumStage, ...]) -> Iterator[tuple[int, int, float]]:
    """Yield the parts of the epochs from `begin` to `end` by stage: first, last, fraction of the images."""
    for stage in stages:
        until = min(stage.end, end)
        if until > begin:
            yield begin, until, stage.fraction
            begin = until


def phase_part(phase: Phase, begin: int, end: int) -> Phase:
    """Return some epochs of a phase, with their part of the learning-rate schedule and of `Batch.progress`."""
    if end - begin == phase.epochs:
        return phase
    fraction = (end - begin) / phase.epochs
    start = begin / phase.epochs
    low, high = phase.lr_span

    def loss(batch: Batch) -> Losses:
        return phase.loss(dataclasses.replace(batch, progress=start + fraction * batch.progress))

    return dataclasses.replace(
        phase,
        name=f"{phase.name} {begin + 1}-{end}",
        loss=loss,
        epochs=end - begin,
        lr_span=(low + (high - low) * start, low + (high - low) * (start + fraction)),
    )


def easiest_images(ctx: TrainingContext, students: list[nn.Module], fraction: float) -> list[int]:
    """Return the training images in the easiest fraction of their class, by the students' mean loss."""
    indices, losses, groups = [], [], []
    labels_of = reference_labels(ctx)
    with torch.no_grad():
        for batch in ctx.first_batches(sys.maxsize):
            labels = labels_of(batch)
            each = torch.stack([ctx.task.sample_losses(student(batch.images), labels) for student in students])
            indices.append(batch.index.cpu().numpy())
            losses.append(each.mean(0).cpu().numpy())
            groups.append(ctx.task.strata(batch.labels.cpu().numpy()))
    rank = difficulty_ranks(np.concatenate(losses), np.concatenate(groups))
    return sorted(np.concatenate(indices)[rank < fraction].tolist())


def reference_labels(ctx: TrainingContext) -> Callable[[Batch], Tensor]:
    """Return a function from a batch to its labels; missing ones are the teacher's outputs, if it knows all classes."""
    if not ctx.teachers or None in class_columns(ctx):
        return lambda batch: batch.labels
    teacher = teacher_logits(ctx)

    def labels(batch: Batch) -> Tensor:
        if not ctx.task.unlabelled(batch.labels).any():
            return batch.labels
        return ctx.task.fill_targets(batch.labels, teacher(batch.images))

    return labels


def difficulty_ranks(losses: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return for each sample the fraction of its group that is easier, 0 to below 1; 1 where the loss is infinite."""
    rank = np.ones(len(losses))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        order = members[np.argsort(losses[members], kind="stable")]
        rank[order] = np.arange(len(order)) / len(order)
    rank[np.isinf(losses)] = 1
    return rank


PLUGIN = Curriculum
