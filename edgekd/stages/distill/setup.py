"""The training plan and context of a network, and a dry run that raises errors of a method before any training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.core.augment import Augment
from edgekd.core.dataset import PreparedDataset, SplitArrays
from edgekd.core.method import Method, TrainingContext
from edgekd.core.model import Model
from edgekd.core.splits import sample_per_class
from edgekd.core.target import TargetProbe
from edgekd.core.task import OutputSpec, Task, output_tensors
from edgekd.errors import ConfigError, DataError
from edgekd.training.dataloader import ArrayLoader
from edgekd.training.trained_model import build_network
from edgekd.training.trainer import TrainConfig, Trainer, freeze, to_device
from edgekd.utils.external import external_code


@dataclass(frozen=True)
class TrainingPlan:
    """How a network is trained, whatever the method."""

    epochs: int
    train: TrainConfig
    augment: Augment
    seed: int
    labels_per_class: int | None = (
        None  # use that many training images of each class; None: all; in all where images have no class
    )
    unlabelled: int = 0  # of the other training images, mixed in without their labels
    labelled_fraction: float = 0.0  # of an epoch: labelled images are repeated up to it
    train_on_validation: bool = False  # train on the validation split, too

    def labelled(self, num_strata: int) -> TrainingPlan:
        """Return a plan with as many images, all labelled; `num_strata` classes have `labels_per_class` labels each."""
        if not self.unlabelled or self.labels_per_class is None:
            return self
        images = self.labels_per_class * num_strata
        epochs = round(self.epochs * (labelled_per_epoch(images, self) + self.unlabelled) / images)
        return replace(self, epochs=epochs, unlabelled=0, labelled_fraction=0.0)


def labelled_per_epoch(labelled: int, plan: TrainingPlan) -> int:
    """Labelled images of an epoch: all, again where they are to have a greater share."""
    return max(labelled, round(plan.labelled_fraction / (1 - plan.labelled_fraction) * plan.unlabelled))


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run: the first phase of the method."""

    phase: str


def dry_run(
    out: Path,
    dataset: PreparedDataset,
    model: Model,
    method: Method,
    plan: TrainingPlan,
    teacher_specs: tuple[tuple[Model, tuple[str, ...]], ...],
    probe: TargetProbe | None,
) -> DryRun:
    """Run `method` up to its first phase with untrained networks, so that its errors are raised before any training.

    `teacher_specs` are model and classes of each teacher. Raises what `distill` would raise after hours.
    """
    trainer = build_trainer(dataset, plan, torch.device("cpu"))
    trainer.reseed(-1)
    modules = (build_network(family, len(classes), dataset.shape[0]) for family, classes in teacher_specs)
    ctx = build_context(dataset, model, modules, [classes for _, classes in teacher_specs], trainer, plan.epochs)
    if probe:
        price = partial(probe.latency_ms, out / "price") if probe.can_measure() else None
        draft = partial(probe.quant_spec, out / "draft") if probe.has_int8() else None
        ctx = replace(ctx, latency_ms=price, quant_spec=draft)
    freeze(ctx)
    phase = next(method.phases(ctx), None)
    return DryRun(phase.name if phase else "")


def build_context(
    dataset: PreparedDataset,
    model: Model,
    teachers: Iterable[nn.Module],
    teacher_classes: Sequence[tuple[str, ...]],
    trainer: Trainer,
    epochs: int,
) -> TrainingContext:
    """Return a context on the trainer's device. Raise ConfigError if a network's outputs do not fit its classes."""

    def build(family: Model) -> nn.Module:
        return moved_to(build_network(family, len(dataset.classes), dataset.shape[0]), trainer.device)

    ctx = TrainingContext(
        student=build(model),
        teachers=tuple(moved_to(t, trainer.device) for t in teachers),
        epochs=epochs,
        num_classes=len(dataset.classes),
        first_batches=trainer.first_batches,
        task=dataset.task,
        class_columns=class_columns(dataset.classes, teacher_classes),
        build=build,
    )
    check_outputs(ctx, dataset, [len(classes) for classes in teacher_classes])
    return ctx


def class_columns(
    classes: tuple[str, ...], teacher_classes: Sequence[tuple[str, ...]]
) -> tuple[tuple[int | None, ...], ...]:
    """Return by teacher its column for each class, None if it lacks the class; () if all have just these classes."""
    if all(names == classes for names in teacher_classes):
        return ()
    return tuple(tuple(names.index(c) if c in names else None for c in classes) for names in teacher_classes)


def build_trainer(dataset: PreparedDataset, plan: TrainingPlan, device: torch.device) -> Trainer:
    """Return a trainer with the images of a plan."""
    train, valid = dataset.train.load(), dataset.valid.load()
    if plan.labels_per_class is not None:
        train = select_images(train, plan, dataset.task)
    if plan.train_on_validation:
        train = SplitArrays(np.concatenate([train.images, valid.images]), np.concatenate([train.labels, valid.labels]))
    loaders = ArrayLoader(train, dataset, plan.augment, device), ArrayLoader(valid, dataset, Augment(), device)
    return Trainer(*loaders, plan.train, plan.seed, device)


def select_images(train: SplitArrays, plan: TrainingPlan, task: Task) -> SplitArrays:
    """Return the labelled images of a plan, then the unlabelled ones, without their labels."""
    assert plan.labels_per_class is not None
    chosen = sample_per_class(task.strata(train.labels), plan.labels_per_class, plan.seed)
    rest = np.setdiff1d(np.arange(len(train.labels)), chosen)
    mixed = np.random.default_rng(plan.seed).permutation(rest)[: plan.unlabelled]
    if len(mixed) < plan.unlabelled:
        raise DataError(
            f"unlabelled is {plan.unlabelled}, but only {len(mixed)} training images are left beside the labelled",
            hint=f"use {len(mixed)} or fewer",
        )
    hidden = task.hide_targets(train.labels[mixed])
    repeated = np.resize(chosen, labelled_per_epoch(len(chosen), plan))  # from the first on again
    return SplitArrays(train.images[np.r_[repeated, mixed]], np.concatenate([train.labels[repeated], hidden]))


def moved_to(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device, and return it."""
    to_device(module, device)
    return module


def check_outputs(ctx: TrainingContext, dataset: PreparedDataset, classes: list[int]) -> None:
    """Check the outputs of the student for the classes of the data set, and of each teacher for so many classes."""
    x = next(ctx.first_batches(1)).images[:2]
    check_output("student", ctx.student, x, dataset.outputs())
    for module, count in zip(ctx.teachers, classes, strict=True):
        check_output("teacher", module, x, dataset.outputs(count))


@torch.no_grad()
def check_output(role: str, module: nn.Module, x: Tensor, specs: tuple[OutputSpec, ...]) -> nn.Module:
    """Return the module. Raise ConfigError unless its outputs have the shapes of the specifications."""
    with external_code(
        f"the {role} does not take images of shape {tuple(x.shape)}", "check its input channels, and data.size"
    ):
        outputs = module.eval()(x)
    shapes = [getattr(tensor, "shape", type(tensor).__name__) for tensor in output_tensors(outputs)]
    if shapes != [(len(x), *spec.shape) for spec in specs]:
        actual = " and ".join(str(tuple(s) if isinstance(s, torch.Size) else s) for s in shapes)
        expected = " and ".join(f"(N, {', '.join(map(str, spec.shape))})" for spec in specs)
        raise ConfigError(
            f"the {role} returns {actual} for {len(x)} images; its data needs {expected}",
            hint=f"use a {role} with outputs of shape {expected}; for a teacher of other classes set its "
            "`num_classes`, or its `data`",
        )
    return module
