"""What was seen of each contestant, and what that says: readings with intervals, ratios, verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.bench_result import Contestant, Interval, Measurement, Trial
from edgekd.metrics._compute import readings
from edgekd.stages.bench import statistics
from edgekd.stages.bench.entries import linked, original
from edgekd.stages.bench.intervals import intervals

if TYPE_CHECKING:
    from edgekd.stages.bench.config import BenchConfig


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
