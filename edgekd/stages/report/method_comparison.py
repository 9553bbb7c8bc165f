"""What a comparison of methods found: means over seeds, paired differences and costs, as text, JSON and SVG."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.core import formatting, serialization
from edgekd.core.bench_result import Interval
from edgekd.stages.report import plots
from edgekd.stages.report.tables import PERCENT, SCORES

SCHEMA = 1  # of compare.json
SHARED = ("epochs", "train", "labels_per_class", "unlabelled")  # settings of the student that all contenders have
ALONE = "one seed: no interval"


@dataclass(frozen=True)
class Run:
    """One student, taught with one seed."""

    seed: int
    readings: dict[str, float]  # metric name -> value on the test images
    valid_accuracy: float | None  # 0 to 1
    parameters: int
    macs: int  # of one image
    sha256: str  # of its weights
    notes: dict[str, Any] | None  # what the method chose
    # of the lesson that it is from; all students of one lesson share them
    epochs: int
    epoch_seconds: float  # mean; interruptions not counted
    seconds: float | None  # with what the method did between phases; None, as the next two: it was interrupted
    cpu_seconds: float | None
    memory_bytes: int | None  # at its peak
    conditions: str  # processor, threads, lessons at a time


@dataclass(frozen=True)
class Standing:
    """One row: a contender's student, over all seeds."""

    name: str
    runs: tuple[Run, ...]
    mean: float  # of the score
    deviation: float | None  # sample standard deviation; None of a single seed
    difference: float | None  # to the baseline, mean over the seeds of both; None of the baseline itself
    interval: Interval | None  # of that difference
    verdict: str  # "better", "worse", "no measurable difference", "baseline", or why there is none


@dataclass(frozen=True)
class Teacher:
    name: str
    readings: dict[str, float]  # empty: it knows other classes
    parameters: int
    macs: int


@dataclass(frozen=True)
class Comparison:
    name: str
    edgekd: str  # version
    created: str  # UTC, ISO 8601
    command: str
    score: str  # the metric that is compared
    seeds: tuple[int, ...]
    baseline: str  # name of its row
    test: int  # images
    standings: tuple[Standing, ...]
    teachers: tuple[Teacher, ...]
    contenders: dict[str, dict[str, Any]]  # label -> model and method with all settings
    config: dict[str, Any]
    versions: dict[str, str]
    system: str


def scored(readings: Iterable[str]) -> str:
    """The metric that is the accuracy of a task."""
    return next(name for name in SCORES if name in readings)


def standings(rows: dict[str, tuple[Run, ...]], baseline: str, score: str) -> tuple[Standing, ...]:
    """What the runs of each row say, in the order of the rows."""
    base = {run.seed: run.readings[score] for run in rows[baseline]}
    made = []
    for name, runs in rows.items():
        values = [run.readings[score] for run in runs]
        paired = [run.readings[score] - base[run.seed] for run in runs if run.seed in base]
        same = name == baseline
        interval = None if same else paired_interval(paired)
        made.append(
            Standing(
                name=name,
                runs=runs,
                mean=statistics.mean(values),
                deviation=statistics.stdev(values) if len(values) > 1 else None,
                difference=statistics.mean(paired) if paired and not same else None,
                interval=interval,
                verdict="baseline" if same else verdict(interval),
            )
        )
    return tuple(made)


