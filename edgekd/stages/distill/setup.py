"""What a network is taught with, and a rehearsal of it: what a method refuses, it refuses before any training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.dataset import Arrays, Augment, Task
from edgekd.core.method import Lesson, Method
from edgekd.core.model import Model
from edgekd.core.target import Pricing
from edgekd.errors import ConfigError, DataError
from edgekd.training.dataloader import Feed
from edgekd.training.trained_model import built
from edgekd.training.trainer import TrainConfig, Trainer, arrange, freeze
from edgekd.utils.external import foreign
from edgekd.utils.splits import per_class


@dataclass(frozen=True)
class Course:
    """How one network is taught, whatever the method."""

    epochs: int
    train: TrainConfig
    augment: Augment
    seed: int
    labels_per_class: int | None = None  # use that many training images of each class; None: all; dense: in all
    unlabelled: int = 0  # of the other training images, mixed in without their labels
    labelled_share: float = 0.0  # of all these: labelled images are repeated where they are fewer
    with_validation: bool = False  # learn from the validation split, too

    def labelled(self, kinds: int) -> Course:
        """The same number of images, all labelled; `kinds` is how many classes have their own share of labels."""
        if not self.unlabelled or self.labels_per_class is None:
            return self
        images = self.labels_per_class * kinds
        epochs = round(self.epochs * (shown(images, self) + self.unlabelled) / images)
        return replace(self, epochs=epochs, unlabelled=0, labelled_share=0.0)


def shown(labelled: int, course: Course) -> int:
    """Labelled images of an epoch: all, again where they are to have a greater share."""
    return max(labelled, round(course.labelled_share / (1 - course.labelled_share) * course.unlabelled))


@dataclass(frozen=True)
class Rehearsed:
    """What a method would begin with."""

    phase: str


def rehearse(
    out: Path,
    task: Task,
    model: Model,
    method: Method,
    course: Course,
    cast: tuple[tuple[Model, tuple[str, ...]], ...],
    pricing: Pricing | None,
) -> Rehearsed:
    """Play `method` up to its first training with networks that know nothing: what it refuses, it refuses here.

    `cast` is what builds each teacher, and its classes. Raises what `distill` would raise after hours.
    """
    trainer = a_trainer(task, course, torch.device("cpu"))
    trainer.reseed(-1)
    modules = (built(family, len(classes), task.shape[0]) for family, classes in cast)
    lesson = the_lesson(task, model, modules, [classes for _, classes in cast], trainer, course.epochs)
    if pricing:
        price = partial(pricing.price_ms, out / "price") if pricing.possible() else None
        draft = partial(pricing.blueprint, out / "draft") if pricing.drafts() else None
        lesson = replace(lesson, price=price, blueprint=draft)
    freeze(lesson)
    phase = next(method.teach(lesson), None)
    return Rehearsed(phase.name if phase else "")


def the_lesson(
    task: Task,
    model: Model,
    teachers: Iterable[nn.Module],
    known: Sequence[tuple[str, ...]],
    trainer: Trainer,
    epochs: int,
) -> Lesson:
    """A lesson on the trainer's device; `known` are the classes of each teacher. Raises ConfigError for a network that
    does not answer for its classes."""

    def build(family: Model) -> nn.Module:
        return placed(built(family, len(task.classes), task.shape[0]), trainer.device)

    lesson = Lesson(
        student=build(model),
        teachers=tuple(placed(t, trainer.device) for t in teachers),
        epochs=epochs,
        classes=len(task.classes),
        sample=trainer.sample,
        dense=task.dense,
        knows=knows(task.classes, known),
        build=build,
    )
    check_answers(lesson, task, [len(classes) for classes in known])
    return lesson


def knows(classes: tuple[str, ...], known: Sequence[tuple[str, ...]]) -> tuple[tuple[int | None, ...], ...]:
    """By teacher, its column for each class; empty if all of them answer just these classes."""
    if all(theirs == classes for theirs in known):
        return ()
    return tuple(tuple(theirs.index(c) if c in theirs else None for c in classes) for theirs in known)


def a_trainer(task: Task, course: Course, device: torch.device) -> Trainer:
    train, valid = task.train.load(), task.valid.load()
    if course.labels_per_class is not None:
        train = few(train, course)
    if course.with_validation:
        train = Arrays(np.concatenate([train.images, valid.images]), np.concatenate([train.labels, valid.labels]))
    feeds = Feed(train, task, course.augment, device), Feed(valid, task, Augment(), device)
    return Trainer(*feeds, course.train, course.seed, device)


def few(train: Arrays, course: Course) -> Arrays:
    """The labelled images of a course, then those whose labels are taken away."""
    assert course.labels_per_class is not None
    dense = train.labels.ndim > 1
    # where there are no classes, all images are of one
    chosen = per_class(
        np.zeros(len(train.labels), np.int64) if dense else train.labels, course.labels_per_class, course.seed
    )
    others = np.setdiff1d(np.arange(len(train.labels)), chosen)
    mixed = np.random.default_rng(course.seed).permutation(others)[: course.unlabelled]
    if len(mixed) < course.unlabelled:
        raise DataError(
            f"unlabelled is {course.unlabelled}, but only {len(mixed)} training images are left beside the labelled",
            hint=f"use {len(mixed)} or fewer",
        )
    hidden = np.full_like(train.labels[mixed], np.nan if dense else -1)
    repeated = np.resize(chosen, shown(len(chosen), course))  # from the first on again
    return Arrays(train.images[np.r_[repeated, mixed]], np.concatenate([train.labels[repeated], hidden]))


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    arrange(module, device)
    return module


def check_answers(lesson: Lesson, task: Task, classes: list[int]) -> None:
    """Every network must answer for its classes: the student for the task's, each teacher for so many."""
    x = next(lesson.sample(1)).x[:2]
    checked("student", lesson.student, x, task.answer(2))
    for module, count in zip(lesson.teachers, classes, strict=True):
        checked("teacher", module, x, (2, count, *task.answer(2)[2:]))


@torch.no_grad()
def checked(role: str, module: nn.Module, x: Tensor, shape: tuple[int, ...]) -> nn.Module:
    """The module, if it answers two images with what is wanted. Raises ConfigError if not."""
    with foreign(
        f"the {role} does not take images of shape {tuple(x.shape)}", "check its input channels, and data.size"
    ):
        answer = module.eval()(x)
    if not isinstance(answer, Tensor) or answer.shape != shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ConfigError(
            f"the {role} answers {got} for {len(x)} images; its data has {shape[1]} classes",
            hint=f"a {role} must give answers of shape (N, {', '.join(map(str, shape[1:]))}); "
            "for a teacher of other classes set its `outputs`, or its `data`",
        )
    return module
