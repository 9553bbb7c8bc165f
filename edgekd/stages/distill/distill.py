"""Stage 2: train a network by running the phases of a method; every finished phase is saved."""

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
from edgekd.core.artifact import File, LearnedRange, PhaseRecord, Weights
from edgekd.core.augment import Augment
from edgekd.core.dataset import PreparedDataset
from edgekd.core.method import Method, Phase, PhaseResult, TrainingContext, run_phases
from edgekd.core.model import Model
from edgekd.core.step_cache import WORK_DIR
from edgekd.core.target import TargetProbe
from edgekd.stages.distill.setup import TrainingPlan, build_context, build_trainer, check_output
from edgekd.training import checkpoint as checkpoint_module
from edgekd.training.architecture_diff import diff_architectures
from edgekd.training.trained_model import TrainedModel, build_network
from edgekd.training.trainer import TrainConfig, Trainer, freeze, save_atomic
from edgekd.utils.progress import progress_bar

log = logging.getLogger(__name__)
NEAR_CHANCE = 0.2  # of the range from chance to 100 %: accuracy below it looks like a mistake


def distill(
    out: Path,
    name: str,
    dataset: PreparedDataset,
    model: Model,
    method: Method,
    plan: TrainingPlan,
    teachers: tuple[TrainedModel, ...],
    probe: TargetProbe | None = None,
) -> tuple[TrainedModel, ...]:
    """Train `model` by `method`. Phases that are saved in `out` are loaded, not trained again.

    Args:
        out: folder of the step.
        name: of the student, and of its file.
        dataset: to train and validate with.
        model: of the student.
        method: that trains it.
        plan: budget, optimiser, augmentation, labels.
        teachers: of the method, in order.
        probe: of the first target, for methods that need it.

    Returns:
        One network for most methods, several for methods that train a family.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = build_trainer(dataset, plan, device)
    trainer.reseed(-1)

    networks = (t.network() for t in teachers)
    choices: dict[str, Any] = {}
    ranges: dict[str, tuple[LearnedRange, ...]] = {}
    ctx = replace(
        build_context(dataset, model, networks, [t.classes for t in teachers], trainer, plan.epochs),
        latency_ms=cache_latencies(probe, out / WORK_DIR) if probe and probe.can_measure() else None,
        log_choice=choices.__setitem__,
        quant_spec=partial(probe.quant_spec, out / WORK_DIR / "draft") if probe and probe.has_int8() else None,
        save_ranges=ranges.__setitem__,
    )
    freeze(ctx)
    runner = PhaseRunner(out / WORK_DIR, trainer, ctx, name)
    with runner.progress():
        students = run_phases(method.phases(ctx), runner.run)
    fresh = build_network(model, len(dataset.classes), dataset.shape[0])
    trained = []
    for key, module in students.items():
        student_name = name if key == "student" else f"{name}-{key}"
        path = out / f"{student_name}.safetensors"
        checkpoint_module.save(module, path)
        weights = Weights(
            file=File.of(path),
            name=student_name,
            method=plugins.name_of(method),
            parameters=sum(p.numel() for p in module.parameters()),
            valid_accuracy=None if plan.train_on_validation else trainer.accuracy(module),
            seconds=round(sum(record.seconds for record in runner.records), 3),
            phases=tuple(runner.records),
            notes=choices or None,
            ranges=ranges.get(key, ()),
        )
        trained.append(
            TrainedModel(model, weights, dataset.classes, dataset.shape[0], diff_architectures(fresh, module))
        )
    return tuple(trained)


def cache_latencies(probe: TargetProbe, home: Path) -> Callable[[nn.Module], float]:
    """Return `probe.latency_ms`, cached by the number of the call: a method that resumes must get the same values."""
    numbers = itertools.count()

    def latency_ms(module: nn.Module) -> float:
        slot = home / f"price-{next(numbers)}.json"
        if not slot.exists():
            home.mkdir(parents=True, exist_ok=True)
            ms = probe.latency_ms(home / "price", module)
            partial = slot.with_suffix(".partial")
            partial.write_text(json.dumps(ms))
            partial.rename(slot)
        return float(json.loads(slot.read_text()))

    return latency_ms


def load_pretrained(
    out: Path,
    name: str,
    dataset: PreparedDataset,
    model: Model,
    checkpoint: File,
    allow_pickle: bool,
    num_classes: int | None = None,
) -> TrainedModel:
    """Load a network from a checkpoint.

    Args:
        num_classes: of the network, if they are not those of the data set.

    Raises:
        CheckpointError: if the weights do not fit.
    """
    classes = dataset.classes if num_classes is None else ("",) * num_classes
    module = build_network(model, len(classes), dataset.shape[0])
    checkpoint_module.load(module, checkpoint.path, allow_pickle)
    plan = TrainingPlan(epochs=1, train=TrainConfig(), augment=Augment(), seed=0)
    trainer = build_trainer(dataset, plan, torch.device("cpu"))
    path = out / f"{name}.safetensors"
    checkpoint_module.save(module, path)
    count = sum(p.numel() for p in module.parameters())
    accuracy = None
    if not num_classes:
        x = next(trainer.first_batches(1)).images[:2]
        accuracy = trainer.accuracy(check_output(name, module, x, dataset.outputs()))
    return TrainedModel(model, Weights(File.of(path), name, "", count, accuracy, 0.0), classes, dataset.shape[0])


def log_teacher_accuracy(teacher: TrainedModel, dataset: PreparedDataset) -> None:
    """Log a pretrained teacher's validation accuracy; warn if it is near chance (usually a normalization mismatch)."""
    accuracy = teacher.weights.valid_accuracy
    if accuracy is None:
        return
    log.info("%s: %.1f %% validation accuracy (pretrained)", teacher.weights.name, 100 * accuracy)
    chance = dataset.task.chance(len(dataset.classes))
    if chance is not None and accuracy - chance < NEAR_CHANCE * (1 - chance):
        log.warning(
            "%s: this is near chance; check `normalize` (the mean and std that it was trained with), the order of its "
            "classes (edgekd sorts their names) and the size of the images",
            teacher.weights.name,
        )


