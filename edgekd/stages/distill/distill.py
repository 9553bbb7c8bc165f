"""Stage 2: teach a network by playing a method's script, remembering every finished phase."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd.core import plugins, serialization
from edgekd.core.artifact import File, Learnt, PhaseRecord, Weights
from edgekd.core.dataset import Augment, Task
from edgekd.core.method import Lesson, Method, Outcome, Phase, play
from edgekd.core.model import Model
from edgekd.core.step_cache import KEEP
from edgekd.core.target import Pricing
from edgekd.stages.distill.setup import Course, a_trainer, checked, the_lesson
from edgekd.training import checkpoint as checkpoint_module
from edgekd.training.architecture_diff import difference
from edgekd.training.trained_model import Trained, built
from edgekd.training.trainer import TrainConfig, Trainer, freeze
from edgekd.training.trainer import replace as write
from edgekd.utils.progress import bar

log = logging.getLogger(__name__)
LITTLE = 0.2  # of what lies between chance and no mistake


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

    Returns one network for most methods, several for those that make a family. `pricing` knows the target, for
    methods that ask about it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = a_trainer(task, course, device)
    trainer.reseed(-1)

    networks = (t.network() for t in teachers)
    notes: dict[str, Any] = {}
    ranges: dict[str, tuple[Learnt, ...]] = {}
    lesson = replace(
        the_lesson(task, model, networks, [t.classes for t in teachers], trainer, course.epochs),
        price=remembered(pricing, out / KEEP) if pricing and pricing.possible() else None,
        note=notes.__setitem__,
        blueprint=partial(pricing.blueprint, out / KEEP / "draft") if pricing and pricing.drafts() else None,
        learnt=ranges.__setitem__,
    )
    freeze(lesson)
    played = Played(out / KEEP, trainer, lesson, name)
    with played.progress():
        students = play(method.teach(lesson), played.run)
    fresh = built(model, len(task.classes), task.shape[0])
    made = []
    for key, module in students.items():
        called = name if key == "student" else f"{name}-{key}"
        path = out / f"{called}.safetensors"
        checkpoint_module.save(module, path)
        story = Weights(
            file=File.of(path),
            name=called,
            method=plugins.name_of(method),
            parameters=sum(p.numel() for p in module.parameters()),
            valid_accuracy=None if course.with_validation else trainer.accuracy(module),
            seconds=round(sum(record.seconds for record in played.records), 3),
            phases=tuple(played.records),
            notes=notes or None,
            ranges=ranges.get(key, ()),
        )
        made.append(Trained(model, story, task.classes, task.shape[0], difference(fresh, module)))
    return tuple(made)


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
    module = built(model, len(classes), task.shape[0])
    checkpoint_module.load(module, checkpoint.path, trust)
    course = Course(epochs=1, train=TrainConfig(), augment=Augment(), seed=0)
    trainer = a_trainer(task, course, torch.device("cpu"))
    path = out / f"{name}.safetensors"
    checkpoint_module.save(module, path)
    count = sum(p.numel() for p in module.parameters())
    accuracy = (
        None if outputs else trainer.accuracy(checked(name, module, next(trainer.sample(1)).x[:2], task.answer(2)))
    )
    return Trained(model, Weights(File.of(path), name, "", count, accuracy, 0.0), classes, task.shape[0])


def introduce(teacher: Trained, task: Task) -> None:
    """Say how good an adopted network is on this task: one that sees other inputs than it learnt from guesses."""
    accuracy = teacher.weights.valid_accuracy
    if accuracy is None:
        return
    log.info("%s: right on %.1f %% of validation data, as it came", teacher.weights.name, 100 * accuracy)
    chance = 1 / len(task.classes)
    if not task.dense and accuracy - chance < LITTLE * (1 - chance):
        log.warning(
            "%s: that is little more than chance; look at `scale` (the mean and std that it was trained with), at the "
            "order of its classes (edgekd sorts their names) and at the size of the images",
            teacher.weights.name,
        )


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
    return serialization.load(PhaseRecord, json.loads((slot / "phase.json").read_text()))
