"""Choice: of the ways to find ranges, the one that leaves a student most accurate in INT8, on validation images."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgekd.core.artifact import Exported, File
from edgekd.core.bench_result import Trial
from edgekd.core.dataset import Task
from edgekd.core.quant_scheme import Dialect
from edgekd.metrics._compute import readings
from edgekd.onnx import session
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.quantize.quantize import convert, in_pairs
from edgekd.stages.quantize.ranges import Ranges, best

log = logging.getLogger(__name__)
JUDGES = ("top1", "delta1")  # the metric of class answers, and that of maps


def most_accurate(
    out: Path,
    model: Exported,
    images: File,
    dialect: Dialect,
    found: dict[str, Ranges],
    task: Task,
    floats: tuple[str, ...] = (),
    correct_bias: bool = False,
) -> Ranges:
    """Of `found`, by method, the ranges whose INT8 file in `dialect` is the most accurate; the first of equals.

    Accuracy is that on the validation images of `task`, in percent: the right top class, or for maps the pixels within
    a factor of 1.25. `images` are the calibration images. Raises as `quantize` does.
    """
    if len(found) == 1:
        return next(iter(found.values()))
    valid = task.valid.load()
    inputs, known = task.inputs(np.asarray(valid.images)), load_calibration(images.path, model.single.input)
    nothing = np.empty(0, np.int64)

    def grade(ranges: Ranges) -> float:
        with TemporaryDirectory(prefix="edgekd-", dir=out) as folder:
            target = Path(folder, "int8.onnx")
            path, macs = model.dynamic.file.path, model.single.macs
            convert(path, target, known, in_pairs(dialect), ranges, macs, floats, correct_bias)
            logits = session.answers(target, inputs)
        (percent,) = readings(Trial(nothing, nothing, logits, nothing, valid.labels), JUDGES).values()
        return percent

    chosen = best(found, grade)
    told = ", ".join(f"{method} {percent:.2f} %" for method, percent in chosen.tried.items())
    log.info("%s: ranges by %s (validation accuracy in INT8: %s)", model.single.name, chosen.method, told)
    return chosen
