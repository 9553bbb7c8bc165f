"""BuildConfig: everything that a build can be told, and its smoke version."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from edgekd.core import plugins, serialization
from edgekd.core.config_file import ConfigSource, read_config
from edgekd.core.dataset import Dataset, Normalization
from edgekd.core.gate import Gate
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.settings import Plugin, Settings
from edgekd.core.step_cache import instances_in
from edgekd.core.target import Target
from edgekd.core.task import Task
from edgekd.errors import ConfigError
from edgekd.stages.bench.config import BenchConfig, task_metrics
from edgekd.stages.device.bundle import BundleConfig
from edgekd.stages.export.export import ExportConfig
from edgekd.stages.quantize.calibration_set import CalibrationConfig
from edgekd.stages.quantize.preparation import check_learned_ranges, scheme_for
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.training.trainer import TrainConfig

log = logging.getLogger(__name__)


def check_at_least(minimum: int, **values: int | None) -> None:
    """Raise ConfigError for a value below `minimum`; None is no value."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"{name} is {value}", hint=f"use {minimum} or more")


@dataclass(frozen=True)
class TeacherConfig(Settings):
    """A network that students learn from: from a checkpoint, or trained in the build."""

    model: Model
    checkpoint: str = ""
    """File with its weights; empty: it is trained in the build."""
    allow_pickle: bool = False
    """Read a checkpoint that may run code."""
    epochs: int = 30
    train: TrainConfig = TrainConfig()
    seed: int = 0
    train_on_validation: bool = False
    """Train on the validation split, too."""
    data: Dataset | None = None
    """What it is trained on; None: the student's data."""
    num_classes: int | None = None
    """Of a checkpoint: the number of its classes, where these are not the student's."""

    def __post_init__(self) -> None:
        check_at_least(1, epochs=self.epochs, num_classes=self.num_classes)
        check_at_least(0, seed=self.seed)
        if self.num_classes and (self.data or not self.checkpoint):
            raise ConfigError("num_classes is for a checkpoint without its data", hint="leave out `num_classes`")


@dataclass(frozen=True)
class StudentConfig(Settings):
    """The network to deploy, the method that trains it, and the labels that it may use."""

    model: Model
    method: Method
    baselines: tuple[Method, ...] = ()
    """Other methods to compare with; `supervised` is always one of them."""
    epochs: int = 40
    train: TrainConfig = TrainConfig()
    seed: int = 0
    labels_per_class: int | None = None
    """Labelled training images of each class; in all, where images have no class. None: all."""
    unlabelled: int = 0
    """Further training images, used without their labels."""
    labelled_fraction: float = 0.0
    """Of the images of an epoch, where some are unlabelled: labelled images are repeated up to it."""

    def __post_init__(self) -> None:
        check_at_least(1, epochs=self.epochs, labels_per_class=self.labels_per_class)
        check_at_least(0, seed=self.seed, unlabelled=self.unlabelled)
        if not 0 <= self.labelled_fraction < 1:
            raise ConfigError(f"labelled_fraction is {self.labelled_fraction}", hint="use a fraction from 0 to below 1")
        if self.unlabelled and self.labels_per_class is None:
            raise ConfigError(
                f"unlabelled is {self.unlabelled}, but all images are labelled", hint="set labels_per_class"
            )


@dataclass(frozen=True)
class Variant(Settings):
    """An entry of a comparison with a name of its own: another network, or a method with other settings."""

    name: str
    method: Method
    model: Model | None = None
    """None: the student's."""

    def __post_init__(self) -> None:
        if not self.name.strip() or "/" in self.name:
            raise ConfigError(f"name is `{self.name}`", hint="use words without a slash")


@dataclass(frozen=True)
class CompareConfig(Settings):
    """What `edgekd compare` compares; every entry has the student's epochs, labels and data."""

    methods: tuple[Method, ...] | None = None
    """Methods that train the student; None: the student's method and its baselines."""
    variants: tuple[Variant, ...] = ()
    baseline: str = ""
    """The entry that the others are compared with; empty: `kd`, or the first."""
    seeds: int = 3
    """Number of seeds, from student.seed on."""
    int8: bool = False
    """Also evaluate the INT8 file of every student for the first target, in a row `NAME int8`."""

    def __post_init__(self) -> None:
        check_at_least(1, seeds=self.seeds)