def paired_interval(differences: Sequence[float]) -> Interval | None:
    """Mean of paired differences with its 95 % interval (Student's t); None of fewer than two."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    count = len(differences)
    if count < 2:
        return None
    mean = statistics.mean(differences)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean - half, mean, mean + half)


def verdict(difference: Interval | None) -> str:
    """A difference counts when its interval excludes 0. Of a score whose higher value is the better one."""
    if difference is None:
        return ALONE
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no measurable difference"


def median(runs: Sequence[Run], value: Callable[[Run], float | None]) -> float | None:
    """Over the runs that know it."""
    known = [v for v in map(value, runs) if v is not None]
    return statistics.median(known) if known else None


def table(made: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row of cells for every standing."""
    others = [name for name in made.standings[0].runs[0].readings if name != made.score]
    base = next(s for s in made.standings if s.name == made.baseline)
    base_epoch = median(base.runs, lambda r: r.epoch_seconds)
    heads = [
        "student",
        f"{PERCENT[made.score][0]}, %",
        "sd",
        f"to {made.baseline} (95 %)",
        "verdict",
        *others,
        "valid, %",
    ]
    heads += ["parameters", "MACs", "lesson, s", "CPU, s", "epoch, s", "epoch, x", "memory, MB"]
    rows = []
    for s in made.standings:
        means = [f"{statistics.mean(r.readings[name] for r in s.runs):.4g}" for name in others]
        epoch = median(s.runs, lambda r: r.epoch_seconds)
        costs: list[tuple[float | None, Callable[[float], str]]] = [
            (median(s.runs, lambda r: r.valid_accuracy), lambda v: f"{100 * v:.{formatting.decimals(made.test)}f}"),
            (median(s.runs, lambda r: r.parameters), formatting.count),
            (median(s.runs, lambda r: r.macs), formatting.count),
            (median(s.runs, lambda r: r.seconds), formatting.figures),
            (median(s.runs, lambda r: r.cpu_seconds), formatting.figures),
            (epoch, formatting.figures),
            (epoch / base_epoch if epoch and base_epoch else None, lambda v: f"{v:.2f}"),
            (median(s.runs, lambda r: r.memory_bytes), lambda v: f"{v / 1e6:,.0f}"),
        ]
        cells = ["–" if value is None else show(value) for value, show in costs]
        deviation = "–" if s.deviation is None else f"{s.deviation:.2f}"
        rows.append([s.name, f"{s.mean:.2f}", deviation, difference(s), s.verdict, *means, *cells])
    return heads, rows


def difference(s: Standing) -> str:
    """+1.20 (+0.40 to +2.00): in points."""
    if s.difference is None:
        return "–"
    spread = f" ({s.interval.low:+.2f} to {s.interval.high:+.2f})" if s.interval else ""
    return f"{s.difference:+.2f}{spread}"


def text(made: Comparison) -> str:
    """The comparison for a terminal."""
    heads, rows = table(made)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in (heads, *rows)]
    return "\n".join([*lines, *remarks(made)])


def remarks(made: Comparison) -> list[str]:
    """What a reader must know beside the table."""
    seeds = ", ".join(map(str, made.seeds))
    runs = [run for s in made.standings for run in s.runs]
    conditions = sorted({run.conditions for run in runs})
    found = [teacher_line(t, made) for t in made.teachers]
    found.append(
        f"{made.test:,} test images, read once at the end; seeds {seeds}. Differences are paired by seed; "
        "their intervals are Student's t, over seeds, for these images. Costs are medians; memory is a process's peak; "
        f"epochs are of the same images for all, x is against {made.baseline}."
    )
    if len(made.seeds) == 1:
        found.append("One seed says nothing about the next: there are no intervals. Use --seeds 3 or more.")
    if any(run.seconds is None for run in runs):
        found.append("Lessons that were interrupted are left out of the medians of seconds and memory.")
    found.append(f"On: {'; '.join(conditions)}.")
    if len(conditions) > 1:
        found.append("Not all were taught under the same conditions: their times do not compare.")
    return found


def teacher_line(t: Teacher, made: Comparison) -> str:
    known = f"{t.readings[made.score]:.2f} %" if t.readings else "of other classes"
    return f"{t.name}: {known}, {formatting.count(t.parameters)} parameters, {formatting.count(t.macs)} MACs."


def markdown(made: Comparison) -> str:
    """The comparison as a Markdown file beside its plot."""
    heads, rows = table(made)
    lines = [f"# {formatting.markdown(made.name)}: methods compared", ""]
    lines += ["```", made.command, "```", "", "![Every seed, mean and standard deviation](compare.svg)", ""]
    lines += [row(heads), row(["---"] * len(heads), False), *map(row, rows), ""]
    for remark in remarks(made):
        lines += [formatting.markdown(remark), ""]
    lines += ["## Each seed", "", row(["student", *(f"seed {seed}" for seed in made.seeds)])]
    lines.append(row(["---"] * (1 + len(made.seeds)), False))
    for s in made.standings:
        by_seed = {run.seed: f"{run.readings[made.score]:.2f}" for run in s.runs}
        lines.append(row([s.name, *(by_seed.get(seed, "–") for seed in made.seeds)]))
    chosen = [f"- {formatting.markdown(line)}" for line in choices(made)]
    lines += ["", "## What was chosen", "", *chosen] if chosen else []
    shared = {key: value for key, value in made.config["student"].items() if key in SHARED}
    lines += ["", "## Settings", "", f"- all: `{json.dumps(shared)}`"]
    lines += [f"- {formatting.markdown(label)}: `{json.dumps(chosen)}`" for label, chosen in made.contenders.items()]
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    lines += ["", f"Made by edgekd {made.edgekd}, {formatting.when(made.created)}; {versions}; {made.system}."]
    return "\n".join(lines) + "\n"


