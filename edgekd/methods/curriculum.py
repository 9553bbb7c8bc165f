"""curriculum: easy images first, in the order in which the student itself finds them easy; around any method.

Instance-level sequence learning (Zhao, Sun, Dong, Dong, Li, 2021, arXiv 2106.10885): a snapshot of the student early in
its training scores every training image, the scores order the images, the student goes on with the easy ones, and this
is repeated. With E the epochs of the lesson:

    difficulty = loss of the image for the student as it is now: cross-entropy, or mean absolute error of a map
    place      = share of the images of its class that are easier                      (0 to below 1)
    stage 0: epochs up to early E, all images: the snapshot that scores first
    stage k: up to early E + (full - early) E k / stages, images with place < start + (1 - start)(k - 1) / stages
    then all images, to the end                    (fewer stages where they would have less than an epoch)

The base method's phases are cut where a stage ends; learning-rate schedule and `Batch.progress` run on over the cuts.
The student scores anew wherever a part of a phase begins.

Deviations from the paper, and why:
- Only the abstract could be read. Score and pacing are therefore the simplest that it allows: loss, and equal steps.
- Images are ordered within their class, so that the first stages lack no class.
- An image without a label is scored against the teacher's answer. If no teacher knows the classes it comes in last.
- Phases that teach neither the student nor a copy of it, such as those of a dictionary, and phases whose images the
  base chose itself, stay as they are. Before a first phase of the student is over there is no score: all images count.
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
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.core.method import Batch, Lesson, Losses, Method, Phase, Script
from edgekd.errors import ConfigError
from edgekd.training.teachers import answering, columns


@dataclass(frozen=True)
class Stage:
    end: int  # in epochs of the lesson
    share: float  # of the images


@dataclass(frozen=True)
class Curriculum(Method):
    base: Method  # what is taught in this order
    early: float = 0.1  # share of the budget before the first score
    start: float = 0.4  # share of the images in the first stage
    full: float = 0.6  # share of the budget after which all images count
    stages: int = 3  # in which the set grows

    def __post_init__(self) -> None:
        for name in ("early", "start", "full"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a share between 0 and 1")
        if self.early >= self.full:
            raise ConfigError(f"early ({self.early}) is not below full ({self.full})", hint="give `full` more")
        if self.stages < 1:
            raise ConfigError(f"stages is {self.stages}", hint="use 1 or more")

    @property
    def priced(self) -> bool:
        return self.base.priced

    def teach(self, lesson: Lesson) -> Script:
        stages = self.plan(lesson.epochs)
        script = self.base.teach(lesson)
        spent, learnt = 0, False
        told: list[dict[str, Any]] = []
        step = partial(next, script)
        while True:
            try:
                phase = step()
            except StopIteration as end:
                lesson.note("curriculum", told)
                return end.value  # type: ignore[no-any-return]
            students = pupils(phase, lesson.student) if phase.samples is None else []
            if students:
                for first, last, share in cuts(spent, spent + phase.epochs, stages):
                    samples = easiest(lesson, students, share) if learnt and share < 1 else None
                    cut = part(phase, first - spent, last - spent)
                    told.append({"phase": cut.name, "epochs": cut.epochs, "samples": samples and len(samples)})
                    outcome = yield dataclasses.replace(cut, samples=samples)
                    learnt = True
            else:
                outcome = yield phase
            spent += phase.epochs
            step = partial(script.send, outcome)

    def plan(self, epochs: int) -> tuple[Stage, ...]:
        """The stages of a lesson; fewer where they would have less than an epoch each."""
        early = max(1, round(self.early * epochs))
        full = max(early + 1, round(self.full * epochs))
        if full >= epochs:
            raise ConfigError(
                f"{epochs} epochs leave none for all images (first score after {early}, growing until {full})",
                hint="give 3 epochs or more, and less `full`",
            )
        count = min(self.stages, full - early)
        growing = [
            Stage(early + round((full - early) * (k + 1) / count), self.start + (1 - self.start) * k / count)
            for k in range(count)
        ]
        return Stage(early, 1.0), *growing, Stage(epochs, 1.0)


def pupils(phase: Phase, student: nn.Module) -> list[nn.Module]:
    """The networks whose answers a phase teaches: the student, if any of it learns, and copies of it."""
    keys, own = student.state_dict().keys(), {id(p) for p in student.parameters()}
    copies = [m for m in phase.trains if m is not student and m.state_dict().keys() == keys]
    itself = any(id(p) in own for m in phase.trains for p in m.parameters())
    return [student, *copies] if itself else copies


def cuts(begin: int, end: int, stages: tuple[Stage, ...]) -> Iterator[tuple[int, int, float]]:
    """The stages' parts of a stretch of epochs, each with its share of the images."""
    for stage in stages:
        until = min(stage.end, end)
        if until > begin:
            yield begin, until, stage.share
            begin = until


