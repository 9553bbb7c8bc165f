"""Regressions: what became worse between two builds, and what of that cannot be said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgekd.core import formatting, serialization
from edgekd.core.bench_result import BenchResult
from edgekd.core.build_record import BuildRecord
from edgekd.core.gate import Decision
from edgekd.stages.bench.gates import EXIT
from edgekd.stages.report import build_diff
from edgekd.stages.report.change import Change, Outcome, Tolerance
from edgekd.stages.report.correctness import right_answers, same_images
from edgekd.stages.report.load import at
from edgekd.stages.report.mixed_precision import aligned, piped

SCHEMA = 2  # of regressions.json
WORST: tuple[Outcome, ...] = ("regression", "undecided", "held")
RANK = {"passed": 0, "undecided": 1, "failed": 2}  # of a gate's outcome, the best first
HEADS = ("outcome", "model", "metric", "before", "now", "change (95 %)")


@dataclass(frozen=True)
class Build:
    name: str
    created: str  # UTC, ISO 8601
    edgekd: str  # version


@dataclass(frozen=True)
class Regressions:
    """Two builds compared."""

    old: Build
    new: Build
    tolerance: Tolerance
    changes: tuple[Change, ...]
    remarks: tuple[str, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of all; undecided, where nothing could be judged."""
        outcomes = {change.outcome for change in self.changes}
        return next((outcome for outcome in WORST if outcome in outcomes), "undecided")


def compare_builds(old: Path, new: Path, tolerance: Tolerance) -> Regressions:
    """Two builds, each a folder or its report.json. Raises ConfigError where one of them cannot be read."""
    homes = [place if place.is_dir() else place.parent for place in (old, new)]
    before, after = at(old), at(new)
    alike = same_images(before, after)
    remarks, changes = list(build_differences(before, after, alike)), list(gates(before.gates, after.gates))
    measured = {bench.title: bench for bench in after.benches if bench.measurements}
    for bench in (bench for bench in before.benches if bench.measurements):
        other = measured.pop(bench.title, None)
        if other is None:
            changes.append(missing_table(bench, before, after))
            continue
        right = (right_answers(homes[0], before, bench), right_answers(homes[1], after, other)) if alike else ({}, {})
        both = build_diff.TablePair(bench, other, tolerance, alike, right)
        remarks += [f"{bench.title}: {remark}" for remark in build_diff.remarks(both)]
        changes += build_diff.table(both, selected_model(before, bench.target), selected_model(after, bench.target))
    remarks += [f"{title}: was not measured before" for title in measured]
    builds = [Build(record.name, record.created, record.edgekd) for record in (before, after)]
    return Regressions(builds[0], builds[1], tolerance, tuple(changes), tuple(remarks))


def exit_code(result: Regressions) -> int:
    """3: a regression; 4: none is sure, and not all could be decided; 0: no regression."""
    return {"regression": EXIT["failed"], "undecided": EXIT["undecided"]}.get(result.outcome, 0)


def build_differences(before: BuildRecord, after: BuildRecord, alike: bool) -> Iterator[str]:
    """What a reader must know of the builds."""
    if before.name != after.name:
        yield f"the builds are of different configurations: {before.name} before, {after.name} now"
    if not alike:
        yield "the test images are not known to be the same, so accuracies are those of two samples"


def selected_model(record: BuildRecord, target: str) -> str:
    return next((b.selected for b in record.benches if b.target == target and not b.scenario), "")


def missing_table(bench: BenchResult, before: BuildRecord, after: BuildRecord) -> Change:
    reason = next((b.not_measured for b in after.benches if b.title == bench.title), "")
    description = f"is not measured any more{f': {reason}' if reason else ''}"
    return Change(bench.title, selected_model(before, bench.target), "table", "undecided", description)


def gates(old: Sequence[Decision], new: Sequence[Decision]) -> Iterator[Change]:
    """Gates whose outcome changed. One with another limit is another gate."""
    before = {(d.target, d.gate.description): d for d in old}
    for d in new:
        was = before.pop((d.target, d.gate.description), None)
        change_of = partial(Change, d.target, d.model, f"gate: {d.gate.description}")
        if was is None:
            yield change_of("not judged", f"new: {d.outcome}; {d.reason}")
        elif was.outcome != d.outcome:
            outcome: Outcome = "held" if RANK[d.outcome] < RANK[was.outcome] else "undecided"
            if (was.outcome, d.outcome) == ("passed", "failed"):
                outcome = "regression"
            yield change_of(outcome, f"was {was.outcome}, now {d.outcome}; {d.reason}")
    for d in before.values():
        yield Change(d.target, d.model, f"gate: {d.gate.description}", "not judged", f"is gone, was {d.outcome}")


