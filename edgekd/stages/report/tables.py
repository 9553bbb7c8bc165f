"""The numbers of a comparison as the report's tables show them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from edgekd.core import formatting, plugins
from edgekd.core.artifact import size
from edgekd.core.bench_result import BenchResult, Interval, Machine, Measurement, Runtime
from edgekd.core.metric import Metric
from edgekd.core.task import primary_metrics, task_named

NAMES = {  # head and unit of metrics whose name does not say enough
    "p50_ms": ("median", "ms"),
    "images_per_s": ("images", "per second"),
    "late_percent": ("begun late", "% of calls"),
    "net_energy_mj": ("net energy", "mJ, above idle"),
}
UNITS = {"_ms": "ms", "_mj": "mJ", "_mb": "MB"}
TIMES = " times "  # in a verdict that says by how much: "4.1 times faster (4.0-4.2)"
BEST: dict[str, Callable[..., float]] = {
    "images_per_s": max,
    **dict.fromkeys(("size", "p50_ms", "p90_ms", "p99_ms", "memory_mb", "energy_mj"), min),
}
# Columns of the table that most readers want after that of accuracy; p90_ms where there is no p99_ms.
FIRST = (
    *("p50_ms", "load_ms", "compile_ms", "first_ms", "images_per_s", "speedup", "p90_ms", "p99_ms", "late_percent"),
)
LAST = ("energy_mj", "memory_mb")  # after the other metrics of the task
OF_FILES = ("size", "macs", "precision")  # the same however a file is called


@cache
def task_metrics() -> dict[str, Metric]:
    """Return the metrics of all tasks; a report has those of one."""
    return {name: metric for task in plugins.names("tasks") for name, metric in task_named(task).metrics().items()}


@cache
def percentages() -> dict[str, tuple[str, str]]:
    """Return head and unit of those metrics of tasks that are percentages."""
    return {n: (m.title or n, m.unit) for n, m in task_metrics().items() if m.unit.startswith("%")}


def best_of(name: str) -> Callable[..., float] | None:
    """Return what finds the best value of a column; None where to be the best says nothing, as beside the reference."""
    metric = task_metrics().get(name)
    if metric is None:
        return BEST.get(name)
    return None if "reference" in metric.inputs else max if metric.better == "higher" else min


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    under: tuple[str, ...] = ()  # in small print: its 95 % interval, a verdict
    fill: str = ""  # what it lacks to be as long behind the decimal point as others


@dataclass(frozen=True)
class Column:
    key: str
    head: str
    unit: str
    cells: tuple[Cell, ...]  # one for each measurement

    @property
    def text(self) -> bool:
        """Whether it holds words, not numbers."""
        return self.key in ("name", "method", "precision")


def columns(bench: BenchResult, percent: Callable[[float], str]) -> list[Column]:
    """Return all metrics, and what is known of the files; the speed-up is last, if there is one."""
    names = list(dict.fromkeys(name for m in bench.measurements for name in m.metrics))
    all_columns = [
        Column("name", "model", "", tuple(Cell(m.model.name) for m in bench.measurements)),
        Column("method", "taught by", "", tuple(Cell(m.model.method or "–") for m in bench.measurements)),
        Column("precision", "precision", "", tuple(Cell(precision(m)) for m in bench.measurements)),
    ]

    def add(key: str, title: tuple[str, str], values: list[Any], show: Callable[[Any], str]) -> None:
        present = [v for v in values if v is not None]
        choose = best_of(key)
        best = choose(present) if choose and len(set(present)) > 1 else None
        sure = [between(m.intervals.get(key), show) for m in bench.measurements]
        cells = [Cell("–") if v is None else Cell(show(v), v == best, u) for v, u in zip(values, sure, strict=True)]
        all_columns.append(Column(key, *title, tuple(cells)))

    def values(name: str) -> list[float | None]:
        return [m.metrics.get(name) for m in bench.measurements]

    for name in (name for name in percentages() if name in names):
        add(name, percentages()[name], values(name), lambda v: percent(v).removesuffix(" %"))
    add("size", ("file", ""), [size(m.model.file) for m in bench.measurements], formatting.file_size)
    add("parameters", ("parameters", ""), [m.model.parameters for m in bench.measurements], formatting.count)
    add("macs", ("MACs", "per image"), [m.model.macs for m in bench.measurements], formatting.count)
    for name in (name for name in names if name not in percentages()):
        title = titled(name)
        add(name, title, values(name), formatting.figures if title[1] else formatting.setting)
    if any(m.speedup or m.verdict for m in bench.measurements):
        all_columns.append(Column("speedup", "speed-up", "teacher = 1", tuple(map(speedup, bench.measurements))))
    return all_columns


def titled(name: str) -> tuple[str, str]:
    """Head and unit of a reading's column."""
    if name in task_metrics():
        return task_metrics()[name].title or name, task_metrics()[name].unit
    unit = UNITS.get(name[-3:], "")
    return NAMES.get(name, ((name[:-3] if unit else name).replace("_", " "), unit))