def part(phase: Phase, begin: int, end: int) -> Phase:
    """Some epochs of a phase, with its own stretch of the learning-rate schedule and of `Batch.progress`."""
    if end - begin == phase.epochs:
        return phase
    share = (end - begin) / phase.epochs
    start = begin / phase.epochs
    low, high = phase.span

    def loss(batch: Batch) -> Losses:
        return phase.loss(dataclasses.replace(batch, progress=start + share * batch.progress))

    return dataclasses.replace(
        phase,
        name=f"{phase.name} {begin + 1}-{end}",
        loss=loss,
        epochs=end - begin,
        span=(low + (high - low) * start, low + (high - low) * (start + share)),
    )


def easiest(lesson: Lesson, students: list[nn.Module], share: float) -> list[int]:
    """The training images in the easiest `share` of their class, by the students' mean loss."""
    indices, losses, groups = [], [], []
    truth = truths(lesson)
    with torch.no_grad():
        for batch in lesson.sample(sys.maxsize):
            wanted = truth(batch)
            each = torch.stack([difficulty(student(batch.x), wanted) for student in students])
            indices.append(batch.index.cpu().numpy())
            losses.append(each.mean(0).cpu().numpy())
            groups.append(np.zeros(len(wanted), np.int64) if lesson.dense else batch.y.cpu().numpy())
    place = places(np.concatenate(losses), np.concatenate(groups))
    return sorted(np.concatenate(indices)[place < share].tolist())


def truths(lesson: Lesson) -> Callable[[Batch], Tensor]:
    """What answers are measured by: labels, and the teacher's answers where there are none and it knows the classes."""
    if not lesson.teachers or None in columns(lesson):
        return lambda batch: batch.y
    teacher = answering(lesson)

    def truth(batch: Batch) -> Tensor:
        if lesson.dense:
            missing, answer = batch.y.isnan(), teacher
        else:
            missing, answer = batch.y < 0, lambda x: teacher(x).argmax(1)
        return torch.where(missing, answer(batch.x), batch.y) if missing.any() else batch.y

    return truth


def difficulty(answer: Tensor, truth: Tensor) -> Tensor:
    """The loss of each of N samples, as `learn.losses.supervised` has it for all; infinite where nothing is known."""
    if truth.is_floating_point():
        known = ~truth.isnan()
        gap = torch.where(known, answer.float() - truth, 0.0).abs().flatten(1).sum(1)
        count = known.flatten(1).sum(1)
        return torch.where(count > 0, gap / count, torch.inf)
    loss = F.cross_entropy(answer.float(), truth.clamp(min=0), reduction="none")
    return loss.masked_fill(truth < 0, torch.inf)


def places(losses: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each sample the share of its group that is easier, 0 to below 1; 1 where that is not known."""
    place = np.ones(len(losses))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        order = members[np.argsort(losses[members], kind="stable")]
        place[order] = np.arange(len(order)) / len(order)
    place[np.isinf(losses)] = 1
    return place


PLUGIN = Curriculum
