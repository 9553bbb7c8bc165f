"""The report's plots: inline SVG in the page's own colours, so that it follows light and dark mode."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.core import formatting
from edgekd.core.artifact import EpochRecord, Weights
from edgekd.core.bench_result import Measurement
from edgekd.stages.report import plot_labels
from edgekd.utils.text import escape_control_chars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Matplotlib knows no CSS variables: it draws in these, and `inline` puts the variables in.
COLOURS = {"ink": "#010101", "mute": "#010102", "rule": "#010103"} | {f"c{i}": f"#01010{3 + i}" for i in range(1, 6)}
PAPER = {"ink": "#1b2126", "mute": "#5c6770", "rule": "#dde1e5", "c1": "#1f7a5a", "c2": "#b0601a"}  # of an SVG file
WHITE = "#ffffff"
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
AGAIN = " again"  # ends the name of the baseline's second session, the A/A control
BINS = 140  # of a distribution over the width of the plot
CROWD, WIDE = 6, 24  # dots, and letters of a name, for which there is room
LONG = 44  # letters in a row
Places = Sequence[tuple[float, float]]


def accuracy_against_latency(title: str, measurements: Sequence[Measurement], key: str, name: str) -> str:
    """A dot for every model: accuracy (reading `key`, percent) over median latency (ms, log); FILLS by precision.

    Dashed steps join those that no other beats in both. Many models have letters, told below.
    """
    names = [short(m.model.name) for m in measurements]
    coded = len(names) > CROWD or max(map(len, names)) > WIDE
    signs = [lettered(i) for i in range(len(names))] if coded else names
    shown = sorted(zip(signs, measurements, strict=True), key=lambda one: -one[1].metrics[key])
    inks = [COLOURS[LOOK[m.model.role][0]] for m in measurements]
    with canvas(title, 3.6, rows=len(names) if coded else 0) as (axes, drawn):
        x, y = ([m.metrics[reading] for _, m in shown] for reading in ("p50_ms", key))
        spare = max(0.15 * (max(y) - min(y)), 0.5)
        axes.set(xscale="log", xlabel="median latency, ms (log; left is better)", ylabel=f"{name}, % (up is better)")
        axes.set(xlim=(min(x) / 1.4, max(x) * 1.4), ylim=(min(y) - spare, max(y) + spare))
        log_ticks(axes.xaxis)
        edge = front(zip(x, y, strict=True))
        axes.plot(*zip(*edge, strict=True), c=COLOURS["c1"], lw=0.9, ls="--", ds="steps-post")
        for (_, m), x_ms, share in zip(shown, x, y, strict=True):
            colour, marker = LOOK[m.model.role]
            dot = {"marker": marker, "fillstyle": FILLS[m.model.precision][1], "color": COLOURS[colour]}
            axes.plot([x_ms], [share], ms=7, mew=1.6, ls="none", clip_on=False, **dot)  # type: ignore[arg-type]
        label_dots(axes, list(zip(x, y, strict=True)), [sign for sign, _ in shown], edge)
        if coded:
            legend(axes, list(zip(signs, inks, names, strict=True)))
    return drawn[0]


def label_dots(axes: Axes, places: Places, names: Sequence[str], steps: Places) -> None:
    """Beside each dot its name, with a line to it where there is no room; none on the line of `steps`."""
    dots, ends = ([tuple(map(float, axes.transData.transform(p))) for p in of] for of in (places, steps))
    taken: list[plot_labels.Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for (x, y), (right, top) in pairwise(ends):
        taken += [(x, y - 2, right, y + 2), (right - 2, y, right + 2, top)]
    line = {"arrowstyle": "-", "color": COLOURS["mute"], "lw": 0.6, "shrinkA": 1, "shrinkB": 4}
    for name, place, offset in zip(names, places, plot_labels.offsets(axes, dots, names, taken), strict=True):
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "parse_math": False}
        axes.annotate(name, place, offset, arrowprops=line if offset[1] else None, **style)


def front(dots: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, accuracy): those that no other beats in both, the cheapest first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(dots, key=lambda dot: (dot[0], -dot[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def lettered(place: int) -> str:
    """A to Z, then A1, B1 ..."""
    return LETTERS[place % 26] + (str(place // 26) if place > 25 else "")


def legend(axes: Axes, rows: Sequence[tuple[str, str, str]]) -> None:
    """What letters mean, below the axes: (letter, its colour, text). Of a canvas with as many rows."""
    style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
    for place, (letter, colour, text) in enumerate(rows):
        axes.annotate(letter, (0, 0), (0, -44 - 12 * place), color=colour, fontsize=8.5, **style)
        axes.annotate(text, (0, 0), (16, -44 - 12 * place), fontsize=8.5, **style)


def short(name: str) -> str:
    """A name that fits into a plot, with both ends; the tables have it in full."""
    name = escape_control_chars(name)
    return name if len(name) <= LONG else f"{name[: LONG - 20]}…{name[-19:]}"


def latency_distributions(title: str, names: Sequence[str], ms: Sequence[np.ndarray]) -> str:
    """A row per model from its raw calls (ms): how many took so long, a tick for each, a bar at the median.

    The A/A control stands below its twin.
    """
    place = {name: at for at, name in enumerate(names)}
    rows = sorted(
        zip(names, ms, strict=True),
        key=lambda row: (place.get(row[0].removesuffix(AGAIN), place[row[0]]), place[row[0]]),
    )
    low, high = min(float(v.min()) for _, v in rows) / 1.05, max(float(v.max()) for _, v in rows) * 1.05
    with canvas(title, 0.75 + 0.58 * len(rows), left=0.1) as (axes, drawn):
        axes.set(xscale="log", xlim=(low, high), ylim=(len(rows) - 0.45, -0.5), yticks=[])
        axes.set(xlabel="latency of one call, ms (log; left is better)")
        axes.spines["left"].set_visible(False)
        log_ticks(axes.xaxis)
        for row, (name, values) in enumerate(rows):
            median = float(np.percentile(values, 50, method="inverted_cdf"))  # nearest rank, as the tables have it
            control = " (A/A control)" if name.endswith(AGAIN) and name.removesuffix(AGAIN) in place else ""
            label = f"{short(name)}{control}: {formatting.figures(median)} ms"
            style: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "bottom", "parse_math": False}
            axes.annotate(label, (0, row - 0.14), **style)
            hill(axes, values, low, high, row + 0.3)
            axes.plot([median, median], [row - 0.08, row + 0.3], color=COLOURS["ink"], lw=1.2, solid_capstyle="butt")
    return drawn[0]


def hill(axes: Axes, values: np.ndarray, low: float, high: float, ground: float) -> None:
    """How many of `values` lie where between `low` and `high`, as an area on the `ground`; below it a tick for each."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    edges = np.geomspace(low, high, BINS + 1)
    counts = np.histogram(values, edges)[0]
    shown = np.convolve(counts, (1, 1, 1), "same") > 0  # of a stretch without any, the ends will do
    heights = 0.38 * counts[shown] / counts.max()
    axes.fill(np.sqrt(edges[1:] * edges[:-1])[shown], ground - heights, color=COLOURS["c1"], alpha=0.45, lw=0)
    spot = np.round(330 * np.log(values / low) / np.log(high / low))  # points: finer is unseen
    ends = [(v, y) for v in values[np.unique(spot, return_index=True)[1]] for y in (ground + 0.03, ground + 0.11)]
    ticks = Outline(ends, [Outline.MOVETO, Outline.LINETO] * (len(ends) // 2))
    axes.add_patch(PathPatch(ticks, fc="none", ec=COLOURS["mute"], lw=0.5))


def training_curve(title: str, weights: Weights) -> str:
    """Training loss over all epochs of all phases; losses called `group:part` are summed within their group."""
    from matplotlib.ticker import MaxNLocator

    curves = [[grouped(epoch) for epoch in phase.curve] for phase in weights.phases]
    groups = list(dict.fromkeys(group for curve in curves for sums in curve for group in sums if group))
    look = {"": ("", COLOURS["ink"])}  # group -> letter, colour
    look |= {group: (lettered(at), COLOURS[f"c{1 + at % 5}"]) for at, group in enumerate(groups)}
    with canvas(title, 2.7, rows=len(groups)) as (axes, drawn):
        logarithmic = all(loss > 0 for curve in curves for sums in curve for loss in sums.values())
        axes.set(xlabel="epoch", ylabel=f"training loss{' (log)' if logarithmic else ''}")
        start, dot = 0, 2.5 if sum(map(len, curves)) <= 60 else 0
        for number, curve in enumerate(curves, 1):
            for group in dict.fromkeys(group for sums in curve for group in sums):
                letter, colour = look[group]
                line = [(start + epoch, sums[group]) for epoch, sums in enumerate(curve, 1) if group in sums]
                axes.plot(*zip(*line, strict=True), color=colour, lw=1.4, marker="o", ms=dot)
                axes.annotate(letter, line[-1], (3, 3), textcoords="offset points", color=colour, fontsize=8)
            if start and curve:
                axes.axvline(start + 0.5, color=COLOURS["mute"], lw=0.7, ls=":")
            middle = start + 0.5 + len(curve) / 2
            axes.annotate(str(number), (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
            start += len(curve)
        axes.set_xlim(0.5, start + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if logarithmic:
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
        legend(axes, [(*look[group], short(group)) for group in groups])
    return drawn[0]


def grouped(epoch: EpochRecord) -> dict[str, float]:
    """The sum of an epoch's losses, for each group; losses without one are in the group ""."""
    sums: dict[str, float] = {}
    for name, loss in epoch.losses.items():
        group = name.rpartition(":")[0]
        sums[group] = sums.get(group, 0.0) + loss
    return sums


def page(svg: str) -> str:
    """An inline drawing as a file of its own, in the report's light colours."""
    colours = ("#1b2126", "#5c6770", "#dde1e5", "#1f7a5a", "#b0601a", "#4667a8", "#8a4a94", "#6d6a1c")
    own = "".join(f"--{name}: {colour}; " for name, colour in zip(COLOURS, colours, strict=True))
    style = f"<style>:root {{ {own}background: #fff; font-family: sans-serif }}</style>"
    head, _, rest = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
    return f"{head}>{style}{rest}"


def log_ticks(axis: Axis) -> None:
    """Round numbers on a logarithmic axis, at least four if they can be had."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    decades = [10.0**k for k in range(-7, 8)]
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [s * d for d in decades for s in steps if low <= s * d <= high]
        if len(ticks) >= 4:
            break
    else:
        ticks = [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


@contextmanager
def canvas(title: str, height: float, left: float = 0.6, rows: int = 0) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and a list that holds the SVG when the block is over.

    The drawing is `height` inches high, `left` of them beside the axes; and `rows` of a legend higher.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Only the width of such a letter is unknown here; the reader's browser has the font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": title})
        below, height = 0.55 + 12 / 72 * rows, height + 12 / 72 * rows
        figure = Figure(figsize=(WIDTH, height))
        sides = {"left": left / WIDTH, "right": 1 - 0.15 / WIDTH, "bottom": below / height, "top": 1 - 0.25 / height}
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
    head = f'<svg role="img" aria-label="{html.escape(escape_control_chars(title))}"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', lambda _: head, svg, count=1)


def standing_alone(svg: str) -> str:
    """A page's element as a file of its own: with its name space, its colours and white paper."""
    for name, colour in PAPER.items():
        svg = svg.replace(f"var(--{name})", colour)
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    paper = f'<rect width="100%" height="100%" fill="{WHITE}"/>'
    return re.sub(r"<svg([^>]*)>", lambda found: f"{head}{found[1]}>{paper}", svg, count=1)