@dataclass(frozen=True)
class BuildConfig(Settings):
    """Everything that a build can be told."""

    name: str
    """Of the folder of the build, and in the report."""
    data: Dataset
    teacher: TeacherConfig
    student: StudentConfig
    targets: tuple[Target, ...]
    task: Task | None = None
    """What is learnt; None: what the data set says."""
    export: ExportConfig = ExportConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    bench: BenchConfig = BenchConfig()
    bundle: BundleConfig = BundleConfig()
    gates: tuple[Gate, ...] = ()
    """Limits for the selected file; a build fails if one is not kept."""
    compare: CompareConfig = CompareConfig()
    extra_teachers: tuple[TeacherConfig, ...] = ()
    """For methods that learn from several."""
    normalize: Normalization | None = None
    """Mean and deviation that inputs are normalized with, as a checkpoint may need; None: those of the images."""
    images_per_class: int | None = None
    """Of each of training and test data; None: all."""

    def __post_init__(self) -> None:
        check_at_least(2, images_per_class=self.images_per_class)
        if Path(self.name).name != self.name:
            raise ConfigError(f"name is `{self.name}`", hint="use words that can name a folder")
        if not self.targets:
            raise ConfigError("targets is empty", hint="name one, such as `- {use: cpu}`")
        for target in self.targets:
            if "int8" in target.deployment_plan.engines:
                scheme_for(target.scheme, self.quantize)  # this and the next raise before any training
        methods = instances_in((self.student.method, *self.student.baselines, *(self.compare.methods or ())), Plugin)
        if any(isinstance(method, Method) and method.LEARNS_RANGES for method in methods):
            check_learned_ranges(self.quantize)


def smoke(config: BuildConfig) -> BuildConfig:
    """Return the same build in seconds: few images, epochs and timed calls. Its numbers mean nothing."""
    if config.gates:
        log.warning("--smoke leaves the gates out: its numbers mean nothing")
    return replace(
        config,
        name=f"{config.name}-smoke",
        images_per_class=20,
        teacher=replace(config.teacher, epochs=2),
        extra_teachers=tuple(replace(t, epochs=2) for t in config.extra_teachers),
        student=replace(config.student, epochs=4, labels_per_class=None, unlabelled=0),
        calibration=replace(config.calibration, images=16),
        quantize=replace(config.quantize, max_drop=None),
        bench=replace(config.bench, rounds=4, calls_per_round=16, warmup_s=0.05, metrics=(*task_metrics(), "p50_ms")),
        bundle=BundleConfig(images=64, verify_images=32),
        gates=(),
        compare=replace(config.compare, seeds=min(config.compare.seeds, 2)),
    )


def load_source(source: ConfigSource) -> BuildConfig:
    """Return the configuration that a user asks for. Raise ConfigError with every mistake at once."""
    config = load_config(source.source, source.overrides, source.targets, source.smoke)
    return with_device_settings(config, jetpack=source.jetpack, board=source.board, dla=source.dla)


def load_config(recipe: str, overrides: tuple[str, ...], targets: tuple[str, ...], small: bool) -> BuildConfig:
    """Return the configuration in a recipe or file. Raise ConfigError with every mistake at once."""
    config = serialization.from_json(BuildConfig, read_config(recipe, overrides))
    if targets:
        settings = {plugins.name_of(target): target for target in config.targets}
        config = replace(config, targets=tuple(settings.get(t) or plugins.load("targets", t)() for t in targets))
    unique_methods((config.student.method, *config.student.baselines))
    return smoke(config) if small else config


def with_device_settings(config: BuildConfig, **settings: Any) -> BuildConfig:
    """Return the configuration with settings of the device (None: not set), in every target that has them.

    Raises:
        ConfigError: if no target has them, or a target refuses a value.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    matching = [t for t in config.targets if settings.keys() <= {field.name for field in fields(t)}]
    if settings and not matching:
        raise ConfigError(
            f"no target has the setting {', '.join(settings)}", hint="name a Jetson: --target jetson; or leave it out"
        )
    return replace(config, targets=tuple(replace(t, **settings) if t in matching else t for t in config.targets))


def unique_methods(methods: Iterable[Method]) -> list[Method]:
    """Return each method once. Raise ConfigError if one is there with different settings: its name is not enough."""
    first: dict[str, Method] = {}
    for method in methods:
        name = plugins.name_of(method)
        if first.setdefault(name, method) != method:
            raise ConfigError(f"student: `{name}` is there twice, with different settings", hint="build in two runs")
    return list(first.values())
