"""The numbers of a comparison as the report's tables show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgekd.core.artifact import File
from edgekd.core.trial import BenchResult, Measurement
from edgekd.stages.report import words

PERCENT = {
    "top1": ("top-1", "%"),
    "agreement": ("agreement", "% with its FP32 form"),
    "delta1": ("delta1", "% of pixels within a factor of 1.25"),
}
RATES = {"images_per_s": ("images", "per second"), "late_percent": ("begun late", "% of calls")}
SCORES = ("top1", "delta1")  # of which one is the accuracy of a task
TIMES = " times "  # in a verdict that says by how much: "4.1 times faster (4.0-4.2)"
BEST: dict[str, Callable[..., float]] = {
    "top1": max,
    "delta1": max,
    "rmse": min,
    "size": min,
    "p50_ms": min,
    "p90_ms": min,
    "p99_ms": min,
    "images_per_s": max,
    "memory_mb": min,
}


@dataclass(frozen=True)
class Remembered(File):
    """A file as report.json remembers it: the file itself may be gone."""

    size: int | None  # bytes


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


def table(bench: BenchResult, percent: Callable[[float], str]) -> tuple[list[tuple[str, str]], list[list[Cell]]]:
    """Heads (name, unit) and a row of cells for each measurement; all readings of all metrics are in it."""
    names = list(dict.fromkeys(name for m in bench.measurements for name in m.readings))
    accuracy = [name for name in PERCENT if name in names]
    others = [name for name in names if name not in PERCENT]
    heads: list[tuple[str, str]] = [("model", ""), ("taught by", ""), ("precision", "")]
    columns: list[list[Cell]] = [
        [Cell(m.contestant.name) for m in bench.measurements],
        [Cell(m.contestant.method or "–") for m in bench.measurements],
        [Cell(precision(m)) for m in bench.measurements],
    ]

    def add(key: str, head: str, unit: str, values: list[Any], show: Callable[[Any], str]) -> None:
        known = [v for v in values if v is not None]
        best = BEST[key](known) if key in BEST and len(known) > 1 else None
        heads.append((head, unit))
        columns.append([Cell("–") if v is None else Cell(show(v), v == best) for v in values])

    def readings(name: str) -> list[float | None]:
        return [m.readings.get(name) for m in bench.measurements]

    for name in accuracy:
        add(name, *PERCENT[name], readings(name), lambda v: percent(v).removesuffix(" %"))
    add("size", "file", "", [size(m.contestant.file) for m in bench.measurements], words.file_size)
    add("parameters", "parameters", "", [m.contestant.parameters for m in bench.measurements], words.count)
    add("macs", "MACs", "per image", [m.contestant.macs for m in bench.measurements], words.count)
    for name in others:
        unit = {"_ms": "ms", "_mj": "mJ", "_mb": "MB"}.get(name[-3:], "")
        head = (name[:-3] if unit else name).replace("_", " ")
        head, unit = RATES.get(name, (head, unit))
        add(name, head, unit, readings(name), words.figures if unit else words.setting)
    add("speedup", "speed-up", "teacher = 1, 95 % interval", [compared(m) for m in bench.measurements], str)
    return heads, [list(row) for row in zip(*columns, strict=True)]


def precision(m: Measurement) -> str:
    """Of its weights; and of its other numbers, where the runtime reports another."""
    others = "" if m.floats in ("", m.contestant.precision) else f", {m.floats}"
    return f"{m.contestant.precision}{others}".upper()


def compared(m: Measurement) -> str | None:
    """The ratio of latencies; and the verdict, where that is not the same in words."""
    said = "" if TIMES in m.verdict else m.verdict
    ratio = words.interval(m.speedup) if m.speedup else ""
    return ": ".join(filter(None, (ratio, said))) or None


def size(file: File) -> int | None:
    """Bytes, or None if the file is gone and nobody wrote its size down."""
    if isinstance(file, Remembered):
        return file.size
    return file.bytes if file.path.exists() else None


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
    return " · ".join([*parts, words.when(bench.started)])
