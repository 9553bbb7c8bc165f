"""How sure each number of a measurement is: 95 % intervals, which gates are decided with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.core import plugins
from edgekd.core.bench_result import Interval, Metric, Trial
from edgekd.metrics._percentile import nearest_rank
from edgekd.stages.bench import statistics

Z = 1.959964  # of a normal distribution, for 95 %
RESAMPLES = 1000
GROUPS = 20  # of images, for the jackknife
SHARES = ("top1", "agreement")  # metrics that count images


def intervals(
    trial: Trial, teacher: np.ndarray, names: Sequence[str], seed: int, sessions: int = 1
) -> dict[str, Interval]:
    """By name of a metric that the trial has a number for; and what it lost, in points of top-1: `drop` against its
    float original, `teacher_drop` against the teacher, whose answers to the same images are `teacher` (empty: none).
    """
    metrics: dict[str, Metric] = {name: plugins.load("metrics", name)() for name in names}
    found = {}
    for name, metric in metrics.items():
        if metric.maps not in (None, trial.logits.ndim > 2) or not all(getattr(trial, p).size for p in metric.reads):
            continue
        if "ns" in metric.reads:
            found[name] = resampled(metric, trial, seed, sessions)
        elif name in SHARES:
            found[name] = share(metric(trial), len(trial.logits))
        elif len(trial.logits) > 1:
            found[name] = jackknifed(metric, trial)
    if trial.logits.ndim == 2 and trial.logits.size and trial.labels.size:
        own = right(trial.logits, trial.labels)
        if trial.reference.size:
            found["drop"] = lost(right(trial.reference, trial.labels), own)
        if len(teacher) == len(own):
            found["teacher_drop"] = lost(right(teacher, trial.labels), own)
    return found


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(logits.argmax(1) == labels)


def lost(before: np.ndarray, after: np.ndarray) -> Interval:
    """Points of accuracy between two networks on the same images; both (images,) bool, whether each was right.

    Adds half an image to each cell of the table of pairs, so that no difference in few images is not called certain
    (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    n = len(before)
    worse, better = int((before & ~after).sum()), int((after & ~before).sum())
    b, c, size = worse + 0.5, better + 0.5, n + 2
    centre, spread = (b - c) / size, Z * np.sqrt(b + c - (b - c) ** 2 / size) / size
    mid = (worse - better) / n
    return Interval(100 * min(centre - spread, mid), 100 * mid, 100 * max(centre + spread, mid))


def share(percent: float, n: int) -> Interval:
    """Of a percentage of `n` images that each count or not (Wilson, JASA 22, 1927)."""
    p = percent / 100
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    spread = Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Interval(100 * min(centre - spread, p), percent, 100 * max(centre + spread, p))


def resampled(metric: Metric, trial: Trial, seed: int, sessions: int = 1) -> Interval:
    """A bootstrap of whole blocks: calls next to each other are alike. No narrower than the spread of several sessions,
    processes that each have as many consecutive blocks, or one more."""
    blocks = trial.ns.reshape(len(np.unique(trial.block)), -1)
    random = np.random.default_rng(seed)
    empty = np.zeros(0)

    def read(ns: np.ndarray) -> float:
        return metric(Trial(ns.ravel(), empty, empty, empty, empty))

    seen = np.array([read(blocks[picks]) for picks in random.integers(len(blocks), size=(RESAMPLES, len(blocks)))])
    found = Interval(nearest_rank(seen, 2.5), metric(trial), nearest_rank(seen, 97.5))
    return statistics.widened(found, blocks, sessions)


def jackknifed(metric: Metric, trial: Trial) -> Interval:
    """By leaving out one of some groups of images at a time (Efron and Tibshirani, 1993, chapter 11)."""
    count = len(trial.logits)
    groups = np.array_split(np.arange(count), min(GROUPS, count))
    mid = metric(trial)
    without = np.array([metric(kept(trial, np.setdiff1d(np.arange(count), group))) for group in groups])
    spread = Z * np.sqrt((len(groups) - 1) / len(groups) * ((without - without.mean()) ** 2).sum())
    return Interval(mid - spread, mid, mid + spread)


def kept(trial: Trial, images: np.ndarray) -> Trial:
    parts = (part[images] if part.size else part for part in (trial.logits, trial.reference, trial.labels))
    return Trial(trial.ns, trial.block, *parts)
