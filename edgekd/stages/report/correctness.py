"""Which test images the models of a build got right, where its folder still holds their answers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchResult
from edgekd.core.build_record import Record
from edgekd.stages.bench.intervals import right
from edgekd.utils.arrays import load_array

IMAGES, LABELS = "test-images.npy", "test-labels.npy"


def same_images(a: Record, b: Record) -> bool:
    """Whether two builds were tested on the same images with the same labels."""
    known = [record.origins.data if record.origins else {} for record in (a, b)]
    return all(name in known[0] and known[0].get(name) == known[1].get(name) for name in (IMAGES, LABELS))


def right_answers(folder: Path, record: Record, bench: BenchResult) -> dict[str, np.ndarray]:
    """Name of a model -> (images,) bool; none where the build's steps are gone, or it was measured elsewhere.

    Raises ConfigError where an array cannot be read.
    """
    if bench.samples is None or record.origins is None:
        return {}
    timed = found_by(folder.glob("steps/bench-*/samples.npz"), bench.samples.sha256)
    labels = found_by(folder.glob(f"steps/data*/{LABELS}"), record.origins.data.get(LABELS, ""))
    if timed is None or labels is None:
        return {}
    truth, found = load_array(labels), {}
    for index, m in enumerate(bench.measurements):
        path = timed.parent / "answers" / f"logits-{index}.npy"
        logits = load_array(path) if path.is_file() else truth[:0]
        if logits.ndim == 2 and logits.shape[:1] == truth.shape and logits.size:
            own = right(logits, truth)
            if abs(100 * own.mean() - m.readings.get("top1", -1)) < 1e-6:  # else they are of another benchmark
                found[m.contestant.name] = own
    return found


def found_by(paths: Iterable[Path], sha256: str) -> Path | None:
    return next((path for path in sorted(paths) if File.of(path).sha256 == sha256), None)
