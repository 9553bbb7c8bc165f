"""Layers kept float, in words: the ranking, the frontier and what follows from them, for a terminal and as Markdown."""

from __future__ import annotations

import json
from typing import Any

from edgekd.core.mix import Frontier, Marks, Mix
from edgekd.core.trial import Interval
from edgekd.stages.report import plots, words
from edgekd.stages.report.figures import PERCENT

LAYERS = ("layer", "operator", "MACs", "signal to noise, dB", "accuracy, %", "points lost", "latency if float")
MIXES = ("layers in float", "MACs in float, %", "signal to noise, dB", "accuracy, %", "points lost", "latency")


def layer_rows(found: Frontier) -> list[tuple[str, ...]]:
    """The ranking: a row for each layer, the one to free first is first; heads are LAYERS."""
    return [
        (la.name, la.op, words.count(la.macs), *judged(la.alone), price(la.price, found.unpriced))
        for la in found.layers
    ]


def mix_rows(found: Frontier) -> list[tuple[str, ...]]:
    """The frontier: a row for each mix, in the order of layers in float, then one for FP32; heads are MIXES."""
    rows = [
        (freed(mix), f"{100 * mix.macs:.0f}", *judged(mix.marks), price(mix.price, found.unpriced))
        for mix in ordered(found)
    ]
    return [*rows, ("all: FP32", "100", "–", f"{found.accuracy:.2f}", "0.00", price(found.fp32, found.unpriced))]


def ordered(found: Frontier) -> list[Mix]:
    return sorted(found.mixes, key=lambda mix: len(mix.floats))


def judged(marks: Marks) -> tuple[str, str, str]:
    drop = marks.drop
    return f"{marks.snr_db:.1f}", f"{marks.accuracy:.2f}", f"{drop.mid:.2f} ({drop.low:.2f} to {drop.high:.2f})"


def price(found: Interval | None, unpriced: str) -> str:
    """1.083 (1.061–1.102): of the latency of the network all in INT8."""
    if found is None:
        return "not measured" if unpriced else "–"
    return f"{found.mid:.3f}" + (f" ({found.low:.3f}–{found.high:.3f})" if found.high > found.low else "")


def freed(mix: Mix) -> str:
    few = mix.floats if len(mix.floats) < 7 else (*mix.floats[:5], f"{len(mix.floats) - 5} more")
    return f"{len(mix.floats)}: {', '.join(few)}" if mix.floats else "none: all in INT8"


def verdict(found: Frontier) -> str:
    """What follows, with the switch to write."""
    plain, mix, limit = found.mixes[0].marks.drop, found.mix, found.max_drop
    lost = f"All in INT8 it loses {plain.mid:.2f} points ({plain.low:.2f} to {plain.high:.2f})"
    if limit is not None:
        lost += f", where {limit:g} are allowed"
    drop = mix.marks.drop
    with_mix = f"with {len(mix.floats)} of its layers in float {drop.mid:.2f} ({drop.low:.2f} to {drop.high:.2f})"
    at = f", at {price(mix.price, '')} of the latency" if mix.price else ""
    slow = mix.floats and mix.price and found.fp32 and mix.price.high >= found.fp32.low
    warned = " That is no faster than FP32: ship the FP32 file." if slow else ""
    if not found.met:
        return f"{lost}; no mix that was tried meets that: the best loses {with_mix}{at}."
    if not mix.floats:
        hint = "" if limit is not None else " Give a limit to have the cheapest mix within it chosen."
        free = "" if found.unpriced else ", and nothing is surely faster so"
        return f"{lost}: nothing has to stay float{free}.{hint}"
    return f"{lost}; {with_mix}{at}. Write {switch(mix)}.{warned}"


def switch(mix: Mix) -> str:
    return f"quantize.floats: {json.dumps(list(mix.floats))}"


