"""What a build can be told: the whole configuration, read strictly, and its smoke version."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from edgekd.core import plugins, serialization
from edgekd.core.config_file import read
from edgekd.core.dataset import Scale, Source
from edgekd.core.gate import Gate
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.settings import Settings
from edgekd.core.step_cache import plugins_in
from edgekd.core.target import Target
from edgekd.errors import ConfigError
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.device.bundle import BundleConfig
from edgekd.stages.export.export import ExportConfig
from edgekd.stages.quantize.calibration_set import CalibConfig
from edgekd.stages.quantize.preparation import check_learnt, dialect_for
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.training.trainer import TrainConfig

log = logging.getLogger(__name__)
SMOKE_METRICS = ("top1", "agreement", "delta1", "rmse", "p50_ms")


def at_least(least: int, **values: int | None) -> None:
    """Raises ConfigError for a value below `least`; None is no value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}", hint=f"use {least} or more")


@dataclass(frozen=True)
class TeacherConfig(Settings):
    model: Model
    checkpoint: str = ""  # its weights; empty: it is trained in the build
    trust: bool = False  # read a checkpoint that may run code
    epochs: int = 30
    train: TrainConfig = TrainConfig()
    seed: int = 0
    with_validation: bool = False  # learn from the validation split, too
    data: Source | None = None  # what it learnt from; None: the student's data
    outputs: int | None = None  # of a checkpoint: it answers for so many classes, none of which the data has

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, outputs=self.outputs)
        at_least(0, seed=self.seed)
        if self.outputs and (self.data or not self.checkpoint):
            raise ConfigError("outputs is for a checkpoint without its data", hint="leave out `outputs`")


@dataclass(frozen=True)
class StudentConfig(Settings):
    model: Model
    method: Method
    baselines: tuple[Method, ...] = ()  # the same student taught otherwise; `supervised` is always there
    epochs: int = 40
    train: TrainConfig = TrainConfig()
    seed: int = 0
    labels_per_class: int | None = None  # labelled training images of each class (of a dense task: in all); None: all
    unlabelled: int = 0  # of the other training images, mixed in without their labels
    labelled_share: float = 0.0  # of an epoch, where there are unlabelled images: labelled ones are repeated up to it

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, labels_per_class=self.labels_per_class)
        at_least(0, seed=self.seed, unlabelled=self.unlabelled)
        if not 0 <= self.labelled_share < 1:
            raise ConfigError(f"labelled_share is {self.labelled_share}", hint="use a share from 0 to below 1")
        if self.unlabelled and self.labels_per_class is None:
            raise ConfigError(
                f"unlabelled is {self.unlabelled}, but all images are labelled", hint="set labels_per_class"
            )


@dataclass(frozen=True)
class Rival(Settings):
    """A contender under a name of its own: another network, or a method with other settings."""

    name: str
    method: Method
    model: Model | None = None  # None: the student's

    def __post_init__(self) -> None:
        if not self.name.strip() or "/" in self.name:
            raise ConfigError(f"name is `{self.name}`", hint="use words without a slash")


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Who is compared with whom by `edgekd compare`; all with the student's budget, labels and data."""

    methods: tuple[Method, ...] | None = None  # that teach the student; null: the student's method and its baselines
    rivals: tuple[Rival, ...] = ()
    baseline: str = ""  # the contender that differences are paired with; empty: `kd`, or the first
    seeds: int = 3  # from student.seed on
    int8: bool = False  # every student has a second row, `NAME int8`: its INT8 file for the first target

    def __post_init__(self) -> None:
        at_least(1, seeds=self.seeds)


@dataclass(frozen=True)
class BuildConfig(Settings):
    name: str
    data: Source
    teacher: TeacherConfig
    student: StudentConfig
    targets: tuple[Target, ...]
    export: ExportConfig = ExportConfig()
    calib: CalibConfig = CalibConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    bench: BenchConfig = BenchConfig()
    bundle: BundleConfig = BundleConfig()
    gates: tuple[Gate, ...] = ()  # what ships must reach, or the build fails
    compare: CompareConfig = CompareConfig()
    more_teachers: tuple[TeacherConfig, ...] = ()  # for methods that learn from several
    scale: Scale | None = None  # of the inputs, where a checkpoint demands it; None: that of the (teacher's) images
    images_per_class: int | None = None  # of each of training and test data; None: all

    def __post_init__(self) -> None:
        at_least(2, images_per_class=self.images_per_class)
        if Path(self.name).name != self.name:
            raise ConfigError(f"name is `{self.name}`", hint="use words that can name a folder")
        if not self.targets:
            raise ConfigError("targets is empty", hint="name one, such as `- {use: cpu}`")
        for target in self.targets:
            if "int8" in target.delivery.engines:
                dialect_for(target.dialect, self.quantize)  # this and the next raise before any training
        taught = plugins_in((self.student.method, *self.student.baselines, *(self.compare.methods or ())))
        if any(isinstance(plugin, Method) and plugin.LEARNS_RANGES for plugin in taught):
            check_learnt(self.quantize)


def smoke(config: BuildConfig) -> BuildConfig:
    """The same build in seconds: few images, few epochs, few timed calls. Its numbers mean nothing."""
    if config.gates:
        log.warning("--smoke leaves the gates out: its numbers mean nothing")
    return replace(
        config,
        name=f"{config.name}-smoke",
        images_per_class=20,
        teacher=replace(config.teacher, epochs=2),
        more_teachers=tuple(replace(t, epochs=2) for t in config.more_teachers),
        student=replace(config.student, epochs=4, labels_per_class=None, unlabelled=0),
        calib=replace(config.calib, images=16),
        quantize=replace(config.quantize, max_drop=None),
        bench=replace(config.bench, blocks=4, calls=16, warmup_s=0.05, metrics=SMOKE_METRICS),
        bundle=BundleConfig(images=64, checked=32),
        gates=(),
        compare=replace(config.compare, seeds=min(config.compare.seeds, 2)),
    )


def configured(recipe: str, overrides: tuple[str, ...], targets: tuple[str, ...], small: bool) -> BuildConfig:
    """The configuration that a recipe or file describes. Raises ConfigError with every mistake at once."""
    config = serialization.load(BuildConfig, read(recipe, overrides))
    if targets:
        settings = {plugins.name_of(target): target for target in config.targets}
        config = replace(config, targets=tuple(settings.get(t) or plugins.load("targets", t)() for t in targets))
    unique((config.student.method, *config.student.baselines))
    return smoke(config) if small else config


def on_device(config: BuildConfig, **said: Any) -> BuildConfig:
    """With what a command line said of the device (None: nothing), in every target that has such settings.

    Raises ConfigError if none has, or if a target refuses it.
    """
    given = {name: value for name, value in said.items() if value is not None}
    fitting = [t for t in config.targets if given.keys() <= {field.name for field in fields(t)}]
    if given and not fitting:
        raise ConfigError(
            f"no target has the setting {', '.join(given)}", hint="name a Jetson: --target jetson; or leave it out"
        )
    return replace(config, targets=tuple(replace(t, **given) if t in fitting else t for t in config.targets))


def unique(methods: Iterable[Method]) -> list[Method]:
    """Each once. Raises ConfigError if one is there with different settings: they could not be told apart."""
    first: dict[str, Method] = {}
    for method in methods:
        name = plugins.name_of(method)
        if first.setdefault(name, method) != method:
            raise ConfigError(f"student: `{name}` is there twice, with different settings", hint="build in two runs")
    return list(first.values())