def headline(result: Regressions) -> str:
    """1 regression, 2 undecided, 9 held."""
    counts = {outcome: sum(change.outcome == outcome for change in result.changes) for outcome in WORST}
    if not any(counts.values()):
        return "nothing could be compared"
    many = counts["regression"] or "no"
    parts = [f"{many} regression{'s' if counts['regression'] > 1 else ''}"]
    parts += [f"{counts[outcome]} {outcome}" for outcome in WORST[1:] if counts[outcome]]
    return ", ".join(parts)


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit in ("×", "B"):
        return formatting.ratio(value) if unit == "×" else formatting.file_size(round(value))
    return f"{value:.2f} %" if unit == "%" else f"{formatting.figures(value)} {unit}"


def cells(change: Change) -> tuple[str, ...]:
    """Of a row below HEADS."""
    outcome = "–" if change.outcome == "not judged" else change.outcome
    numbers = (shown(change.old, change.unit), shown(change.new, change.unit))
    texts = [" ".join(part.split()) for part in (change.model or "–", change.metric, change.description)]
    return (outcome, *texts[:2], *numbers, texts[2])


def basis(result: Regressions) -> str:
    """What is a regression, in words."""
    percent, points = result.tolerance.percent, result.tolerance.points
    limits = f"{percent:g} % (of time, memory or bytes) or {points:g} point{'' if points == 1 else 's'}"
    return (
        f"Regression: the whole 95 % interval lies beyond {limits}. Held: it lies within. Undecided: part of it "
        "does, or too little is known. Only the selected model of each target is judged."
    )


def sides(result: Regressions) -> str:
    labels = [
        f"{side.name} of {formatting.when(side.created)}, edgekd {side.edgekd}" for side in (result.old, result.new)
    ]
    return f"before: {labels[0]}; now: {labels[1]}"


def text(result: Regressions) -> str:
    """For a terminal."""
    parts = [headline(result), sides(result)]
    for title in dict.fromkeys(change.table for change in result.changes):
        rows = [cells(change) for change in result.changes if change.table == title]
        parts.append(f"{title}:\n{aligned(HEADS, rows)}")
    parts += ["\n".join(f"note: {remark}" for remark in result.remarks)] if result.remarks else []
    return "\n\n".join([*parts, basis(result)])


def markdown(result: Regressions) -> str:
    """For a comment on a pull request, or a job's summary."""
    parts = [f"## {formatting.markdown(result.new.name)}: {headline(result)}", formatting.markdown(sides(result))]
    worst = [change for outcome in WORST[:2] for change in result.changes if change.outcome == outcome]
    lines = [
        f"- **{c.outcome}** {formatting.markdown(f'{c.table}, {c.model}, {c.metric}: {c.description}')}" for c in worst
    ]
    parts += ["\n".join(lines)] if lines else []
    for title in dict.fromkeys(change.table for change in result.changes if change.outcome != "not judged"):
        rows = [cells(change) for change in result.changes if change.table == title and change.outcome != "not judged"]
        parts += [f"### {formatting.markdown(title)}", piped(HEADS, rows)]
    others = [(change.table, *cells(change)[1:]) for change in result.changes if change.outcome == "not judged"]
    if others:
        parts += ["<details><summary>Not judged</summary>", piped(("table", *HEADS[1:]), others), "</details>"]
    parts += ["\n".join(f"- {formatting.markdown(remark)}" for remark in result.remarks)] if result.remarks else []
    return "\n\n".join([*parts, basis(result)]) + "\n"


def summary(result: Regressions) -> dict[str, Any]:
    """What a machine wants to know."""
    return {
        "schema": SCHEMA,
        "outcome": result.outcome,
        "exit_code": exit_code(result),
        **serialization.to_json(result),
    }


def publish(result: Regressions, out: Path) -> Path:
    """Write regressions.md and regressions.json into `out`, each whole or not at all; gives back the first's path."""
    out.mkdir(parents=True, exist_ok=True)
    data = json.dumps(summary(result), indent=2, ensure_ascii=False) + "\n"
    for name, content in {"regressions.json": data, "regressions.md": markdown(result)}.items():
        partial_path = out / f"{name}.partial"
        partial_path.write_text(content, encoding="utf-8")
        partial_path.replace(out / name)
    return out / "regressions.md"
