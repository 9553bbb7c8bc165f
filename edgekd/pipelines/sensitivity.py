"""Survey: the sensitivity of an ONNX file of any origin, and the mixes of INT8 and float layers that it allows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edgekd.core import plugins, serialization
from edgekd.core.artifact import OnnxModel
from edgekd.core.mixed_precision import Frontier
from edgekd.core.target import Target
from edgekd.errors import ConfigError
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.compare_files import contestant, given, true_classes
from edgekd.stages.mixed_precision.search import frontier
from edgekd.stages.mixed_precision.sensitivity import RANKED, Exam, Subject
from edgekd.stages.quantize.preparation import dialect_for, prepare_file
from edgekd.stages.quantize.quantize import settled
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.stages.report import plots
from edgekd.stages.report.mixed_precision import drawn, markdown


def survey(
    out: Path, model: Path, calib: Path, images: Path, labels: Path, target_name: str, config: QuantizeConfig
) -> Frontier:
    """Rank the layers of the FP32 file `model`, and find the cheapest mix within `max_drop` of `config`, if it has one.

    At most RANKED of the `images`, network inputs (N, C, H, W), are looked at, spread evenly; `labels` are their
    classes. `out` gets sensitivity.json, .md and .svg, and samples. Raises ConfigError, DataError and ModelError for
    files that do not go together or cannot be quantized.
    """
    target: Target = plugins.load("targets", target_name)()
    if target.dialect.form == "cache":
        raise ConfigError(f"INT8 for `{target_name}` is no ONNX file", hint="name a target that runs Q/DQ nodes: cpu")
    dialect, found = dialect_for(target.dialect, config), inspect.facts(model)
    if found.input.shape[0] > 1:
        raise ConfigError(
            f"`{model}` takes {found.input.shape[0]} inputs at once, but calls are timed with one",
            hint="export it with a batch of 1, or a dynamic one",
        )
    out.mkdir(parents=True, exist_ok=True)
    inputs = given(out, images, found.input)
    truth = true_classes(labels, inputs, (contestant(model, model.name),))
    known = load_calibration(calib, found.input)
    source = prepare_file(model, out / "prepared.onnx", known, config) if config.rescales else model
    ranges = settled(source, known, dialect, config)
    made: OnnxModel = inspect.described(source, model.stem)
    subject = Subject(source, source, known, dialect, ranges, made.macs, config.floats, config.correct_bias)
    exam = Exam.of(model, *some(inputs.path, truth.path))
    told = frontier(out, subject, exam, model.name, target_name, target, config.max_drop, whole=True)
    (out / "sensitivity.json").write_text(json.dumps(serialization.dump(told), indent=2) + "\n")
    (out / "sensitivity.md").write_text(markdown(told, "sensitivity.svg"), encoding="utf-8")
    (out / "sensitivity.svg").write_text(plots.page(drawn(told)), encoding="utf-8")
    return told


def some(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """At most RANKED of them, spread evenly, for files are often sorted by class."""
    every = np.load(images, mmap_mode="r")
    picks = np.unique(np.linspace(0, len(every) - 1, RANKED).astype(np.int64))
    return every[picks], np.load(labels)[picks]
