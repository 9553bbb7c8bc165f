"""Layers kept float, in words: the ranking, the frontier and what follows from them, for a terminal and as Markdown."""

from __future__ import annotations

import json
from typing import Any

from edgekd.core import formatting
from edgekd.core.bench_result import Interval
from edgekd.core.mixed_precision import EvalScores, MixedPrecision, ParetoFront
from edgekd.stages.report import plots
from edgekd.stages.report.tables import percentages

LAYERS = ("layer", "operator", "MACs", "signal to noise, dB", "accuracy, %", "points lost", "latency if float")
MIXES = ("layers in float", "MACs in float, %", "signal to noise, dB", "accuracy, %", "points lost", "latency")


def layer_rows(front: ParetoFront) -> list[tuple[str, ...]]:
    """The ranking: a row for each layer, the one to free first is first; heads are LAYERS."""
    return [
        (
            la.name,
            la.op,
            formatting.count(la.macs),
            *judged(la.int8_alone),
            price(la.latency_ratio, front.not_timed_reason),
        )
        for la in front.layers
    ]


def mix_rows(front: ParetoFront) -> list[tuple[str, ...]]:
    """The frontier: a row for each mix, in the order of layers in float, then one for FP32; heads are MIXES."""
    rows = [
        (
            freed(mix),
            f"{100 * mix.float_macs_fraction:.0f}",
            *judged(mix.scores),
            price(mix.latency_ratio, front.not_timed_reason),
        )
        for mix in ordered(front)
    ]
    return [
        *rows,
        (
            "all: FP32",
            "100",
            "–",
            f"{front.accuracy:.2f}",
            "0.00",
            price(front.fp32_latency_ratio, front.not_timed_reason),
        ),
    ]


def ordered(front: ParetoFront) -> list[MixedPrecision]:
    return sorted(front.candidates, key=lambda mix: len(mix.keep_float))


def judged(marks: EvalScores) -> tuple[str, str, str]:
    drop = marks.accuracy_drop
    return f"{marks.snr_db:.1f}", f"{marks.accuracy:.2f}", f"{drop.estimate:.2f} ({drop.low:.2f} to {drop.high:.2f})"


def price(front: Interval | None, unpriced: str) -> str:
    """1.083 (1.061–1.102): of the latency of the network all in INT8."""
    if front is None:
        return "not measured" if unpriced else "–"
    return f"{front.estimate:.3f}" + (f" ({front.low:.3f}–{front.high:.3f})" if front.high > front.low else "")


def freed(mix: MixedPrecision) -> str:
    few = mix.keep_float if len(mix.keep_float) < 7 else (*mix.keep_float[:5], f"{len(mix.keep_float) - 5} more")
    return f"{len(mix.keep_float)}: {', '.join(few)}" if mix.keep_float else "none: all in INT8"


def verdict(front: ParetoFront) -> str:
    """What follows, with the switch to write."""
    plain, mix, limit = front.candidates[0].scores.accuracy_drop, front.selection, front.max_drop
    lost = f"All in INT8 it loses {plain.estimate:.2f} points ({plain.low:.2f} to {plain.high:.2f})"
    if limit is not None:
        lost += f", where {limit:g} are allowed"
    drop = mix.scores.accuracy_drop
    with_mix = (
        f"with {len(mix.keep_float)} of its layers in float {drop.estimate:.2f} ({drop.low:.2f} to {drop.high:.2f})"
    )
    at = f", at {price(mix.latency_ratio, '')} of the latency" if mix.latency_ratio else ""
    slow = (
        mix.keep_float
        and mix.latency_ratio
        and front.fp32_latency_ratio
        and mix.latency_ratio.high >= front.fp32_latency_ratio.low
    )
    warned = " That is no faster than FP32: ship the FP32 file." if slow else ""
    if not front.meets_limit:
        return f"{lost}; no mix that was tried meets that: the best loses {with_mix}{at}."
    if not mix.keep_float:
        hint = "" if limit is not None else " Give a limit to have the cheapest mix within it chosen."
        free = "" if front.not_timed_reason else ", and nothing is surely faster so"
        return f"{lost}: nothing has to stay float{free}.{hint}"
    return f"{lost}; {with_mix}{at}. Write {switch(mix)}.{warned}"


