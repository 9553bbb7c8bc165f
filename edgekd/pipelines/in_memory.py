"""Distil live networks with data in memory; files are written to a temporary folder only."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset

from edgekd.core import plugins
from edgekd.core.artifact import File, Weights
from edgekd.core.augment import Augment
from edgekd.core.dataset import Normalization, PreparedDataset, SplitArrays
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.splits import stratified_split
from edgekd.core.task import Task, task_named
from edgekd.errors import ConfigError, DataError
from edgekd.methods.kd import KD
from edgekd.methods.supervised import Supervised
from edgekd.stages.distill.dataset import measure_normalization, write_split
from edgekd.stages.distill.distill import distill
from edgekd.stages.distill.setup import TrainingPlan
from edgekd.training import checkpoint
from edgekd.training.trained_model import TrainedModel
from edgekd.training.trainer import TrainConfig
from edgekd.utils.external import external_code

VALID_FRACTION = 0.1  # of the training data, where no validation data are given
UNSCALED = 1 / 255  # as a deviation: inputs that are floats already stay as they are


@dataclass(frozen=True)
class LiveModel(Model):
    """A network that exists already, with its weights."""

    network: nn.Module

    def build(self, classes: int, channels: int) -> nn.Module:
        return deepcopy(self.network)


def distill_in_memory(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    train: Any,
    valid: Any,
    method: Method | None,
    epochs: int,
    config: TrainConfig | None,
    augment: Augment | None,
) -> tuple[tuple[TrainedModel, ...], dict[str, nn.Module]]:
    """Return the trained students with their records, and as networks by name; see `edgekd.distill`."""
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}", hint="use 1 or more")
    training = to_arrays(train, "train")
    validation = None if valid is None else to_arrays(valid, "valid")
    task = find_task(training)
    if validation is None:
        training, validation = hold_out(training, task)
    outputs = count_outputs(student, training)
    classes = tuple(str(number) for number in range(outputs))
    method = method or (KD() if teachers else Supervised())
    plan = TrainingPlan(epochs, config or TrainConfig(), augment or Augment(), seed=0)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        for name in ("data", "teachers", "students"):
            Path(folder, name).mkdir()
        dataset = save_dataset(Path(folder, "data"), training, validation, classes, task)
        saved = tuple(
            save_teacher(Path(folder, "teachers", f"{number}.safetensors"), network, classes, dataset.shape[0])
            for number, network in enumerate(teachers)
        )
        name = plugins.name_of(method)
        students = Path(folder, "students")
        trained = distill(students, name, dataset, LiveModel(student), method, plan, saved)
        return trained, {t.weights.name: t.network() for t in trained}


def to_arrays(samples: Any, name: str) -> SplitArrays:
    """Return images as (N, H, W, C), uint8 or float32, and their targets.

    Args:
        samples: a pair of arrays, or a torch Dataset of pairs.
        name: of the argument, for messages.
    """
    if isinstance(samples, TorchDataset):
        with external_code(f"`{name}` cannot be read", "give a torch Dataset of pairs: an image and its target"):
            pairs = [samples[index] for index in range(len(samples))]  # type: ignore[arg-type]
            images = np.stack([np.asarray(image) for image, _ in pairs])
            targets = np.stack([np.asarray(target) for _, target in pairs])
    else:
        images, targets = (np.asarray(array) for array in samples)
    if images.ndim != 4 or len(images) != len(targets):
        raise DataError(
            f"`{name}` has images of shape {images.shape} and targets of shape {targets.shape}",
            hint="give as many targets as images: (N, C, H, W) float32, or (N, H, W, C) uint8",
        )
    if images.dtype != np.uint8:
        images = images.astype(np.float32).transpose(0, 2, 3, 1)
    is_class = np.issubdtype(targets.dtype, np.integer)
    return SplitArrays(np.ascontiguousarray(images), targets.astype(np.int64 if is_class else np.float32))


def find_task(arrays: SplitArrays) -> Task:
    """Return the task whose targets these are."""
    problems = []
    for name in plugins.names("tasks"):
        task = task_named(name)
        values = () if arrays.labels.ndim < 2 else ("",) * arrays.labels.shape[1]  # any class may lack images
        try:
            task.check_targets("train", arrays.labels, arrays.images, values)
        except DataError as error:
            problems.append(error)
        else:
            return task
    raise problems[0]


def hold_out(arrays: SplitArrays, task: Task) -> tuple[SplitArrays, SplitArrays]:
    """Return training and validation data: a part of the samples, every class with its fraction."""
    count = max(1, round(VALID_FRACTION * len(arrays.labels)))
    held, kept = stratified_split(task.strata(arrays.labels), count, seed=0)
    parts = [SplitArrays(arrays.images[index], arrays.labels[index]) for index in (kept, held)]
    return parts[0], parts[1]


def count_outputs(student: nn.Module, arrays: SplitArrays) -> int:
    """Return the classes, or the maps, that a network answers with."""
    images = torch.from_numpy(arrays.images[:2]).permute(0, 3, 1, 2).float()
    network = deepcopy(student).cpu().eval()
    shape = tuple(images.shape)
    with external_code(f"the student does not take images of shape {shape}", "check its input"), torch.no_grad():
        return int(network(images).shape[1])


def save_dataset(
    out: Path, train: SplitArrays, valid: SplitArrays, classes: tuple[str, ...], task: Task
) -> PreparedDataset:
    """Return the data as the stages read them; inputs that are floats already stay as they are."""
    height, width, channels = train.images.shape[1:]
    if valid.images.shape[1:] != train.images.shape[1:] or valid.images.dtype != train.images.dtype:
        raise DataError("`valid` has other images than `train`", hint="give both the same size, channels and type")
    normalize = Normalization((0.0,) * channels, (UNSCALED,) * channels)
    if train.images.dtype == np.uint8:
        normalize = measure_normalization(train.images)
    splits = {"train": write_split(out, "train", train), "valid": write_split(out, "valid", valid)}
    shape, scale = (channels, height, width), (normalize.mean, normalize.std)
    return PreparedDataset(splits["train"], splits["valid"], splits["valid"], classes, shape, *scale, task)


def save_teacher(path: Path, network: nn.Module, classes: tuple[str, ...], channels: int) -> TrainedModel:
    """Return a live network as a trained one, its weights in a file."""
    checkpoint.save(network, path)
    parameters = sum(p.numel() for p in network.parameters())
    weights = Weights(File.of(path), path.stem, "", parameters, valid_accuracy=None, seconds=0.0)
    return TrainedModel(LiveModel(network), weights, classes, channels)
