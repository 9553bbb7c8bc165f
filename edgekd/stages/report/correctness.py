"""Which test images the models of a build got right, where its folder still holds their answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchResult
from edgekd.core.build_record import BuildRecord
from edgekd.core.task import primary_metrics
from edgekd.stages.bench.measurements import timing_samples
from edgekd.utils.arrays import load_array

NO_TIMES = np.zeros((0, 0), np.int64)
IMAGES, LABELS = "test-images.npy", "test-labels.npy"


def same_images(a: BuildRecord, b: BuildRecord) -> bool:
    """Whether two builds were tested on the same images with the same labels."""
    data = [record.provenance.data if record.provenance else {} for record in (a, b)]
    return all(name in data[0] and data[0].get(name) == data[1].get(name) for name in (IMAGES, LABELS))


def right_answers(folder: Path, record: BuildRecord, bench: BenchResult) -> dict[str, np.ndarray]:
    """Name of a model -> (images,) bool; none where the build's steps are gone, or it was measured elsewhere.

    Raises ConfigError where an array cannot be read.
    """
    if bench.samples is None or record.provenance is None:
        return {}
    timed = found_by(folder.glob("steps/bench-*/samples.npz"), bench.samples.sha256)
    labels = found_by(folder.glob(f"steps/data*/{LABELS}"), record.provenance.data.get(LABELS, ""))
    if timed is None or labels is None:
        return {}
    truth, answers = load_array(labels), {}
    for index, m in enumerate(bench.measurements):
        path = timed.parent / "answers" / f"logits-{index}.npy"
        name = next((name for name in primary_metrics() if name in m.metrics), None)
        if name is None:
            continue
        hits = plugins.load("metrics", name).hits
        outputs = load_array(path) if path.is_file() else truth[:0]
        if hits and outputs.size and len(outputs) == len(truth):
            correct = hits(replace(timing_samples(NO_TIMES), outputs=(outputs,), labels=truth))
            if abs(100 * correct.mean() - m.metrics[name]) < 1e-6:  # else they are of another benchmark
                answers[m.model.name] = correct
    return answers


def found_by(paths: Iterable[Path], sha256: str) -> Path | None:
    return next((path for path in sorted(paths) if File.of(path).sha256 == sha256), None)
