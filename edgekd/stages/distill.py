"""Stage 2: teach a network by playing a method's script, remembering every finished phase."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core import plain, plugins
from edgekd.core.artifact import File, PhaseRecord, Weights
from edgekd.core.errors import ConfigError, DataError
from edgekd.core.ledger import KEEP
from edgekd.core.method import Lesson, Method, Outcome, Phase, play
from edgekd.core.model import Model
from edgekd.core.progress import bar
from edgekd.core.splits import per_class
from edgekd.core.target import Pricing
from edgekd.core.task import Arrays, Augment, Task
from edgekd.learn import weights
from edgekd.learn.feed import Feed
from edgekd.learn.surgery import Surgery, difference, operated
from edgekd.learn.trainer import TrainConfig, Trainer, arrange, freeze
from edgekd.learn.trainer import replace as write


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


@dataclass(frozen=True)
class Trained:
    """A trained network: what builds it, what it answers, and its weights."""

    model: Model
    weights: Weights
    classes: tuple[str, ...]  # that it knows, in the order of its logits
    channels: int  # of its images
    surgery: Surgery = Surgery()  # what its method changed beyond weights

    def network(self) -> nn.Module:
        """The module, with its weights."""
        module = operated(self.model.build(len(self.classes), self.channels), self.surgery)
        weights.load(module, self.weights.file.path)
        return module.eval()


def distill(
    out: Path,
    name: str,
    task: Task,
    model: Model,
    method: Method,
    course: Course,
    teachers: tuple[Trained, ...],
    pricing: Pricing | None = None,
) -> tuple[Trained, ...]:
    """The networks that `method` makes of `model`. Phases found in `out` are replayed, not trained again.

    Returns one network for most methods, several for those that make a family. `pricing` measures latencies for
    methods that ask for them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = a_trainer(task, course, device)
    trainer.reseed(-1)

    def build(family: Model) -> nn.Module:
        return placed(family.build(len(task.classes), task.shape[0]), device)

    notes: dict[str, Any] = {}
    lesson = Lesson(
        student=build(model),
        teachers=tuple(placed(t.network(), device) for t in teachers),
        epochs=course.epochs,
        classes=len(task.classes),
        sample=trainer.sample,
        dense=task.dense,
        knows=knows(task.classes, teachers),
        build=build,
        price=remembered(pricing, out / KEEP) if pricing and pricing.possible() else None,
        note=notes.__setitem__,
    )
    check_answers(lesson, task, [len(t.classes) for t in teachers])
    freeze(lesson)
    played = Played(out / KEEP, trainer, lesson, name)
    with played.progress():
        students = play(method.teach(lesson), played.run)
    built = model.build(len(task.classes), task.shape[0])
    made = []
    for key, module in students.items():
        called = name if key == "student" else f"{name}-{key}"
        path = out / f"{called}.safetensors"
        weights.save(module, path)
        story = Weights(
            file=File.of(path),
            name=called,
            method=plugins.name_of(method),
            parameters=sum(p.numel() for p in module.parameters()),
            valid_accuracy=None if course.with_validation else trainer.accuracy(module),
            seconds=round(sum(record.seconds for record in played.records), 3),
            phases=tuple(played.records),
            notes=notes or None,
        )
        made.append(Trained(model, story, task.classes, task.shape[0], difference(built, module)))
    return tuple(made)


def knows(classes: tuple[str, ...], teachers: tuple[Trained, ...]) -> tuple[tuple[int | None, ...], ...]:
    """By teacher, its column for each class; empty if all of them answer just these classes."""
    if all(t.classes == classes for t in teachers):
        return ()
    return tuple(tuple(t.classes.index(c) if c in t.classes else None for c in classes) for t in teachers)


def remembered(pricing: Pricing, home: Path) -> Callable[[nn.Module], float]:
    """Latencies by number of the question: a script that is replayed must be told what it was told before."""
    numbers = itertools.count()

    def price(module: nn.Module) -> float:
        slot = home / f"price-{next(numbers)}.json"
        if not slot.exists():
            home.mkdir(parents=True, exist_ok=True)
            found = pricing.price_ms(home / "price", module)
            partial = slot.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.rename(slot)
        return float(json.loads(slot.read_text()))

    return price