def choices(made: Comparison) -> Iterator[str]:
    """A line for each lesson that noted something: the route that won, or all notes, shortened."""
    for label in made.contenders:
        own = (s for s in made.standings if s.name == label or s.name.startswith((f"{label}/", f"{label} ")))
        runs = next(own).runs  # all students of one lesson have its notes
        yield from (f"{label}, seed {run.seed}: {formatting.chosen(run.notes)}" for run in runs if run.notes)


def row(cells: Iterable[str], escape: bool = True) -> str:
    return f"| {' | '.join(formatting.markdown(c) if escape else c for c in cells)} |"


def drawn(made: Comparison) -> str:
    """An SVG file: a row for each standing with a ring for each seed, a dot at the mean, a bar of one deviation."""
    ordered = sorted(made.standings, key=lambda s: -s.mean)
    base = next(s.mean for s in ordered if s.name == made.baseline)
    colours = plots.COLOURS
    with plots.canvas(f"{made.name}: methods compared", 0.75 + 0.5 * len(ordered), left=0.1) as (axes, done):
        axes.set(ylim=(len(ordered) - 0.45, -0.65), yticks=[])
        axes.set(xlabel=f"{PERCENT[made.score][0]} on test images, % (right is better); dashed: {made.baseline}")
        axes.spines["left"].set_visible(False)
        axes.axvline(base, color=colours["mute"], lw=0.8, ls="--")
        for place, s in enumerate(ordered):
            colour = colours["c2" if s.name == made.baseline else "c1"]
            values = [run.readings[made.score] for run in s.runs]
            if s.deviation is not None:
                axes.plot([s.mean - s.deviation, s.mean + s.deviation], [place, place], color=colour, lw=1.6)
            axes.plot(values, [place] * len(values), marker="o", ms=5, mec=colour, mfc="none", mew=0.9, ls="none")
            axes.plot([s.mean], [place], marker="o", ms=6, color=colour, ls="none")
            told = s.name if s.difference is None else f"{s.name}: {difference(s)}"
            style: dict[str, Any] = {"va": "bottom", "fontsize": 8.5, "parse_math": False}
            style["bbox"] = {"facecolor": plots.WHITE, "edgecolor": "none", "pad": 1}
            axes.annotate(told, (0, place - 0.2), xycoords=("axes fraction", "data"), **style)
    return plots.standing_alone(done[0])


def publish(made: Comparison, out: Path) -> None:
    """Write compare.json, compare.md and compare.svg into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    told = json.dumps({"schema": SCHEMA, **serialization.dump(made)}, indent=2, ensure_ascii=False) + "\n"
    for name, content in {"compare.json": told, "compare.svg": drawn(made), "compare.md": markdown(made)}.items():
        partial = out / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(out / name)


def summary(made: Comparison) -> dict[str, Any]:
    """What a machine wants to know of a comparison."""
    rows = {
        s.name: {
            "mean": s.mean,
            "sd": s.deviation,
            "difference": s.difference,
            "interval": [s.interval.low, s.interval.high] if s.interval else None,
            "verdict": s.verdict,
            "seconds": median(s.runs, lambda r: r.seconds),
            "cpu_seconds": median(s.runs, lambda r: r.cpu_seconds),
            "memory_bytes": median(s.runs, lambda r: r.memory_bytes),
        }
        for s in made.standings
    }
    return {"name": made.name, "score": made.score, "seeds": made.seeds, "baseline": made.baseline, "students": rows}