def basis(found: Frontier) -> str:
    """What the numbers rest on: images, metric, machine."""
    name = PERCENT[found.metric][0]
    images = f"{name} on {found.images:,} validation images"
    single = f", single layers on {found.ranked:,}" if found.ranked < found.images else ""
    there = f"Latency: not measured ({found.unpriced}), so layers are priced by their MACs"
    if found.machine and found.runtime:
        runtime = f"{found.runtime.name} {found.runtime.version}, threads: {found.runtime.threads}"
        there = f"Latency by turns, all in INT8 = 1: {found.machine.processor}, {runtime}, {words.when(found.started)}"
    control = f"; A/A control {words.near_one(found.aa)}" if found.aa else ""
    entries = "".join(f" with {key}={value}" for key, value in found.session_config.items())
    return f"Accuracy: {images}{single}, answered by ONNX Runtime{entries}. {there}{control}. Intervals hold 95 %."


def text(found: Frontier) -> str:
    """For a terminal."""
    parts = [aligned(LAYERS, layer_rows(found))] if found.layers else []
    parts += [aligned(MIXES, mix_rows(found)), basis(found), *(f"warning: {w}" for w in found.warnings)]
    return "\n\n".join([*parts, verdict(found)])


def aligned(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    ]
    return "\n".join(lines)


def markdown(found: Frontier, plot: str) -> str:
    """A page of its own; `plot` is the file name of the drawing."""
    name = words.markdown(f"{found.network} on {found.target}")
    parts = [f"# What INT8 costs in each layer: {name}", words.markdown(verdict(found)), f"![]({plot})"]
    if found.layers:
        parts += ["## Single layers", "The one to leave float first is first.", piped(LAYERS, layer_rows(found))]
    parts += ["## Mixes", piped(MIXES, mix_rows(found)), words.markdown(basis(found))]
    parts += ["\n".join(f"- warning: {words.markdown(w)}" for w in found.warnings)] if found.warnings else []
    return "\n\n".join(parts) + "\n"


def piped(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *(tuple(map(words.markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def drawn(found: Frontier) -> str:
    """Accuracy over latency, or over MACs in float where that was not measured: inline SVG.

    Dots for mixes, labelled by how many layers are in float; a square for the float file; a dashed line at the limit.
    """
    timed, colours = found.fp32 is not None, plots.COLOURS
    shown = ordered(found)
    x = [mix.price.mid if timed and mix.price else 100 * mix.macs for mix in shown]
    dots = [(at, mix.marks.accuracy) for at, mix in zip(x, shown, strict=True)]
    edge, fp32 = plots.front(dots), (found.fp32.mid if found.fp32 else 100.0, found.accuracy)
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    with plots.canvas(f"Mixes of INT8 and float layers: {found.network} on {found.target}", 3.2) as (axes, done):
        axes.set(xlabel="latency, all in INT8 = 1 (left is better)" if timed else "MACs in float, % (left is cheaper)")
        axes.set(ylabel=f"{PERCENT[found.metric][0]}, % (up is better)")
        axes.plot(*zip(*edge, strict=True), color=colours["mute"], lw=0.8)
        for mix, dot in zip(shown, dots, strict=True):
            chosen = mix is found.mix
            look: dict[str, Any] = {"fillstyle": "full" if chosen else "none", "color": colours["c1"]}
            axes.plot(*dot, marker="o", ms=9 if chosen else 6, mew=1.5, ls="none", clip_on=False, **look)
            if chosen or dot in edge:
                axes.annotate(str(len(mix.floats)), dot, (0, 7), **style)
        axes.plot(*fp32, marker="s", ms=7, color=colours["c3"], ls="none", clip_on=False)
        axes.annotate("FP32", fp32, (0, -13), **style)
        if found.max_drop is not None:
            axes.axhline(fp32[1] - found.max_drop, color=colours["c2"], lw=0.9, ls="--")
        axes.margins(0.08, 0.15)
    return done[0]