def switch(mix: MixedPrecision) -> str:
    return f"quantize.keep_float: {json.dumps(list(mix.keep_float))}"


def basis(front: ParetoFront) -> str:
    """What the numbers rest on: images, metric, machine."""
    name = percentages()[front.metric][0]
    images = f"{name} on {front.images:,} validation images"
    single = f", single layers on {front.layer_images:,}" if front.layer_images < front.images else ""
    there = f"Latency: not measured ({front.not_timed_reason}), so layers are priced by their MACs"
    if front.machine and front.runtime:
        runtime = f"{front.runtime.name} {front.runtime.version}, threads: {front.runtime.threads}"
        there = (
            f"Latency by turns, all in INT8 = 1: {front.machine.processor}, {runtime}, {formatting.when(front.started)}"
        )
    control = f"; A/A control {formatting.near_one(front.aa_ratio)}" if front.aa_ratio else ""
    entries = "".join(f" with {key}={value}" for key, value in front.session_config.items())
    return f"Accuracy: {images}{single}, answered by ONNX Runtime{entries}. {there}{control}. Intervals hold 95 %."


def text(front: ParetoFront) -> str:
    """For a terminal."""
    parts = [aligned(LAYERS, layer_rows(front))] if front.layers else []
    parts += [aligned(MIXES, mix_rows(front)), basis(front), *(f"warning: {w}" for w in front.warnings)]
    return "\n\n".join([*parts, verdict(front)])


def aligned(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    ]
    return "\n".join(lines)


def markdown(front: ParetoFront, plot: str) -> str:
    """A page of its own; `plot` is the file name of the drawing."""
    name = formatting.markdown(f"{front.network} on {front.target}")
    parts = [f"# What INT8 costs in each layer: {name}", formatting.markdown(verdict(front)), f"![]({plot})"]
    if front.layers:
        parts += ["## Single layers", "The one to leave float first is first.", piped(LAYERS, layer_rows(front))]
    parts += ["## Mixes", piped(MIXES, mix_rows(front)), formatting.markdown(basis(front))]
    parts += ["\n".join(f"- warning: {formatting.markdown(w)}" for w in front.warnings)] if front.warnings else []
    return "\n\n".join(parts) + "\n"


def piped(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *(tuple(map(formatting.markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(front: ParetoFront) -> str:
    """Accuracy over latency, or over MACs in float where that was not measured: inline SVG.

    Dots for mixes, labelled by how many layers are in float; a square for the float file; a dashed line at the limit.
    """
    timed, colours = front.fp32_latency_ratio is not None, plots.COLOURS
    shown = ordered(front)
    x = [mix.latency_ratio.estimate if timed and mix.latency_ratio else 100 * mix.float_macs_fraction for mix in shown]
    dots = [(at, mix.scores.accuracy) for at, mix in zip(x, shown, strict=True)]
    edge, fp32 = (
        plots.front(dots),
        (front.fp32_latency_ratio.estimate if front.fp32_latency_ratio else 100.0, front.accuracy),
    )
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    with plots.canvas(f"Mixes of INT8 and float layers: {front.network} on {front.target}", 3.2) as (axes, done):
        axes.set(xlabel="latency, all in INT8 = 1 (left is better)" if timed else "MACs in float, % (left is cheaper)")
        axes.set(ylabel=f"{percentages()[front.metric][0]}, % (up is better)")
        axes.plot(*zip(*edge, strict=True), color=colours["mute"], lw=0.8)
        for mix, dot in zip(shown, dots, strict=True):
            chosen = mix is front.selection
            look: dict[str, Any] = {"fillstyle": "full" if chosen else "none", "color": colours["c1"]}
            axes.plot(*dot, marker="o", ms=9 if chosen else 6, mew=1.5, ls="none", clip_on=False, **look)
            if chosen or dot in edge:
                axes.annotate(str(len(mix.keep_float)), dot, (0, 7), **style)
        axes.plot(*fp32, marker="s", ms=7, color=colours["c3"], ls="none", clip_on=False)
        axes.annotate("FP32", fp32, (0, -13), **style)
        if front.max_drop is not None:
            axes.axhline(fp32[1] - front.max_drop, color=colours["c2"], lw=0.9, ls="--")
        axes.margins(0.08, 0.15)
    return done[0]
