"""Explanation: what was found out about an INT8 file, for people and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgekd.core import serialization
from edgekd.stages.explain.layer_error import LayerError
from edgekd.stages.explain.layers import Form, QuantizedLayer
from edgekd.stages.explain.speed_causes import Cause

SHOWN = 12  # rows of a table, the slowest or the worst
NAMED = 3  # operators of a place that are told by name
LONGEST = 34  # characters of a name in a table


@dataclass(frozen=True)
class QdqCounts:
    """QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear nodes."""

    written: int  # in the file
    left: int  # after onnxruntime's optimisation
    edges: int  # of those, the conversion of the network's input and output


@dataclass(frozen=True)
class Time:
    """Microseconds of one kind of operator in one call: in the FP32 file, and in the INT8 one."""

    op: str
    fp32_us: float | None
    integer_us: float
    float_us: float  # also what converts and reorders


@dataclass(frozen=True)
class LayerTime:
    """One layer in FP32 and INT8; without a reference, only the latter."""

    layer: QuantizedLayer
    fp32_us: float | None
    int8_us: float | None
    change: str  # 2.7 times faster (2.6-2.8); "" if unknown


@dataclass(frozen=True)
class FloatPlace:
    """Where a network runs in float: the operators, what is on both sides, and why."""

    operators: tuple[str, ...]
    between: tuple[str, ...]
    pairs: int
    us: float
    share: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    model: str
    form: Form
    producer: str  # the tool, as the file says
    target: str
    where: str  # the runtime, its threads and the processor
    pairs: QdqCounts | None  # None where nothing is executed
    times: tuple[Time, ...]
    layers: tuple[LayerTime, ...]
    places: tuple[FloatPlace, ...]
    losses: tuple[LayerError, ...]
    agreement: float | None  # percent of the images on which INT8 and FP32 have the same top class
    latency: str  # INT8 compared with FP32, whole calls
    notes: tuple[str, ...]  # what was not looked at, and doubts about the measurement
    causes: tuple[Cause, ...]  # worst first
    verdicts: tuple[str, ...]  # one line each; if nothing is wrong, one that says so
    session_config: dict[str, str]  # entries of the onnxruntime sessions that agreement is from


def as_json(explanation: Explanation) -> dict[str, Any]:
    data: dict[str, Any] = serialization.to_json(explanation)
    return data


def format_explanation(explanation: Explanation) -> str:
    """For a terminal; the verdicts last."""
    parts = [
        head(explanation),
        *filter(
            None, (time_table(explanation), place_lines(explanation), layer_table(explanation), loss_table(explanation))
        ),
    ]
    lines = ["\n".join(explanation.verdicts[:1]) if not explanation.causes else cause_lines(explanation)]
    return "\n\n".join([*parts, *lines])


def head(explanation: Explanation) -> str:
    kinds = sorted({f"{one.layer.activation} x {one.layer.weight}" for one in explanation.layers})
    scales = {one.layer.per_channel for one in explanation.layers}
    per = "per channel" if scales == {True} else "one for a layer" if scales == {False} else "mixed"
    lines = [
        f"{explanation.model}: {explanation.form}, made by {explanation.producer}",
        f"{len(explanation.layers)} layers with integer weights: {', '.join(kinds)}; weight scales: {per}",
        explanation.where,
    ]
    if explanation.latency:
        lines.append(f"latency: {explanation.latency}")
    if explanation.agreement is not None:
        lines.append(f"agreement: INT8 and FP32 have the same top class on {explanation.agreement:.1f} % of the images")
    if explanation.pairs:
        p = explanation.pairs
        lines.append(
            f"Q/DQ nodes: {p.written} written, {p.left} left after optimisation, {p.edges} of them at the ends"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in explanation.notes)])


def table(rows: list[list[str]], words: tuple[int, ...] = (0,)) -> str:
    """Columns; `words` start at the left, numbers end at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def time_table(explanation: Explanation) -> str:
    if not explanation.times:
        return ""
    rows = [["operator, µs a call", "FP32", "INT8: integer", "float, pairs"]]
    for one in (*explanation.times, total(explanation.times)):
        rows.append([one.op, number(one.fp32_us), number(one.integer_us), number(one.float_us)])
    return table(rows)


def total(times: tuple[Time, ...]) -> Time:
    fp32 = [one.fp32_us for one in times if one.fp32_us is not None]
    return Time("all", sum(fp32) if fp32 else None, sum(t.integer_us for t in times), sum(t.float_us for t in times))


def number(us: float | None) -> str:
    return "-" if us is None else "" if not us else f"{us:.1f}"


def place_lines(explanation: Explanation) -> str:
    if not explanation.places:
        return ""
    lines = ["in float:"]
    for one in explanation.places[:SHOWN]:
        counts = Counter(name.partition(" ")[0] for name in one.operators)
        many = ", ".join(f"{count} {op}" for op, count in counts.items())
        ops = (many if len(one.operators) > NAMED else ", ".join(one.operators)) or "no operator"
        ends = ", beside " + " and ".join(f"`{name}`" for name in one.between[:3]) if one.between else ""
        why = f": {one.reasons[0]}" if one.reasons else ""
        lines.append(f"  {100 * one.share:4.1f} %  {ops}, {one.pairs} Q/DQ{ends}{why}")
    return "\n".join([*lines, *more(explanation.places)])


def layer_table(explanation: Explanation) -> str:
    if not explanation.layers:
        return ""
    rows = [["layer", "activation", "products", "channels", "weakest", "FP32 µs", "INT8 µs", "INT8 is"]]
    executed = any(one.int8_us is not None for one in explanation.layers)
    order = sorted(explanation.layers, key=lambda one: -(one.int8_us or 0.0))
    for one in order[:SHOWN]:
        n = one.layer
        kind = n.activation + (", depthwise" if n.depthwise else "")
        size = [str(n.summed), str(n.leaving), f"{n.weakest}/127"]
        rows.append([short(n.node), kind, *size, number(one.fp32_us), number(one.int8_us), one.change or "-"])
    return "\n".join([table([row if executed else row[:5] for row in rows], (0, 1, 7)), *more(order)])


def loss_table(explanation: Explanation) -> str:
    if not explanation.losses:
        return ""
    rows = [["tensor, least exact first", "alone dB", "in all dB", "clipped", "range used"]]
    order = sorted(explanation.losses, key=lambda one: one.whole_db)
    for one in order[: SHOWN // 2]:
        decibels = [f"{one.own_db:.1f}", f"{one.whole_db:.1f}"]
        rows.append([short(one.tensor), *decibels, f"{100 * one.clipped:.2f} %", f"{100 * one.used:.0f} %"])
    left = len(order) - SHOWN // 2
    return "\n".join([table(rows), *([f"  ... and {left} more (--json)"] if left > 0 else [])])


def more(rows: Any) -> list[str]:
    return [f"  ... and {len(rows) - SHOWN} more (--json)"] if len(rows) > SHOWN else []


def short(name: str) -> str:
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"


def cause_lines(explanation: Explanation) -> str:
    return "\n".join(line for cause in explanation.causes for line in lines_of(cause))


def lines_of(cause: Cause) -> Iterator[str]:
    yield f"{cause.about}: {cause.verdict}"
    if cause.fix:
        yield f"  change: {cause.fix}"
    if cause.other_tools:
        yield f"  other tools: {cause.other_tools}"
