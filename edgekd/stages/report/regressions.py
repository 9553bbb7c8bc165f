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
from edgekd.core.build_record import Record
from edgekd.core.gate import Decision
from edgekd.stages.bench.gates import EXIT
from edgekd.stages.report import build_diff
from edgekd.stages.report.change import Change, Outcome, Tolerance
from edgekd.stages.report.correctness import right_answers, same_images
from edgekd.stages.report.load import at
from edgekd.stages.report.mixed_precision import aligned, piped

SCHEMA = 1  # of regressions.json
WORST: tuple[Outcome, ...] = ("regression", "undecided", "held")
RANK = {"passed": 0, "undecided": 1, "failed": 2}  # of a gate's outcome, the best first
HEADS = ("outcome", "model", "measure", "before", "now", "change (95 %)")


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
        found = {change.outcome for change in self.changes}
        return next((outcome for outcome in WORST if outcome in found), "undecided")


def compared(old: Path, new: Path, tolerance: Tolerance) -> Regressions:
    """Two builds, each a folder or its report.json. Raises ConfigError where one of them cannot be read."""
    homes = [place if place.is_dir() else place.parent for place in (old, new)]
    before, after = at(old), at(new)
    alike = same_images(before, after)
    remarks, changes = list(unlike(before, after, alike)), list(gates(before.gates, after.gates))
    measured = {bench.title: bench for bench in after.benches if bench.measurements}
    for bench in (bench for bench in before.benches if bench.measurements):
        other = measured.pop(bench.title, None)
        if other is None:
            changes.append(gone(bench, before, after))
            continue
        right = (right_answers(homes[0], before, bench), right_answers(homes[1], after, other)) if alike else ({}, {})
        both = build_diff.Pair(bench, other, tolerance, alike, right)
        remarks += [f"{bench.title}: {remark}" for remark in build_diff.remarks(both)]
        changes += build_diff.table(both, ships(before, bench.target), ships(after, bench.target))
    remarks += [f"{title}: was not measured before" for title in measured]
    builds = [Build(record.name, record.created, record.edgekd) for record in (before, after)]
    return Regressions(builds[0], builds[1], tolerance, tuple(changes), tuple(remarks))


def exit_code(found: Regressions) -> int:
    """3: a regression; 4: none is sure, and not all could be decided; 0: no regression."""
    return {"regression": EXIT["failed"], "undecided": EXIT["undecided"]}.get(found.outcome, 0)


def unlike(before: Record, after: Record, alike: bool) -> Iterator[str]:
    """What a reader must know of the builds."""
    if before.name != after.name:
        yield f"the builds are of different configurations: {before.name} before, {after.name} now"
    if not alike:
        yield "the test images are not known to be the same, so accuracies are those of two samples"


def ships(record: Record, target: str) -> str:
    return next((b.ships for b in record.benches if b.target == target and not b.scenario), "")


def gone(bench: BenchResult, before: Record, after: Record) -> Change:
    reason = next((b.not_measured for b in after.benches if b.title == bench.title), "")
    said = f"is not measured any more{f': {reason}' if reason else ''}"
    return Change(bench.title, ships(before, bench.target), "table", "undecided", said)


def gates(old: Sequence[Decision], new: Sequence[Decision]) -> Iterator[Change]:
    """Gates whose outcome changed. One with another limit is another gate."""
    before = {(d.target, d.gate.words): d for d in old}
    for d in new:
        was = before.pop((d.target, d.gate.words), None)
        found = partial(Change, d.target, d.contestant, f"gate: {d.gate.words}")
        if was is None:
            yield found("told", f"new: {d.outcome}; {d.reason}")
        elif was.outcome != d.outcome:
            outcome: Outcome = "held" if RANK[d.outcome] < RANK[was.outcome] else "undecided"
            if (was.outcome, d.outcome) == ("passed", "failed"):
                outcome = "regression"
            yield found(outcome, f"was {was.outcome}, now {d.outcome}; {d.reason}")
    for d in before.values():
        yield Change(d.target, d.contestant, f"gate: {d.gate.words}", "told", f"is gone, was {d.outcome}")


def headline(found: Regressions) -> str:
    """1 regression, 2 undecided, 9 held."""
    counts = {outcome: sum(change.outcome == outcome for change in found.changes) for outcome in WORST}
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
    outcome = "–" if change.outcome == "told" else change.outcome
    numbers = (shown(change.old, change.unit), shown(change.new, change.unit))
    told = [" ".join(part.split()) for part in (change.model or "–", change.measure, change.words)]
    return (outcome, *told[:2], *numbers, told[2])


def basis(found: Regressions) -> str:
    """What is a regression, in words."""
    percent, points = found.tolerance.percent, found.tolerance.points
    limits = f"{percent:g} % (of time, memory or bytes) or {points:g} point{'' if points == 1 else 's'}"
    return (
        f"Regression: the whole 95 % interval lies beyond {limits}. Held: it lies within. Undecided: part of it "
        "does, or too little is known. Only what ships on its target is judged."
    )


def sides(found: Regressions) -> str:
    told = [f"{side.name} of {formatting.when(side.created)}, edgekd {side.edgekd}" for side in (found.old, found.new)]
    return f"before: {told[0]}; now: {told[1]}"


def text(found: Regressions) -> str:
    """For a terminal."""
    parts = [headline(found), sides(found)]
    for title in dict.fromkeys(change.table for change in found.changes):
        rows = [cells(change) for change in found.changes if change.table == title]
        parts.append(f"{title}:\n{aligned(HEADS, rows)}")
    parts += ["\n".join(f"note: {remark}" for remark in found.remarks)] if found.remarks else []
    return "\n\n".join([*parts, basis(found)])


def markdown(found: Regressions) -> str:
    """For a comment on a pull request, or a job's summary."""
    parts = [f"## {formatting.markdown(found.new.name)}: {headline(found)}", formatting.markdown(sides(found))]
    worst = [change for outcome in WORST[:2] for change in found.changes if change.outcome == outcome]
    lines = [f"- **{c.outcome}** {formatting.markdown(f'{c.table}, {c.model}, {c.measure}: {c.words}')}" for c in worst]
    parts += ["\n".join(lines)] if lines else []
    for title in dict.fromkeys(change.table for change in found.changes if change.outcome != "told"):
        rows = [cells(change) for change in found.changes if change.table == title and change.outcome != "told"]
        parts += [f"### {formatting.markdown(title)}", piped(HEADS, rows)]
    others = [(change.table, *cells(change)[1:]) for change in found.changes if change.outcome == "told"]
    if others:
        parts += ["<details><summary>Not judged</summary>", piped(("table", *HEADS[1:]), others), "</details>"]
    parts += ["\n".join(f"- {formatting.markdown(remark)}" for remark in found.remarks)] if found.remarks else []
    return "\n\n".join([*parts, basis(found)]) + "\n"


def summary(found: Regressions) -> dict[str, Any]:
    """What a machine wants to know."""
    return {"schema": SCHEMA, "outcome": found.outcome, "exit_code": exit_code(found), **serialization.dump(found)}


def publish(found: Regressions, out: Path) -> Path:
    """Write regressions.md and regressions.json into `out`, each whole or not at all; gives back the first's path."""
    out.mkdir(parents=True, exist_ok=True)
    told = json.dumps(summary(found), indent=2, ensure_ascii=False) + "\n"
    for name, content in {"regressions.json": told, "regressions.md": markdown(found)}.items():
        partial_path = out / f"{name}.partial"
        partial_path.write_text(content, encoding="utf-8")
        partial_path.replace(out / name)
    return out / "regressions.md"
