"""Put what a build made where people look for it: the report, its samples, calibration sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekd.core.artifact import File, replace_files
from edgekd.core.build_record import BuildRecord
from edgekd.stages.bench.gates import junit
from edgekd.stages.report.report import report


@dataclass(frozen=True)
class Rendered:
    """The report in all its forms, with the raw samples."""

    files: tuple[File, ...]


def rendered(out: Path, record: BuildRecord) -> Rendered:
    report(record, out)
    if record.gates:
        junit(record.gates, out / "junit.xml")
    return Rendered(tuple(File.of(path) for path in sorted(out.iterdir()) if path.is_file()))


def templates() -> list[File]:
    """What the report is filled into; no module imports them, so the step cache is told."""
    return [File.of(path) for path in sorted(Path(report.__code__.co_filename).parent.glob("*.j2"))]


def publish(rendered_files: Rendered, out: Path) -> None:
    replace_files(rendered_files.files, out)
    current = {file.path.name for file in rendered_files.files}
    for old in (*out.glob("samples-*.npz"), *out.glob("junit.xml")):
        if old.name not in current:
            old.unlink()
