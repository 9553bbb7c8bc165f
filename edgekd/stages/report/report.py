"""Stage 7: tell a build's record as one HTML page, as a Markdown comment, and as JSON to make both from again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgekd.core import formatting, serialization
from edgekd.core.artifact import File, Precision, Weights, size
from edgekd.core.bench_result import BenchResult, Measurement
from edgekd.core.build_record import SCHEMA, BuildRecord
from edgekd.core.mixed_precision import ParetoFront
from edgekd.core.task import primary_metrics
from edgekd.stages.report import mixed_precision, plots, provenance, tables
from edgekd.stages.report.load import read as read
from edgekd.stages.report.load import samples
from edgekd.stages.report.tables import difference, percentages, scored, table, task_metrics, where


@dataclass(frozen=True)
class Headline:
    """What the first screen is about: the student for the first target that was measured."""

    bench: BenchResult
    file: File  # under the name that the build gave it, if it made it
    stored: Precision  # of the file; a device may compute in another
    ship: Measurement
    student: Measurement | None  # the same student in FP32, if it is another
    teacher: Measurement | None

    @property
    def name(self) -> str:
        """Of the file; of a selected one, that of its copy among the artifacts."""
        path = provenance.artifact_path(self.bench.target, self.ship.model, self.stored)
        return Path(path).name if self.bench.selected else self.file.path.name


@dataclass(frozen=True)
class StudentRow:
    """One student network beside the chosen one: what its method was worth."""

    weights: Weights
    fp32: Measurement | None
    low: Measurement | None  # in the precision of the first screen
    behind: float | None  # points of FP32 test accuracy that the chosen student is ahead


def report(record: BuildRecord, out: Path) -> Path:
    """Write report.html, report.md and report.json into `out`, each whole or not at all; give back the HTML's path.

    Raw samples are copied beside them, so that the folder can be sent, and its plots drawn again from report.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = dataclasses.replace(record, benches=tuple(numbers(keep_samples(bench, out)) for bench in record.benches))
    files = [{"name": f.path.name, "sha256": f.sha256, "bytes": size(f), "what": what} for f, what in all_files(record)]
    data = {"schema": SCHEMA, **serialization.to_json(record), "files": files}
    write(out / "report.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    write(out / "report.md", render("report.md.j2", record, files))
    write(out / "report.html", render("report.html.j2", record, files))
    return out / "report.html"


def keep_samples(bench: BenchResult, out: Path) -> BenchResult:
    """The bench with its samples in `out`, if they are still where they were recorded."""
    if bench.samples is None or not bench.samples.path.exists():
        return bench
    place = out / f"samples-{bench.samples.sha256[:12]}.npz"
    if place != bench.samples.path:
        shutil.copyfile(bench.samples.path, place.with_suffix(".partial"))
        place.with_suffix(".partial").replace(place)
    return dataclasses.replace(bench, samples=dataclasses.replace(bench.samples, path=place))


def numbers(bench: BenchResult) -> BenchResult:
    """Return it without metrics that are not finite, which JSON cannot express: of maps without a known pixel."""
    kept = []
    for m in bench.measurements:
        sure = {name: i for name, i in m.intervals.items() if all(map(math.isfinite, (i.low, i.estimate, i.high)))}
        metrics = {name: value for name, value in m.metrics.items() if math.isfinite(value)}
        kept.append(dataclasses.replace(m, metrics=metrics, intervals=sure))
    return dataclasses.replace(bench, measurements=tuple(kept))


def write(path: Path, text: str) -> None:
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)


def all_files(record: BuildRecord) -> list[tuple[File, str]]:
    """Every file of a record with what it is, each once."""
    listed = [(record.teacher.file, "weights of the teacher")]
    listed += [(w.file, f"weights of {w.name}, taught by {w.method}") for w in record.students]
    listed += [(m.file, f"ONNX model {m.name}, {m.precision.upper()}") for m in record.models]
    for bench in record.benches:
        models = [m.model for m in bench.measurements]
        listed += [(c.file, f"ONNX model {c.name}, called on {bench.title}") for c in models]
        if bench.samples:
            listed.append((bench.samples, f"raw latency samples on {bench.title}"))
    unique = {file.sha256: (file, what) for file, what in reversed(listed)}
    return [unique[sha256] for sha256 in dict.fromkeys(file.sha256 for file, _ in listed)]


