"""The sensitivity of an ONNX file of any origin: its layers ranked, and the mixes of INT8 and float layers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.core import plugins, serialization
from edgekd.core.artifact import OnnxModel
from edgekd.core.mixed_precision import ParetoFront
from edgekd.core.target import Target
from edgekd.core.task import matching_task
from edgekd.errors import ConfigError, ModelError
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.compare_files import check_labels, load_entry, save_inputs
from edgekd.stages.mixed_precision.search import SearchGoal, search_pareto_front
from edgekd.stages.mixed_precision.sensitivity import LAYER_IMAGES, EvalSet, QuantizableModel
from edgekd.stages.quantize.preparation import prepare_file
from edgekd.stages.quantize.quantize import Int8Options, select_ranges
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.stages.report import plots
from edgekd.stages.report.mixed_precision import markdown, plot


@dataclass(frozen=True)
class SensitivityRequest:
    """An FP32 file, and the data to quantize and evaluate it with."""

    model: Path
    calibration: Path  # network inputs, .npz or .npy, (N, C, H, W) float32
    images: Path  # other network inputs, to evaluate with
    labels: Path  # their classes, .npy
    target_name: str
    config: QuantizeConfig


def analyze_sensitivity(out: Path, request: SensitivityRequest) -> ParetoFront:
    """Rank the layers of a file, and find the cheapest mix of INT8 and float layers within `max_drop`, if there is one.

    At most LAYER_IMAGES of the images are evaluated, spread evenly. `out` gets sensitivity.json, .md and .svg, and
    samples.

    Raises:
        ConfigError: if the target has no INT8 files in ONNX.
        DataError: if the data do not fit the file.
        ModelError: if the file cannot be quantized.
    """
    name, model, config = request.target_name, request.model, request.config
    target: Target = plugins.load("targets", name)()
    if target.scheme.format == "calibration_cache":
        raise ConfigError(f"INT8 for `{name}` is not an ONNX file", hint="name a target that runs Q/DQ nodes: cpu")
    options, facts = Int8Options.of(target.scheme, config), inspect.facts(model)
    if facts.input.shape[0] > 1:
        raise ConfigError(
            f"`{model}` takes {facts.input.shape[0]} inputs at once, but calls are timed with one",
            hint="export it with a batch of 1, or a dynamic one",
        )
    task = matching_task(facts.outputs)
    if task is None:
        hint = "give a file with one output: class logits, or maps"
        raise ModelError(f"no task has outputs such as those of `{model}`", hint=hint)
    out.mkdir(parents=True, exist_ok=True)
    inputs = save_inputs(out, request.images, facts.input)
    labels = check_labels(request.labels, inputs, (load_entry(model, model.name),))
    calibration = load_calibration(request.calibration, facts.input)
    source = prepare_file(model, out / "prepared.onnx", calibration, config) if config.rescales else model
    ranges = select_ranges(source, calibration, options, config)
    onnx: OnnxModel = inspect.describe(source, model.stem)
    network = QuantizableModel(model.name, source, source, calibration, ranges, options, onnx.macs)
    eval_set = EvalSet.of(model, *sample_evenly(inputs.path, labels.path), task)
    front = search_pareto_front(out, network, eval_set, SearchGoal(name, target, config.max_drop, all_layers=True))
    (out / "sensitivity.json").write_text(json.dumps(serialization.to_json(front), indent=2) + "\n")
    (out / "sensitivity.md").write_text(markdown(front, "sensitivity.svg"), encoding="utf-8")
    (out / "sensitivity.svg").write_text(plots.page(plot(front)), encoding="utf-8")
    return front


def sample_evenly(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return at most LAYER_IMAGES of them, spread evenly, for files are often sorted by class."""
    every = np.load(images, mmap_mode="r")
    picks = np.unique(np.linspace(0, len(every) - 1, LAYER_IMAGES).astype(np.int64))
    return every[picks], np.load(labels)[picks]
