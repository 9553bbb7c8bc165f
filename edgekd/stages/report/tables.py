"""The numbers of a comparison as the report's tables show them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgekd.core import formatting
from edgekd.core.artifact import size
from edgekd.core.bench_result import BenchResult, Interval, Machine, Measurement, Runtime

PERCENT = {
    "top1": ("top-1", "%"),
    "agreement": ("agreement", "% with its FP32 form"),
    "delta1": ("delta1", "% of pixels within a factor of 1.25"),
}
NAMES = {  # head and unit of readings whose own name does not say enough
    "p50_ms": ("median", "ms"),
    "images_per_s": ("images", "per second"),
    "late_percent": ("begun late", "% of calls"),
    "rmse": ("RMSE", "as the labels"),
    "deviation": ("deviation", "from its FP32 form, as the labels"),
    "net_energy_mj": ("net energy", "mJ, above idle"),
}
UNITS = {"_ms": "ms", "_mj": "mJ", "_mb": "MB"}
SCORES = ("top1", "delta1")  # of which one is the accuracy of a task
TIMES = " times "  # in a verdict that says by how much: "4.1 times faster (4.0-4.2)"
BEST: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("top1", "delta1", "images_per_s"), max),
    **dict.fromkeys(("rmse", "size", "p50_ms", "p90_ms", "p99_ms", "memory_mb", "energy_mj"), min),
}
# Columns of the table that most readers want, in order of their interest; p90_ms where there is no p99_ms.
FIRST = (
    *("top1", "delta1", "p50_ms", "load_ms", "compile_ms", "first_ms", "images_per_s", "speedup", "p90_ms", "p99_ms"),
    *("late_percent", "rmse", "agreement", "deviation", "energy_mj", "memory_mb"),
)
OF_FILES = ("size", "macs", "precision")  # the same however a file is called


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
    """All readings of all metrics, and what is known of the files; the speed-up is last, if there is one."""
    names = list(dict.fromkeys(name for m in bench.measurements for name in m.readings))
    found = [
        Column("name", "model", "", tuple(Cell(m.contestant.name) for m in bench.measurements)),
        Column("method", "taught by", "", tuple(Cell(m.contestant.method or "–") for m in bench.measurements)),
        Column("precision", "precision", "", tuple(Cell(precision(m)) for m in bench.measurements)),
    ]

    def add(key: str, title: tuple[str, str], values: list[Any], show: Callable[[Any], str]) -> None:
        known = [v for v in values if v is not None]
        best = BEST[key](known) if key in BEST and len(set(known)) > 1 else None
        sure = [between(m.intervals.get(key), show) for m in bench.measurements]
        cells = [Cell("–") if v is None else Cell(show(v), v == best, u) for v, u in zip(values, sure, strict=True)]
        found.append(Column(key, *title, tuple(cells)))

    def readings(name: str) -> list[float | None]:
        return [m.readings.get(name) for m in bench.measurements]

    for name in (name for name in PERCENT if name in names):
        add(name, PERCENT[name], readings(name), lambda v: percent(v).removesuffix(" %"))
    add("size", ("file", ""), [size(m.contestant.file) for m in bench.measurements], formatting.file_size)
    add("parameters", ("parameters", ""), [m.contestant.parameters for m in bench.measurements], formatting.count)
    add("macs", ("MACs", "per image"), [m.contestant.macs for m in bench.measurements], formatting.count)
    for name in (name for name in names if name not in PERCENT):
        title = titled(name)
        add(name, title, readings(name), formatting.figures if title[1] else formatting.setting)
    if any(m.speedup or m.verdict for m in bench.measurements):
        found.append(Column("speedup", "speed-up", "teacher = 1", tuple(map(speedup, bench.measurements))))
    return found


def titled(name: str) -> tuple[str, str]:
    """Head and unit of a reading's column."""
    unit = UNITS.get(name[-3:], "")
    return NAMES.get(name, ((name[:-3] if unit else name).replace("_", " "), unit))


def between(found: Interval | None, show: Callable[[Any], str]) -> tuple[str, ...]:
    """0.0357–0.0369; nothing of an exact number."""
    return (f"{show(found.low)}–{show(found.high)}",) if found and found.low < found.high else ()


def speedup(m: Measurement) -> Cell:
    """The ratio of latencies with its interval; and the verdict, where that is not the same in words."""
    said = (m.verdict,) if m.verdict and TIMES not in m.verdict else ()
    if m.speedup is None:
        return Cell("–", under=said)
    return Cell(formatting.ratio(m.speedup.mid), under=(*between(m.speedup, formatting.figures), *said))


def table(bench: BenchResult, percent: Callable[[float], str]) -> tuple[list[tuple[str, str]], list[list[Cell]]]:
    """Heads (name, unit) and a row of cells for each measurement, of all columns."""
    found = columns(bench, percent)
    if found[-1].key == "speedup":
        cells = tuple(Cell(compared(m) or "–") for m in bench.measurements)
        found[-1] = replace(found[-1], unit="teacher = 1, 95 % interval", cells=cells)
    return [(c.head, c.unit) for c in found], [list(row) for row in zip(*(c.cells for c in found), strict=True)]


def brief(bench: BenchResult, percent: Callable[[float], str]) -> list[Column]:
    """What most readers want to know; of another way of calling only what that changes."""
    found = {column.key: aligned(column) for column in columns(bench, percent)}
    if "p99_ms" in found:
        found.pop("p90_ms", None)
    keys = ("name", *FIRST, *(() if bench.scenario else OF_FILES))
    return [found[key] for key in keys if key in found]


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
    others = "" if m.floats in ("", m.contestant.precision) else f", {m.floats}"
    return f"{m.contestant.precision}{others}".upper()


def compared(m: Measurement) -> str | None:
    """The ratio of latencies; and the verdict, where that is not the same in words."""
    said = "" if TIMES in m.verdict else m.verdict
    ratio = formatting.interval(m.speedup) if m.speedup else ""
    return ": ".join(filter(None, (ratio, said))) or None


def scored(bench: BenchResult) -> str:
    """The name of the metric that is the accuracy of its task."""
    return next((key for key in SCORES if any(key in m.readings for m in bench.measurements)), SCORES[0])


def difference(a: Measurement | None, b: Measurement | None, name: str) -> float | None:
    """By how much `a` reads higher than `b`; None unless both were read."""
    if a is None or b is None or name not in a.readings or name not in b.readings:
        return None
    return a.readings[name] - b.readings[name]


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
    found: list[tuple[Machine, Runtime | None, list[str]]] = []
    for bench in benches:
        if bench.machine is None:
            continue
        known = next((titles for *place, titles in found if place == [bench.machine, bench.runtime]), None)
        if known is None:
            found.append((bench.machine, bench.runtime, [bench.title]))
        else:
            known.append(bench.title)
    return found


def shared(settings: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The names with values that are the same in all of `settings`."""
    first, *others = settings or [[]]
    return [pair for pair in first if all(pair in other for other in others)]
