"""Select the calibration method whose INT8 file is the most accurate on validation images."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgekd.core.artifact import Exported, File
from edgekd.core.bench_result import Samples
from edgekd.core.dataset import PreparedDataset
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.session import run_outputs
from edgekd.stages.quantize.quantize import Int8Options, write_int8
from edgekd.stages.quantize.ranges import Ranges, best_ranges

log = logging.getLogger(__name__)


def select_most_accurate(
    out: Path,
    model: Exported,
    images: File,
    candidates: dict[str, Ranges],
    dataset: PreparedDataset,
    options: Int8Options,
) -> Ranges:
    """Return the ranges whose INT8 file is the most accurate on validation images; the first of equals.

    Accuracy is the primary metric of the task.

    Args:
        out: a folder to work in.
        model: the FP32 files.
        images: the calibration images.
        candidates: ranges by method.
        dataset: its validation images are used.
        options: how INT8 files are written.

    Raises: as `quantize`.
    """
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    valid = dataset.valid.load()
    inputs, calibration = dataset.inputs(np.asarray(valid.images)), load_calibration(images.path, model.single.input)
    task, nothing = dataset.task, np.empty(0, np.int64)
    metric = task.metrics()[task.primary_metric]

    def accuracy(ranges: Ranges) -> float:
        with TemporaryDirectory(prefix="edgekd-", dir=out) as folder:
            target = Path(folder, "int8.onnx")
            write_int8(model.dynamic.file.path, target, calibration, ranges, options.as_onnx(), model.single.macs)
            outputs = run_outputs(target, inputs)
        return metric.compute(Samples(nothing, nothing, outputs, (), valid.labels))

    best = best_ranges(candidates, accuracy)
    scores = ", ".join(f"{method} {percent:.2f} %" for method, percent in best.scores.items())
    log.info("%s: ranges by %s (validation accuracy in INT8: %s)", model.single.name, best.method, scores)
    return best