def between(interval: Interval | None, show: Callable[[Any], str]) -> tuple[str, ...]:
    """0.0357–0.0369; nothing of an exact number."""
    return (f"{show(interval.low)}–{show(interval.high)}",) if interval and interval.low < interval.high else ()


def speedup(m: Measurement) -> Cell:
    """The ratio of latencies with its interval; and the verdict, where that is not the same in words."""
    remark = (m.verdict,) if m.verdict and TIMES not in m.verdict else ()
    if m.speedup is None:
        return Cell("–", under=remark)
    return Cell(formatting.ratio(m.speedup.estimate), under=(*between(m.speedup, formatting.figures), *remark))


def table(bench: BenchResult, percent: Callable[[float], str]) -> tuple[list[tuple[str, str]], list[list[Cell]]]:
    """Heads (name, unit) and a row of cells for each measurement, of all columns."""
    all_columns = columns(bench, percent)
    if all_columns[-1].key == "speedup":
        cells = tuple(Cell(compared(m) or "–") for m in bench.measurements)
        all_columns[-1] = replace(all_columns[-1], unit="teacher = 1, 95 % interval", cells=cells)
    return [(c.head, c.unit) for c in all_columns], [
        list(row) for row in zip(*(c.cells for c in all_columns), strict=True)
    ]


def brief(bench: BenchResult, percent: Callable[[float], str]) -> list[Column]:
    """What most readers want to know; of another way of calling only what that changes."""
    by_key = {column.key: aligned(column) for column in columns(bench, percent)}
    if "p99_ms" in by_key:
        by_key.pop("p90_ms", None)
    primary = primary_metrics()
    others = (name for name in task_metrics() if name not in primary)
    keys = ("name", *primary, *FIRST, *others, *LAST, *(() if bench.scenario else OF_FILES))
    return [by_key[key] for key in keys if key in by_key]


def full(bench: BenchResult, percent: Callable[[float], str]) -> list[Column]:
    """All columns, without small print."""
    return [
        aligned(replace(column, cells=tuple(replace(cell, under=()) for cell in column.cells)))
        for column in columns(bench, percent)
    ]


def aligned(column: Column) -> Column:
    """Its numbers filled up, so that their decimal points stand below each other; others as they are."""
    tails = [re.fullmatch(r"[\d,]+((?:\.\d+)?)×?", cell.text) for cell in column.cells]
    if any(tail is None and cell.text != "–" for tail, cell in zip(tails, column.cells, strict=True)):
        return column
    longest = max((tail[1] for tail in tails if tail), key=len, default="")
    fills = [longest[len(tail[1]) :] if tail else "" for tail in tails]
    return replace(column, cells=tuple(replace(c, fill=f) for c, f in zip(column.cells, fills, strict=True)))


def precision(m: Measurement) -> str:
    """Of its weights; and of its other numbers, where the runtime reports another."""
    others = "" if m.compute_precision in ("", m.model.precision) else f", {m.compute_precision}"
    return f"{m.model.precision}{others}".upper()


def compared(m: Measurement) -> str | None:
    """The ratio of latencies; and the verdict, where that is not the same in words."""
    remark = "" if TIMES in m.verdict else m.verdict
    ratio = formatting.interval(m.speedup) if m.speedup else ""
    return ": ".join(filter(None, (ratio, remark))) or None


def scored(bench: BenchResult) -> str:
    """The name of the metric that is the accuracy of its task."""
    names = primary_metrics()
    return next((key for key in names if any(key in m.metrics for m in bench.measurements)), names[0])


def difference(a: Measurement | None, b: Measurement | None, name: str) -> float | None:
    """By how much `a` reads higher than `b`; None unless both were read."""
    if a is None or b is None or name not in a.metrics or name not in b.metrics:
        return None
    return a.metrics[name] - b.metrics[name]


def where(bench: BenchResult) -> str:
    """The machine, for the caption of a table: processor, runtime, threads, date."""
    parts = []
    if bench.machine:
        parts.append(bench.machine.processor)
    if bench.runtime:
        threads = "1 thread" if bench.runtime.threads == 1 else f"{bench.runtime.threads} threads"
        parts += [f"{bench.runtime.name} {bench.runtime.version}", threads]
    return " · ".join([*parts, formatting.when(bench.started)])


def places(benches: Iterable[BenchResult]) -> list[tuple[Machine, Runtime | None, list[str]]]:
    """Every machine with a runtime that numbers come from, and the titles of the comparisons there."""
    machines: list[tuple[Machine, Runtime | None, list[str]]] = []
    for bench in benches:
        if bench.machine is None:
            continue
        titles_there = next((titles for *place, titles in machines if place == [bench.machine, bench.runtime]), None)
        if titles_there is None:
            machines.append((bench.machine, bench.runtime, [bench.title]))
        else:
            titles_there.append(bench.title)
    return machines


def shared(settings: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The names with values that are the same in all of `settings`."""
    first, *others = settings or [[]]
    return [pair for pair in first if all(pair in other for other in others)]
