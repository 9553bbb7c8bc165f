"""What was seen of each contestant, and what that says: readings with intervals, ratios, verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.trial import Contestant, Interval, Measurement, Metric, Trial
from edgekd.stages.bench import statistics
from edgekd.stages.bench.intervals import intervals
from edgekd.stages.bench.lineup import linked, original

if TYPE_CHECKING:
    from edgekd.stages.bench.benchmark import BenchConfig


def trials(
    contestants: tuple[Contestant, ...],
    ns: list[np.ndarray],
    logits: list[np.ndarray],
    labels: File | None,
    reference: str,
) -> list[Trial]:
    """What was seen of each contestant; empty arrays stand for what was not."""
    truth = np.zeros(0, np.int64) if labels is None else np.load(labels.path)
    seen = []
    for index, contestant in enumerate(contestants):
        twin = original(contestant, contestants, reference)
        compared = np.zeros((0, 0), np.float32) if twin is None else logits[twin]
        block = np.repeat(np.arange(len(ns[index])), ns[index].shape[1])
        seen.append(Trial(ns[index].ravel(), block, logits[index], compared, truth if contestant.knows else truth[:0]))
    return seen


def judged(
    out: Path,
    contestants: tuple[Contestant, ...],
    base: int,
    seen: list[Trial],
    ns: list[np.ndarray],
    floats: list[str],
    config: BenchConfig,
    sessions: int = 1,
) -> tuple[Interval, tuple[Measurement, ...]]:
    """The A/A control, and each contestant measured against that at `base`, with its file linked into `out`.

    `ns` ends with the second session of the baseline, all in `sessions` processes; `floats` are the precisions that
    were read back.
    """
    aa = statistics.ratio(ns[base], ns[-1], config.seed, sessions)
    knowing = contestants[base].role == "teacher" and contestants[base].knows
    teacher = seen[base].logits if knowing else np.zeros(0)
    found = []
    for index, (contestant, trial) in enumerate(zip(contestants, seen, strict=True)):
        speedup = None if index == base else statistics.ratio(ns[base], ns[index], config.seed, sessions)
        verdict = statistics.verdict(speedup, aa, sessions) if speedup else ""
        kept = replace(contestant, file=linked(out, index, contestant))
        sure = intervals(trial, teacher, config.metrics, config.seed, sessions)
        read_off = readings(trial, config.metrics)
        found.append(Measurement(kept, read_off, speedup, verdict, floats[index], intervals=sure))
    return aa, tuple(found)


def readings(trial: Trial, names: tuple[str, ...]) -> dict[str, float]:
    """What the metrics say; one whose part of the trial is empty, or of another kind, says nothing."""
    metrics: dict[str, Metric] = {name: plugins.load("metrics", name)() for name in names}
    return {
        name: metric(trial)
        for name, metric in metrics.items()
        if metric.maps in (None, trial.logits.ndim > 2) and all(getattr(trial, part).size for part in metric.reads)
    }