def adopt(
    out: Path, name: str, task: Task, model: Model, checkpoint: File, trust: bool, outputs: int | None = None
) -> Trained:
    """A network whose weights exist already. Raises CheckpointError if they do not fit.

    With `outputs` it answers for that many classes which are not those of the task.
    """
    classes = task.classes if outputs is None else ("",) * outputs
    module = model.build(len(classes), task.shape[0])
    weights.load(module, checkpoint.path, trust)
    course = Course(epochs=1, train=TrainConfig(), augment=Augment(), seed=0)
    trainer = a_trainer(task, course, torch.device("cpu"))
    path = out / f"{name}.safetensors"
    weights.save(module, path)
    count = sum(p.numel() for p in module.parameters())
    accuracy = (
        None if outputs else trainer.accuracy(checked(name, module, next(trainer.sample(1)).x[:2], task.answer(2)))
    )
    return Trained(model, Weights(File.of(path), name, "", count, accuracy, 0.0), classes, task.shape[0])


class Played:
    """Runs the phases of one script, in order; a phase that `home` holds is recalled."""

    def __init__(self, home: Path, trainer: Trainer, lesson: Lesson, name: str) -> None:
        self.home, self.trainer, self.lesson, self.name = home, trainer, lesson, name
        self.records: list[PhaseRecord] = []
        self.numbers = itertools.count()

    @contextmanager
    def progress(self) -> Iterator[None]:
        with bar(f"{self.name}: epochs", self.lesson.epochs) as self.advance:
            yield

    def run(self, phase: Phase) -> Outcome:
        number = next(self.numbers)
        slot = self.home / f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', phase.name.lower())}"
        record = recall(slot, phase)
        if record is None:
            slot.mkdir(parents=True, exist_ok=True)
            outcome, curve = self.trainer.run(phase, self.lesson, 2 * number, slot / "epoch.pt", self.advance)
            seconds = round(sum(epoch.seconds for epoch in curve), 3)
            record = PhaseRecord(phase.name, phase.epochs, outcome.losses, outcome.accuracy, seconds, curve)
            keep(slot, phase, record)
        else:
            self.advance(phase.epochs)
        self.records.append(record)
        self.trainer.reseed(2 * number + 1)  # what the script draws next is the same after a replay
        return Outcome(dict(record.losses), record.accuracy)


def keep(slot: Path, phase: Phase, record: PhaseRecord) -> None:
    write(slot / "trains.pt", [m.state_dict() for m in phase.trains])
    partial = slot / "phase.json.partial"
    partial.write_text(json.dumps(asdict(record)))
    partial.rename(slot / "phase.json")  # last: marks the slot complete
    (slot / "epoch.pt").unlink(missing_ok=True)


def recall(slot: Path, phase: Phase) -> PhaseRecord | None:
    if not (slot / "phase.json").exists():
        return None
    states = torch.load(slot / "trains.pt", weights_only=True)
    for module, state in zip(phase.trains, states, strict=True):
        module.load_state_dict(state)
        module.eval()
    return plain.load(PhaseRecord, json.loads((slot / "phase.json").read_text()))


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
    share = course.labelled_share
    shown = np.resize(chosen, max(len(chosen), round(share / (1 - share) * len(mixed))))  # from the first on again
    return Arrays(train.images[np.r_[shown, mixed]], np.concatenate([train.labels[shown], hidden]))


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
    try:
        answer = module.eval()(x)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the {role} does not take images of shape {tuple(x.shape)}: {str(error).splitlines()[0]}",
            hint="check its input channels, and data.size",
        ) from error
    if not isinstance(answer, Tensor) or answer.shape != shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ConfigError(
            f"the {role} answers {got} for {len(x)} images; its data has {shape[1]} classes",
            hint=f"a {role} must give answers of shape (N, {', '.join(map(str, shape[1:]))}); "
            "for a teacher of other classes set its `outputs`, or its `data`",
        )
    return module
