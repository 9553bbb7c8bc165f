"""The whole build, top to bottom. Read this file first."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.core import plain, plugins
from edgekd.core.artifact import File, Precision, Weights
from edgekd.core.errors import ConfigError
from edgekd.core.ledger import Ledger
from edgekd.core.method import Method
from edgekd.core.model import Model
from edgekd.core.record import DataFacts, Record
from edgekd.core.settings import Settings
from edgekd.core.target import Target
from edgekd.core.task import Source, Task
from edgekd.core.trial import BenchResult, Contestant, Role
from edgekd.learn.trainer import TrainConfig, resolved
from edgekd.methods.alone import Alone
from edgekd.stages.benchmark import BenchConfig, benchmark
from edgekd.stages.calibrate import CalibConfig, collect
from edgekd.stages.distill import Course, Trained, adopt, distill
from edgekd.stages.export import ExportConfig, Exported, export_trained
from edgekd.stages.quantize import quantize
from edgekd.stages.report import Rendered, report

log = logging.getLogger(__name__)
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")  # whose versions a result depends on


@dataclass(frozen=True)
class TeacherConfig(Settings):
    model: Model
    checkpoint: str = ""  # its weights; empty: it is trained in the build
    trust: bool = False  # read a checkpoint that may run code
    epochs: int = 30
    train: TrainConfig = TrainConfig()
    seed: int = 0
    with_validation: bool = False  # learn from the validation split, too


@dataclass(frozen=True)
class StudentConfig(Settings):
    model: Model
    method: Method
    baselines: tuple[Method, ...] = ()  # the same student taught otherwise; `alone` is always there
    epochs: int = 40
    train: TrainConfig = TrainConfig()
    seed: int = 0
    labels_per_class: int | None = None  # labelled training images of each class; None: all


@dataclass(frozen=True)
class BuildConfig(Settings):
    name: str
    data: Source
    teacher: TeacherConfig
    student: StudentConfig
    targets: tuple[Target, ...]
    export: ExportConfig = ExportConfig()
    calib: CalibConfig = CalibConfig()
    bench: BenchConfig = field(default_factory=BenchConfig)
    images_per_class: int | None = None  # of each of training and test data; None: all


def smoke(config: BuildConfig) -> BuildConfig:
    """The same build in seconds: few images, few epochs, few timed calls. Its numbers mean nothing."""
    return replace(
        config,
        name=f"{config.name}-smoke",
        images_per_class=20,
        teacher=replace(config.teacher, epochs=2),
        student=replace(config.student, epochs=4, labels_per_class=None),
        calib=replace(config.calib, images=16),
        bench=replace(config.bench, blocks=4, calls=16, warmup_s=0.05, metrics=("top1", "agreement", "p50_ms")),
    )


def build(config: BuildConfig, out: Path, calib_root: Path, command: str) -> Record:
    """From a teacher to a measured INT8 student on every target; what did not change is not made again.

    The report is written to `out`, the calibration set to `calib_root`. Raises EdgekdError.
    """
    ledger = Ledger(out / "steps")
    with ledger.locked():
        task = ledger.step("data", Task, prepare_task, config.data, config.images_per_class)
        teacher = teach(ledger, config, task)
        families = [
            ledger.step(
                f"distill-{plugins.name_of(method)}",
                tuple[Trained, ...],
                distill,
                plugins.name_of(method),
                task,
                config.student.model,
                method,
                student_course(config),
                (teacher,),
            )
            for method in methods(config.student)
        ]
    ...
