"""The report's plots: inline SVG in the page's own colours, so that it follows light and dark mode."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.core.artifact import EpochRecord, Weights
from edgekd.core.trial import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib knows no CSS variables: it draws in these, and `inline` puts the variables in.
COLOURS = {"ink": "#010101", "mute": "#010102", "rule": "#010103"} | {f"c{i}": f"#01010{3 + i}" for i in range(1, 6)}
LOOK = {"teacher": ("c3", "s"), "student": ("c1", "o"), "baseline": ("c2", "^")}  # role: colour, marker
FILLS = {"int8": ("filled", "full"), "fp16": ("half filled", "left"), "fp32": ("hollow", "none")}  # in words; of dots
STYLE: dict[Any, Any] = {  # matplotlib's settings
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "figure.dpi": 72,  # so that a pixel is a point
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["mute"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.5,
    "xtick.color": COLOURS["mute"],
    "ytick.color": COLOURS["mute"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
WIDTH = 4.8  # inches: text is legible when a phone shows the plot at its own width
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Box = tuple[float, float, float, float]  # left, bottom, right, top in points


def accuracy_against_latency(title: str, measurements: Sequence[Measurement], key: str, name: str) -> str:
    """A dot for every model: accuracy (reading `key`, percent) over median latency (ms, log); FILLS by precision."""
    shown = sorted(measurements, key=lambda m: -m.readings[key])
    with canvas(title, 3.6) as (axes, drawn):
        x, y = ([m.readings[reading] for m in shown] for reading in ("p50_ms", key))
        spare = max(0.15 * (max(y) - min(y)), 0.5)
        axes.set(xscale="log", xlabel="median latency, ms (log; left is better)", ylabel=f"{name}, % (up is better)")
        axes.set(xlim=(min(x) / 1.4, max(x) * 1.4), ylim=(min(y) - spare, max(y) + spare))
        log_ticks(axes)
        for m, x_ms, share in zip(shown, x, y, strict=True):
            colour, marker = LOOK[m.contestant.role]
            dot = {"marker": marker, "fillstyle": FILLS[m.contestant.precision][1], "color": COLOURS[colour]}
            axes.plot([x_ms], [share], ms=7, mew=1.6, ls="none", clip_on=False, **dot)  # type: ignore[arg-type]
        dots = [tuple(map(float, axes.transData.transform(place))) for place in zip(x, y, strict=True)]
        names = [short(m.contestant.name) for m in shown]
        line = {"arrowstyle": "-", "color": COLOURS["mute"], "lw": 0.6, "shrinkA": 1, "shrinkB": 4}
        for name, place, offset in zip(names, zip(x, y, strict=True), label_offsets(axes, dots, names), strict=True):
            style: dict[str, Any] = {
                "textcoords": "offset points",
                "va": "center",
                "arrowprops": line if offset[1] else None,
            }
            axes.annotate(name, place, offset, parse_math=False, **style)
    return drawn[0]


def label_offsets(axes: Axes, dots: Sequence[tuple[float, ...]], names: Sequence[str]) -> list[tuple[float, float]]:
    """Where each dot's label begins, in points from it: the nearest place that covers no dot and no other label."""
    frame = axes.get_window_extent()
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    rows = sorted((12.0 * k for k in range(-12, 13)), key=abs)
    found = []
    for (x, y), name in zip(dots, names, strict=True):
        wide = 5.6 * len(name)  # a letter of 9.5 points is about that wide
        middle = max(frame.x0 + 2, min(x - wide / 2, frame.x1 - wide))
        places = [(left, y + row) for row in rows for left in (x + 9, x - 9 - wide, middle)]
        boxes = [(left, level - 6, left + wide, level + 6) for left, level in places]
        free = [
            box
            for box in boxes
            if frame.x0 <= box[0] and box[2] <= frame.x1 + 8 and frame.y0 <= box[1] and box[3] <= frame.y1 + 6
            if not any(overlap(box, other) for other in taken)
        ]
        box = (free or boxes)[0]  # in a crowd that leaves no room, labels may cover each other
        taken.append(box)
        found.append((box[0] - x, box[1] + 6 - y))
    return found


