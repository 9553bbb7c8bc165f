"""Stage 2: teach a network by playing a method's script, remembering every finished phase."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd.core import plain, plugins
from edgekd.core.artifact import File, PhaseRecord, Weights
from edgekd.core.errors import ConfigError
from edgekd.core.ledger import KEEP
from edgekd.core.method import Lesson, Method, Outcome, Phase, play
from edgekd.core.model import Model
from edgekd.core.progress import bar
from edgekd.core.splits import per_class
from edgekd.core.task import Arrays, Augment, Task
from edgekd.learn import weights
from edgekd.learn.feed import Feed
from edgekd.learn.trainer import TrainConfig, Trainer, arrange, freeze
from edgekd.learn.trainer import replace as write


@dataclass(frozen=True)
class Course:
    """How one network is taught, whatever the method."""

    epochs: int
    train: TrainConfig
    augment: Augment
    seed: int
    labels_per_class: int | None = None  # use that many training images of each class; None: all
    with_validation: bool = False  # learn from the validation split, too


@dataclass(frozen=True)
class Trained:
    """A trained network: what builds it, and its weights."""

    model: Model
    weights: Weights


def distill(
    out: Path, name: str, task: Task, model: Model, method: Method, course: Course, teachers: tuple[Trained, ...]
) -> tuple[Trained, ...]:
    """The networks that `method` makes of `model`. Phases found in `out` are replayed, not trained again.

    Returns one network for most methods, several for those that make a family.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = a_trainer(task, course, device)
    trainer.reseed(-1)
    student = placed(model.build(len(task.classes), task.shape[0]), device)
    notes: dict[str, Any] = {}
    lesson = Lesson(
        student=student,
        teachers=tuple(placed(network(t, task), device) for t in teachers),
        epochs=course.epochs,
        classes=len(task.classes),
        sample=trainer.sample,
        note=notes.__setitem__,
    )
    check_answers(lesson, task)
    freeze(lesson)
    played = Played(out / KEEP, trainer, lesson, name)
    with played.progress():
        students = play(method.teach(lesson), played.run)
    made = []
    for key, module in students.items():
        called = name if key == "student" else f"{name}-{key}"
        path = out / f"{called}.safetensors"
        weights.save(module, path)
        made.append(
            Trained(
                model,
                Weights(
                    file=File.of(path),
                    name=called,
                    method=plugins.name_of(method),
                    parameters=sum(p.numel() for p in module.parameters()),
                    valid_accuracy=None if course.with_validation else trainer.accuracy(module),
                    seconds=round(sum(record.seconds for record in played.records), 3),
                    phases=tuple(played.records),
                    notes=notes or None,
                ),
            )
        )
    return tuple(made)


def adopt(out: Path, name: str, task: Task, model: Model, checkpoint: File, trust: bool) -> Trained:
    """A network whose weights exist already. Raises CheckpointError if they do not fit."""
    module = model.build(len(task.classes), task.shape[0])
    weights.load(module, checkpoint.path, trust)
    course = Course(epochs=1, train=TrainConfig(), augment=Augment(), seed=0)
    trainer = a_trainer(task, course, torch.device("cpu"))
    check_answers(Lesson(module, (), 1, len(task.classes), trainer.sample), task)
    path = out / f"{name}.safetensors"
    weights.save(module, path)
    count = sum(p.numel() for p in module.parameters())
    return Trained(model, Weights(File.of(path), name, "", count, trainer.accuracy(module), 0.0))


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
        chosen = per_class(train.labels, course.labels_per_class, course.seed)
        train = Arrays(train.images[chosen], train.labels[chosen])
    if course.with_validation:
        train = Arrays(np.concatenate([train.images, valid.images]), np.concatenate([train.labels, valid.labels]))
    feeds = Feed(train, task, course.augment, device), Feed(valid, task, Augment(), device)
    return Trainer(*feeds, course.train, course.seed, device)


def network(trained: Trained, task: Task) -> nn.Module:
    """The module of a trained network, with its weights."""
    module = trained.model.build(len(task.classes), task.shape[0])
    weights.load(module, trained.weights.file.path)
    return module.eval()


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    arrange(module, device)
    return module


@torch.no_grad()
def check_answers(lesson: Lesson, task: Task) -> None:
    """Every network must answer logits for the classes of the data."""
    x = next(lesson.sample(1)).x[:2]
    for role, module in [("student", lesson.student), *(("teacher", t) for t in lesson.teachers)]:
        try:
            answer = module.eval()(x)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the {role} does not take images of shape {tuple(x.shape)}: {str(error).splitlines()[0]}",
                hint="check its input channels, and data.size",
            ) from error
        if not isinstance(answer, torch.Tensor) or answer.shape != (len(x), len(task.classes)):
            shape = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
            raise ConfigError(
                f"the {role} answers {shape} for {len(x)} images; the data has {len(task.classes)} classes",
                hint=f"a {role} must give logits of shape (N, {len(task.classes)})",
            )
