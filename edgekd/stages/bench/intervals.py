"""How sure each number of a measurement is: 95 % intervals, which gates are decided with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from edgekd.core.bench_result import Interval, Samples
from edgekd.core.task import Task
from edgekd.metrics._compute import applicable_metrics
from edgekd.metrics.latency import nearest_rank
from edgekd.stages.bench import statistics

Z = 1.959964  # of a normal distribution, for 95 %
RESAMPLES = 1000
GROUPS = 20  # of images, for the jackknife


def intervals(
    samples: Samples,
    teacher: tuple[np.ndarray, ...],
    names: Sequence[str],
    seed: int,
    processes: int = 1,
    task: Task | None = None,
) -> dict[str, Interval]:
    """Return the interval of each named metric that applies to `samples`, and of the accuracy lost.

    `accuracy_drop` is that against the FP32 file, `accuracy_drop_vs_teacher` that against the teacher, in points of
    the task's primary metric, if that counts images; `teacher` holds its outputs for the same images, or nothing.
    """
    result = {}
    for name, metric in applicable_metrics(samples, names, task).items():
        if "ns" in metric.inputs:
            result[name] = resampled(metric.compute, samples, seed, processes)
        elif metric.hits:
            result[name] = wilson(metric.compute(samples), len(samples.outputs[0]))
        elif len(samples.outputs[0]) > 1:
            result[name] = jackknifed(metric.compute, samples)
    hits = task.metrics()[task.primary_metric].hits if task else None
    if hits and samples.has("outputs") and samples.has("labels"):
        correct = hits(samples)
        if samples.has("reference"):
            result["accuracy_drop"] = accuracy_lost(hits(replace(samples, outputs=samples.reference)), correct)
        if teacher and len(teacher[0]) == len(correct):
            result["accuracy_drop_vs_teacher"] = accuracy_lost(hits(replace(samples, outputs=teacher)), correct)
    return result


def accuracy_lost(before: np.ndarray, after: np.ndarray) -> Interval:
    """Return the points of accuracy lost between two networks on the same images; both (images,) bool: is it correct.

    Adds half an image to each cell of the table of pairs, so that no difference in few images is called certain
    (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    n = len(before)
    worse, better = int((before & ~after).sum()), int((after & ~before).sum())
    b, c, size = worse + 0.5, better + 0.5, n + 2
    centre, spread = (b - c) / size, Z * np.sqrt(b + c - (b - c) ** 2 / size) / size
    estimate = (worse - better) / n
    return Interval(100 * min(centre - spread, estimate), 100 * estimate, 100 * max(centre + spread, estimate))


def wilson(percent: float, n: int) -> Interval:
    """Return the interval of a percentage of `n` images that each count or not (Wilson, JASA 22, 1927)."""
    p = percent / 100
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    spread = Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Interval(100 * min(centre - spread, p), percent, 100 * max(centre + spread, p))


def resampled(compute: Callable[[Samples], float], samples: Samples, seed: int, processes: int = 1) -> Interval:
    """Return the interval of a metric of latencies by a bootstrap of whole rounds: neighbouring calls are alike.

    It is no narrower than the spread of several processes, which each have as many consecutive rounds, or one more.
    """
    rounds = samples.ns.reshape(len(np.unique(samples.round)), -1)
    random = np.random.default_rng(seed)
    empty = np.zeros(0)

    def read(ns: np.ndarray) -> float:
        return compute(Samples(ns.ravel(), empty, (), (), empty))

    values = np.array([read(rounds[picks]) for picks in random.integers(len(rounds), size=(RESAMPLES, len(rounds)))])
    interval = Interval(nearest_rank(values, 2.5), compute(samples), nearest_rank(values, 97.5))
    return statistics.widened(interval, rounds, processes)


def jackknifed(compute: Callable[[Samples], float], samples: Samples) -> Interval:
    """Return the interval of a metric by leaving out one of some groups of images at a time.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
    """
    count = len(samples.outputs[0])
    groups = np.array_split(np.arange(count), min(GROUPS, count))
    estimate = compute(samples)
    without = np.array([compute(samples.subset(np.setdiff1d(np.arange(count), group))) for group in groups])
    spread = Z * np.sqrt((len(groups) - 1) / len(groups) * ((without - without.mean()) ** 2).sum())
    return Interval(estimate - spread, estimate, estimate + spread)