def short(name: str) -> str:
    """A name that fits into a plot; the tables have it in full."""
    return name if len(name) <= 44 else f"{name[:43]}…"


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def latency_distributions(title: str, names: Sequence[str], ms: Sequence[np.ndarray]) -> str:
    """A row per model from its raw calls (ms): ticks for calls, a box over the middle half, a bar at the median."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    low, high = min(float(v.min()) for v in ms), max(float(v.max()) for v in ms)
    with canvas(title, 0.75 + 0.56 * len(names), left=0.1) as (axes, drawn):
        axes.set(xscale="log", xlim=(low / 1.05, high * 1.05), ylim=(len(names) - 0.45, -0.5), yticks=[])
        axes.set(xlabel="latency of one call, ms (log; left is better)")
        axes.spines["left"].set_visible(False)
        log_ticks(axes)
        for row, (name, values) in enumerate(zip(names, ms, strict=True)):
            first, half, third = np.percentile(values, (25, 50, 75))
            spot = np.round(540 * np.log(values / low) / max(np.log(high / low), 1e-9))  # half points: finer is unseen
            seen = values[np.unique(spot, return_index=True)[1]]
            ends = [(v, y) for v in seen.tolist() for y in (row + 0.28, row + 0.42)]
            ticks = Outline(ends, [Outline.MOVETO, Outline.LINETO] * len(seen))
            axes.add_patch(PathPatch(ticks, fc="none", ec=COLOURS["mute"], lw=0.5))
            axes.fill(
                [first, third, third, first], [row, row, row + 0.22, row + 0.22], color=COLOURS["c1"], alpha=0.35, lw=0
            )
            axes.plot([half, half], [row - 0.03, row + 0.25], color=COLOURS["c1"], lw=2, solid_capstyle="butt")
            axes.annotate(
                short(name), (0, row - 0.12), xycoords=("axes fraction", "data"), va="bottom", parse_math=False
            )
    return drawn[0]


def training_curve(title: str, weights: Weights) -> str:
    """Training loss over all epochs of all phases; losses called `group:part` are summed within their group."""
    from matplotlib.ticker import MaxNLocator

    with canvas(title, 2.7) as (axes, drawn):
        axes.set(xlabel="epoch", ylabel="training loss")
        groups: dict[str, str] = {}  # name -> letter; only of losses that name a group
        start = 0
        for number, phase in enumerate(weights.phases, 1):
            lines: dict[str, list[float]] = {}
            for epoch in phase.curve:
                for group, loss in grouped(epoch).items():
                    lines.setdefault(group, []).append(loss)
            for group, losses in lines.items():
                letter = groups.setdefault(group, LETTERS[len(groups) % 26]) if group else ""
                colour = COLOURS[f"c{1 + list(groups).index(group) % 5}"] if group else COLOURS["ink"]
                epochs = [start + 1 + i for i in range(len(losses))]
                axes.plot(epochs, losses, color=colour, lw=1.4, marker="o", ms=2.5)
                end = (epochs[-1], losses[-1])
                axes.annotate(letter, end, (3, 3), textcoords="offset points", color=colour, fontsize=8)
            if start:
                axes.axvline(start + 0.5, color=COLOURS["mute"], lw=0.7, ls=":")
            middle = start + 0.5 + len(phase.curve) / 2
            axes.annotate(str(number), (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
            start += len(phase.curve)
        axes.set_xlim(0.5, start + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for row, (group, letter) in enumerate(groups.items()):
            place = (0.99, 0.97 - 0.085 * row)
            axes.annotate(
                f"{letter}  {group}",
                place,
                xycoords="axes fraction",
                ha="right",
                va="top",
                fontsize=8,
                parse_math=False,
            )
    return drawn[0]


def grouped(epoch: EpochRecord) -> dict[str, float]:
    """The sum of an epoch's losses, for each group; losses without one are in the group ""."""
    sums: dict[str, float] = {}
    for name, loss in epoch.losses.items():
        group = name.rpartition(":")[0]
        sums[group] = sums.get(group, 0.0) + loss
    return sums