class PhaseRunner:
    """Runs the phases of a method, in order; a phase that is saved in `home` is loaded."""

    def __init__(self, home: Path, trainer: Trainer, ctx: TrainingContext, name: str) -> None:
        self.home, self.trainer, self.ctx, self.name = home, trainer, ctx, name
        self.records: list[PhaseRecord] = []
        self.numbers = itertools.count()

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show a progress bar over the epochs."""
        with progress_bar(f"{self.name}: epochs", self.ctx.epochs) as self.advance:
            yield

    def run(self, phase: Phase) -> PhaseResult:
        """Train a phase, or load it, and return its result."""
        number = next(self.numbers)
        slot = self.home / f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', phase.name.lower())}"
        record = load_phase(slot, phase)
        if record is None:
            slot.mkdir(parents=True, exist_ok=True)
            result, curve = self.trainer.run(phase, self.ctx, 2 * number, slot / "epoch.pt", self.advance)
            seconds = round(sum(epoch.seconds for epoch in curve), 3)
            record = PhaseRecord(phase.name, phase.epochs, result.losses, result.accuracy, seconds, curve)
            save_phase(slot, phase, record)
        else:
            self.advance(phase.epochs)
        self.records.append(record)
        self.trainer.reseed(2 * number + 1)  # random numbers that the method draws next are the same after a resume
        return PhaseResult(dict(record.losses), record.accuracy)


def save_phase(slot: Path, phase: Phase, record: PhaseRecord) -> None:
    """Save the modules and the record of a finished phase."""
    save_atomic(slot / "trains.pt", [m.state_dict() for m in phase.trains])
    partial = slot / "phase.json.partial"
    partial.write_text(json.dumps(asdict(record)))
    partial.rename(slot / "phase.json")  # last: it marks the slot as complete
    (slot / "epoch.pt").unlink(missing_ok=True)


def load_phase(slot: Path, phase: Phase) -> PhaseRecord | None:
    """Load the modules of a finished phase and return its record; None if it is not finished."""
    if not (slot / "phase.json").exists():
        return None
    states = torch.load(slot / "trains.pt", weights_only=True)
    for module, state in zip(phase.trains, states, strict=True):
        module.load_state_dict(state)
        module.eval()
    return serialization.from_json(PhaseRecord, json.loads((slot / "phase.json").read_text()))