def render(template: str, record: BuildRecord, files: list[dict[str, Any]]) -> str:
    """One of the templates beside this module, filled in. Whatever a value holds, it is escaped for its format."""
    import jinja2

    page = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=page,
        finalize=formatting.seen if page else in_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    head = headline(record)
    images = (head and head.bench.protocol.get("images")) or record.data.test  # a device gets some of them only
    percent = partial(formatting.percent, images=images)
    filters: list[Callable[..., Any]] = [
        formatting.figures,
        formatting.count,
        formatting.file_size,
        formatting.ratio,
        formatting.interval,
    ]
    filters += [
        formatting.near_one,
        formatting.duration,
        formatting.when,
        formatting.flatten_settings,
        formatting.setting,
        formatting.yaml,
        formatting.unmeasured,
        formatting.code,
    ]
    environment.filters |= {show.__name__: show for show in filters}
    environment.filters |= {"percent": percent, "points": partial(formatting.points, images=images)}
    environment.globals |= {"size": size, "table": partial(table, percent=percent), "where": where}
    environment.globals |= {"frontier": mixed_precision, "frontier_plot": frontier_plot}
    environment.globals |= {show.__name__: partial(show, percent=percent) for show in (tables.brief, tables.full)}
    environment.globals |= {"places": tables.places, "shared": tables.shared}
    environment.globals["stamp"] = provenance.build_hash(provenance.provenance(record))
    environment.globals |= {"draw": draw, "curve": curve, "difference": difference, "best": best}
    key = score(record)
    low = head.ship.model.precision.upper() if head else "INT8"
    precision = low if head is None or head.stored.upper() == low else f"{head.stored.upper()}, computed in {low}"
    shown: dict[str, Any] = {"low": low, "precision": precision}
    shown |= {"r": record, "head": head, "images": images, "students": student_rows(record, head), "files": files}
    return environment.get_template(template).render(
        shown, score=key, score_name=percentages()[key][0], counts_images=bool(task_metrics()[key].hits)
    )


def in_markdown(value: Any) -> str:
    """Whatever it holds; what is markup already stays as it is."""
    return str(value) if hasattr(value, "__html__") else formatting.markdown(value)


def headline(record: BuildRecord) -> Headline | None:
    """None if no student was measured anywhere."""
    for bench in record.benches:
        for m in () if bench.scenario else best(bench)[:1]:
            model = next((o for o in record.models if o.file.sha256 == m.model.file.sha256), m.model)
            return Headline(
                bench,
                file=model.file,
                stored=model.precision,
                ship=m,
                student=None if m.model.precision == "fp32" else twin(m, bench),
                teacher=next((t for t in bench.measurements if t.model.role == "teacher"), None),
            )
    return None


def best(bench: BenchResult) -> list[Measurement]:
    """The selected student; where there is none, all in INT8, or all if none is in INT8."""
    students = [m for m in bench.measurements if m.model.role == "student"]
    selected = [m for m in students if m.model.name == bench.selected]
    return selected or [m for m in students if m.model.precision == "int8"] or students


def twin(low: Measurement, bench: BenchResult) -> Measurement | None:
    """The FP32 form of a student. Of several by one method, the one with the most similar name."""
    same = [
        m
        for m in bench.measurements
        if (m.model.precision, m.model.role, m.model.method) == ("fp32", low.model.role, low.model.method)
    ]
    return max(same, key=lambda m: likeness(m.model.name, low.model.name), default=None)


def likeness(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


def student_rows(record: BuildRecord, head: Headline | None) -> list[StudentRow]:
    """All students, the chosen one first, with their test accuracy on the headline's target."""
    measured = head.bench.measurements if head else ()
    both = ("fp32", head.ship.model.precision if head else "int8")
    rows: list[StudentRow] = []
    for w in record.students:
        entries = [m for m in measured if m.model.role != "teacher" and m.model.method == w.method]
        entries.sort(key=lambda m: -likeness(m.model.name, w.name))
        fp32, low = (next((m for m in entries if m.model.precision == p), None) for p in both)
        first = rows[0].fp32 if rows else None
        ahead = difference(first, fp32, score(record))
        rows.append(StudentRow(w, fp32, low, ahead))
    return rows


def score(record: BuildRecord) -> str:
    return next((scored(bench) for bench in record.benches if bench.measurements), primary_metrics()[0])


def draw(bench: BenchResult) -> Iterator[tuple[str, str]]:
    """A bench's plots: SVG, and what the reader should know. The SVG is empty where there is nothing to draw from."""
    import markupsafe

    key = scored(bench)
    shown = [m for m in bench.measurements if key in m.metrics and "p50_ms" in m.metrics]
    if shown:
        svg = plots.accuracy_against_latency(
            f"Accuracy against latency on {bench.title}", shown, key, percentages()[key][0]
        )
        there = {m.model.precision for m in shown}
        fills = "; ".join(f"{how}: {p.upper()}" for p, (how, _) in plots.FILLS.items() if p in there)
        note = f"Square: teacher; circle: student; triangle: baseline; {fills}; dashed: what no other beats in both."
        yield markupsafe.Markup(svg), note
    if bench.scenario and not any("p50_ms" in m.metrics for m in bench.measurements):
        return  # its samples, if it has any, are not of calls
    if bench.samples is None or not bench.samples.path.exists():
        yield "", "The raw latency samples are not here, so their distribution is not drawn."
        return
    by_model = samples(bench.samples)
    if not by_model:
        return
    svg = plots.latency_distributions(
        f"Latency of every call on {bench.title}", list(by_model), list(by_model.values())
    )
    counts = {len(ms) for ms in by_model.values()}
    calls = " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
    yield (
        markupsafe.Markup(svg),
        f"{calls} timed calls per model. Area: how many took so long; tick: one call; bar: the median.",
    )


def curve(weights: Weights) -> str:
    import markupsafe

    if not any(phase.curve for phase in weights.phases):
        return ""
    return markupsafe.Markup(plots.training_curve(f"Training loss of {weights.name}, {weights.method}", weights))


def frontier_plot(front: ParetoFront) -> str:
    import markupsafe

    return markupsafe.Markup(mixed_precision.plot(front))
