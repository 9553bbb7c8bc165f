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
from edgekd.core.task import primary_metrics
from edgekd.stages.report import plots
from edgekd.stages.report.tables import percentages

SCHEMA = 2  # of compare.json
SHARED = ("epochs", "train", "labels_per_class", "unlabelled")  # settings of the student that all entries have
ALONE = "one seed: no interval"


@dataclass(frozen=True)
class MethodRun:
    """One student, taught with one seed."""

    seed: int
    metrics: dict[str, float]  # metric name -> value on the test images
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
class MethodResult:
    """One row: an entry's student, over all seeds."""

    name: str
    runs: tuple[MethodRun, ...]
    mean: float  # of the score
    std: float | None  # sample standard deviation; None of a single seed
    difference: float | None  # to the baseline, mean over the seeds of both; None of the baseline itself
    interval: Interval | None  # of that difference
    verdict: str  # "better", "worse", "no measurable difference", "baseline", or why there is none


@dataclass(frozen=True)
class Teacher:
    name: str
    metrics: dict[str, float]  # empty: it knows other classes
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
    results: tuple[MethodResult, ...]
    teachers: tuple[Teacher, ...]
    entries: dict[str, dict[str, Any]]  # label -> model and method with all settings
    config: dict[str, Any]
    versions: dict[str, str]
    system: str


def scored(metrics: Iterable[str]) -> str:
    """The metric that is the accuracy of a task."""
    return next(name for name in primary_metrics() if name in metrics)


def summarize_methods(rows: dict[str, tuple[MethodRun, ...]], baseline: str, score: str) -> tuple[MethodResult, ...]:
    """What the runs of each row say, in the order of the rows."""
    base = {run.seed: run.metrics[score] for run in rows[baseline]}
    results = []
    for name, runs in rows.items():
        values = [run.metrics[score] for run in runs]
        paired = [run.metrics[score] - base[run.seed] for run in runs if run.seed in base]
        same = name == baseline
        interval = None if same else paired_interval(paired)
        results.append(
            MethodResult(
                name=name,
                runs=runs,
                mean=statistics.mean(values),
                std=statistics.stdev(values) if len(values) > 1 else None,
                difference=statistics.mean(paired) if paired and not same else None,
                interval=interval,
                verdict="baseline" if same else verdict(interval),
            )
        )
    return tuple(results)


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


def median(runs: Sequence[MethodRun], value: Callable[[MethodRun], float | None]) -> float | None:
    """Over the runs that know it."""
    values = [v for v in map(value, runs) if v is not None]
    return statistics.median(values) if values else None


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row of cells for every standing."""
    others = [name for name in comparison.results[0].runs[0].metrics if name != comparison.score]
    base = next(s for s in comparison.results if s.name == comparison.baseline)
    base_epoch = median(base.runs, lambda r: r.epoch_seconds)
    heads = [
        "student",
        f"{percentages()[comparison.score][0]}, %",
        "sd",
        f"to {comparison.baseline} (95 %)",
        "verdict",
        *others,
        "valid, %",
    ]
    heads += ["parameters", "MACs", "lesson, s", "CPU, s", "epoch, s", "epoch, x", "memory, MB"]
    rows = []
    for s in comparison.results:
        means = [f"{statistics.mean(r.metrics[name] for r in s.runs):.4g}" for name in others]
        epoch = median(s.runs, lambda r: r.epoch_seconds)
        costs: list[tuple[float | None, Callable[[float], str]]] = [
            (
                median(s.runs, lambda r: r.valid_accuracy),
                lambda v: f"{100 * v:.{formatting.decimals(comparison.test)}f}",
            ),
            (median(s.runs, lambda r: r.parameters), formatting.count),
            (median(s.runs, lambda r: r.macs), formatting.count),
            (median(s.runs, lambda r: r.seconds), formatting.figures),
            (median(s.runs, lambda r: r.cpu_seconds), formatting.figures),
            (epoch, formatting.figures),
            (epoch / base_epoch if epoch and base_epoch else None, lambda v: f"{v:.2f}"),
            (median(s.runs, lambda r: r.memory_bytes), lambda v: f"{v / 1e6:,.0f}"),
        ]
        cells = ["–" if value is None else show(value) for value, show in costs]
        deviation = "–" if s.std is None else f"{s.std:.2f}"
        rows.append([s.name, f"{s.mean:.2f}", deviation, difference(s), s.verdict, *means, *cells])
    return heads, rows


def difference(s: MethodResult) -> str:
    """+1.20 (+0.40 to +2.00): in points."""
    if s.difference is None:
        return "–"
    spread = f" ({s.interval.low:+.2f} to {s.interval.high:+.2f})" if s.interval else ""
    return f"{s.difference:+.2f}{spread}"


def text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    heads, rows = table(comparison)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in (heads, *rows)]
    return "\n".join([*lines, *remarks(comparison)])


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know beside the table."""
    seeds = ", ".join(map(str, comparison.seeds))
    runs = [run for s in comparison.results for run in s.runs]
    conditions = sorted({run.conditions for run in runs})
    lines = [teacher_line(t, comparison) for t in comparison.teachers]
    lines.append(
        f"{comparison.test:,} test images, read once at the end; seeds {seeds}. Differences are paired by seed; "
        "their intervals are Student's t, over seeds, for these images. Costs are medians; memory is a process's peak; "
        f"epochs are of the same images for all, x is against {comparison.baseline}."
    )
    if len(comparison.seeds) == 1:
        lines.append("One seed says nothing about the next: there are no intervals. Use --seeds 3 or more.")
    if any(run.seconds is None for run in runs):
        lines.append("Lessons that were interrupted are left out of the medians of seconds and memory.")
    lines.append(f"On: {'; '.join(conditions)}.")
    if len(conditions) > 1:
        lines.append("Not all were taught under the same conditions: their times do not compare.")
    return lines


