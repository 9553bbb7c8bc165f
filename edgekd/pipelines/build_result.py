"""The result of a build, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.core.build_record import BuildRecord


@dataclass(frozen=True)
class SelectedModel:
    """The file to deploy on a target."""

    name: str  # of its row in the report: `kpn int8`
    path: Path


@dataclass(frozen=True)
class BuildResult:
    """The result of a build: its folder, the selected files, and the comparison on every target."""

    out: Path
    selected: dict[str, SelectedModel]  # by target
    summary: dict[str, Any]
    text: str
    exit_code: int  # 0, 3 if a gate failed, 4 if one is undecided

    @property
    def report(self) -> Path:
        """The report as one HTML page."""
        return self.out / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON."""
        return self.summary

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON, for `from_json`."""
        selected = {target: {"name": s.name, "path": str(s.path)} for target, s in self.selected.items()}
        return asdict(self) | {"out": str(self.out), "selected": selected}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BuildResult:
        """Return the result that `to_json` described."""
        selected = {target: SelectedModel(s["name"], Path(s["path"])) for target, s in data["selected"].items()}
        return cls(Path(data["out"]), selected, data["summary"], data["text"], data["exit_code"])

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.report.read_text(encoding="utf-8")


def build_result(record: BuildRecord, out: Path) -> BuildResult:
    """Return the result of a build in the folder `out`."""
    from edgekd.stages.bench.gates import exit_code

    summary = json.loads(json.dumps(build_summary(record)))
    files = {target: sorted((out / "artifacts" / target).glob("*.onnx")) for target in summary["selected"]}
    selected = {
        target: SelectedModel(summary["selected"][target], paths[0]) for target, paths in files.items() if paths
    }
    return BuildResult(out, selected, summary, format_build(record), exit_code(record.gates))


def build_summary(record: BuildRecord) -> dict[str, Any]:
    """Return what programs need of a build."""
    return {
        "name": record.name,
        "targets": {
            bench.title: {
                m.model.name: {"file": str(m.model.file.path), **m.metrics, "verdict": m.verdict}
                for m in bench.measurements
            }
            for bench in record.benches
        },
        "selected": {bench.target: bench.selected for bench in record.benches if bench.selected},
        "not_measured": {bench.target: bench.not_measured for bench in record.benches if bench.not_measured},
        "warnings": {bench.title: bench.warnings for bench in record.benches if bench.warnings},
        "gates": [
            {"target": d.target, "gate": d.gate.description, "outcome": d.outcome, "why": d.reason}
            for d in record.gates
        ],
    }


def format_build(record: BuildRecord) -> str:
    """Return what people need of a build: the comparison on every target, and the gates."""
    from edgekd.core.bench_result import BenchResult
    from edgekd.core.formatting import unmeasured
    from edgekd.stages.bench.compare_files import table
    from edgekd.stages.report.summary import format_summary

    def comparison(bench: BenchResult) -> str:
        if bench.not_measured:
            return f"{bench.title}: {unmeasured(bench.not_measured)}"
        return table(bench) if bench.scenario else format_summary(bench)

    parts = [comparison(bench) for bench in record.benches]
    gates = [f"gate on {d.target}, {d.gate.description}: {d.outcome}, {d.reason}" for d in record.gates]
    return "\n\n".join([*parts, *filter(None, ["\n".join(gates)])])
