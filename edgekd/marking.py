"""Marks of a comparison's students on the test images: as networks in torch, and as INT8 files of the first target."""

from __future__ import annotations

from edgekd.configuration import BuildConfig
from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.errors import ConfigError
from edgekd.core.ledger import Ledger, code
from edgekd.core.target import Target
from edgekd.core.task import Task
from edgekd.delivery import export_all, named
from edgekd.quantization import Material, quantized, readable
from edgekd.stages.quantize.calibrate import CalibrationSet
from edgekd.stages.training.distill import Trained
from edgekd.stages.training.grade import Graded, grade, grade_file
from edgekd.stages.training.prepare import exam

INT8 = " int8"  # ends the name of a row that is of an INT8 file


def graded(ledger: Ledger, trained: Trained, task: Task, suffix: str = "") -> Graded:
    known = ledger.given(metrics())
    return known.step(f"grade-{trained.weights.name}{suffix}", Graded, grade, trained, task, tuple(metrics()))


def runs_int8(target: Target) -> None:
    """Raises ConfigError for a target of which no INT8 file can be marked on this machine."""
    if "int8" not in target.delivery.engines or target.dialect.form == "cache":
        raise ConfigError(
            f"compare.int8: no INT8 file is made for `{plugins.name_of(target)}`", hint="choose a target that has one"
        )


def graded_int8(
    ledger: Ledger, config: BuildConfig, task: Task, calib: CalibrationSet, trained: Trained, suffix: str
) -> Graded:
    """As the INT8 file for the first target answers, in onnxruntime; all that `config.quantize` says of it is done."""
    name, target = next(iter(named(config.targets).items()))
    inputs = ledger.step("exam", File, exam, task)
    material = Material(task, calib, inputs, (trained,))
    exported = export_all(ledger, config, material, readable(config, target))
    files = quantized(ledger, config, name, target, material, exported).files
    (fp32,), (int8,) = exported.values(), files.values()
    known = ledger.given(metrics())
    step = f"grade-{trained.weights.name}{suffix}-int8"
    return known.step(step, Graded, grade_file, int8, fp32, inputs, task, tuple(metrics()))


def metrics() -> dict[str, object]:
    """The code of each: marks depend on it."""
    return {name: code(plugins.places("metrics")[name]) for name in plugins.names("metrics")}