def teacher_line(t: Teacher, comparison: Comparison) -> str:
    accuracy = f"{t.metrics[comparison.score]:.2f} %" if t.metrics else "of other classes"
    return f"{t.name}: {accuracy}, {formatting.count(t.parameters)} parameters, {formatting.count(t.macs)} MACs."


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown file beside its plot."""
    heads, rows = table(comparison)
    lines = [f"# {formatting.markdown(comparison.name)}: methods compared", ""]
    lines += ["```", comparison.command, "```", "", "![Every seed, mean and standard deviation](compare.svg)", ""]
    lines += [row(heads), row(["---"] * len(heads), False), *map(row, rows), ""]
    for remark in remarks(comparison):
        lines += [formatting.markdown(remark), ""]
    lines += ["## Each seed", "", row(["student", *(f"seed {seed}" for seed in comparison.seeds)])]
    lines.append(row(["---"] * (1 + len(comparison.seeds)), False))
    for s in comparison.results:
        by_seed = {run.seed: f"{run.metrics[comparison.score]:.2f}" for run in s.runs}
        lines.append(row([s.name, *(by_seed.get(seed, "–") for seed in comparison.seeds)]))
    chosen = [f"- {formatting.markdown(line)}" for line in choices(comparison)]
    lines += ["", "## What was chosen", "", *chosen] if chosen else []
    shared = {key: value for key, value in comparison.config["student"].items() if key in SHARED}
    lines += ["", "## Settings", "", f"- all: `{json.dumps(shared)}`"]
    lines += [f"- {formatting.markdown(label)}: `{json.dumps(chosen)}`" for label, chosen in comparison.entries.items()]
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    lines += [
        "",
        f"Made by edgekd {comparison.edgekd}, {formatting.when(comparison.created)}; {versions}; {comparison.system}.",
    ]
    return "\n".join(lines) + "\n"


def choices(comparison: Comparison) -> Iterator[str]:
    """A line for each lesson that noted something: the route that won, or all notes, shortened."""
    for label in comparison.entries:
        rows = (s for s in comparison.results if s.name == label or s.name.startswith((f"{label}/", f"{label} ")))
        runs = next(rows).runs  # all students of one lesson have its notes
        yield from (f"{label}, seed {run.seed}: {formatting.format_notes(run.notes)}" for run in runs if run.notes)


def row(cells: Iterable[str], escape: bool = True) -> str:
    return f"| {' | '.join(formatting.markdown(c) if escape else c for c in cells)} |"


def plot(comparison: Comparison) -> str:
    """An SVG file: a row for each standing with a ring for each seed, a dot at the mean, a bar of one deviation."""
    ordered = sorted(comparison.results, key=lambda s: -s.mean)
    base = next(s.mean for s in ordered if s.name == comparison.baseline)
    colours = plots.COLOURS
    with plots.canvas(f"{comparison.name}: methods compared", 0.75 + 0.5 * len(ordered), left=0.1) as (axes, done):
        axes.set(ylim=(len(ordered) - 0.45, -0.65), yticks=[])
        score = percentages()[comparison.score][0]
        axes.set(xlabel=f"{score} on test images, % (right is better); dashed: {comparison.baseline}")
        axes.spines["left"].set_visible(False)
        axes.axvline(base, color=colours["mute"], lw=0.8, ls="--")
        for place, s in enumerate(ordered):
            colour = colours["c2" if s.name == comparison.baseline else "c1"]
            values = [run.metrics[comparison.score] for run in s.runs]
            if s.std is not None:
                axes.plot([s.mean - s.std, s.mean + s.std], [place, place], color=colour, lw=1.6)
            axes.plot(values, [place] * len(values), marker="o", ms=5, mec=colour, mfc="none", mew=0.9, ls="none")
            axes.plot([s.mean], [place], marker="o", ms=6, color=colour, ls="none")
            label = s.name if s.difference is None else f"{s.name}: {difference(s)}"
            style: dict[str, Any] = {"va": "bottom", "fontsize": 8.5, "parse_math": False}
            style["bbox"] = {"facecolor": plots.WHITE, "edgecolor": "none", "pad": 1}
            axes.annotate(label, (0, place - 0.2), xycoords=("axes fraction", "data"), **style)
    return plots.standing_alone(done[0])


def publish(comparison: Comparison, out: Path) -> None:
    """Write compare.json, compare.md and compare.svg into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"schema": SCHEMA, **serialization.to_json(comparison)}, indent=2, ensure_ascii=False) + "\n"
    for name, content in {
        "compare.json": data,
        "compare.svg": plot(comparison),
        "compare.md": markdown(comparison),
    }.items():
        partial = out / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(out / name)


def summary(comparison: Comparison) -> dict[str, Any]:
    """What a machine wants to know of a comparison."""
    rows = {
        s.name: {
            "mean": s.mean,
            "sd": s.std,
            "difference": s.difference,
            "interval": [s.interval.low, s.interval.high] if s.interval else None,
            "verdict": s.verdict,
            "seconds": median(s.runs, lambda r: r.seconds),
            "cpu_seconds": median(s.runs, lambda r: r.cpu_seconds),
            "memory_bytes": median(s.runs, lambda r: r.memory_bytes),
        }
        for s in comparison.results
    }
    return {
        "name": comparison.name,
        "score": comparison.score,
        "seeds": comparison.seeds,
        "baseline": comparison.baseline,
        "students": rows,
    }