def frontier(
    title: str,
    axis: str,
    height: str,
    dots: Sequence[tuple[float, float, bool, str]],
    fp32: tuple[float, float],
    max_drop: float | None,
) -> str:
    """Mixes of INT8 and float layers: dots (x, accuracy, whether it was chosen, label), and the float file.

    A line joins those that no other beats in both; `max_drop` draws the limit, so many points below the float file.
    """
    with canvas(title, 3.2) as (axes, drawn):
        axes.set(xlabel=axis, ylabel=height)
        edge: list[tuple[float, float]] = []  # nothing that is cheaper is as accurate
        for x, y, *_ in sorted(dots, key=lambda dot: (dot[0], -dot[1])):
            if not edge or y > edge[-1][1]:
                edge.append((x, y))
        axes.plot(*zip(*edge, strict=True), color=COLOURS["mute"], lw=0.8)
        for x, y, chosen, name in dots:
            look: dict[str, Any] = {"fillstyle": "full" if chosen else "none", "color": COLOURS["c1"]}
            axes.plot([x], [y], marker="o", ms=9 if chosen else 6, mew=1.5, ls="none", clip_on=False, **look)
            if chosen or (x, y) in edge:
                axes.annotate(name, (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes.plot(*([v] for v in fp32), marker="s", ms=7, color=COLOURS["c3"], ls="none", clip_on=False)
        axes.annotate("FP32", fp32, (0, -13), textcoords="offset points", ha="center", fontsize=8)
        if max_drop is not None:
            axes.axhline(fp32[1] - max_drop, color=COLOURS["c2"], lw=0.9, ls="--")
        axes.margins(0.08, 0.15)
    return drawn[0]


def page(svg: str) -> str:
    """An inline drawing as a file of its own, in the report's light colours."""
    colours = ("#1b2126", "#5c6770", "#dde1e5", "#1f7a5a", "#b0601a", "#4667a8", "#8a4a94", "#6d6a1c")
    own = "".join(f"--{name}: {colour}; " for name, colour in zip(COLOURS, colours, strict=True))
    style = f"<style>:root {{ {own}background: #fff; font-family: sans-serif }}</style>"
    head, _, rest = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
    return f"{head}>{style}{rest}"


def log_ticks(axes: Axes) -> None:
    """Round numbers on a logarithmic x axis, at least three if they can be had, never powers of ten alone."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    decades = [10.0**k for k in range(-7, 8)]
    for steps in ((1, 10), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [s * d for d in decades for s in steps if low <= s * d <= high]
        if len(ticks) >= 4:
            break
    else:
        ticks = [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


@contextmanager
def canvas(title: str, height: float, left: float = 0.6) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, `height` inches high, and a list that holds the SVG when the block is over."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Only the width of such a letter is unknown here; the reader's browser has the font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": title})
        figure = Figure(figsize=(WIDTH, height))
        sides = {"left": left / WIDTH, "right": 1 - 0.15 / WIDTH, "bottom": 0.55 / height, "top": 1 - 0.25 / height}
        figure.subplots_adjust(**sides)
        axes = figure.add_subplot()
        yield axes, drawn
        buffer = io.StringIO()
        unwanted = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unwanted)
        drawn.append(inline(buffer.getvalue(), title))


def inline(svg: str, title: str) -> str:
    """An SVG file's text as an element of an HTML page: no prologue, no style of its own, the page's colours."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"[\"(]#([\w.]+)[\")]", svg))

    def clean(found: re.Match[str]) -> str:
        tag = re.sub(r' xmlns(:xlink)?="[^"]*"| font-family: [^;"]*;?', "", found[0]).replace("xlink:href", "href")
        tag = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag)
        tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
        for name, colour in COLOURS.items():
            tag = tag.replace(colour, f"var(--{name})")
        return tag

    svg = re.sub(r"<[^>]*>", clean, svg)  # tags only: text may look like anything
    head = f'<svg role="img" aria-label="{html.escape(title)}"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', lambda _: head, svg, count=1)
