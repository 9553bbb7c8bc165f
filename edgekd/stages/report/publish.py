"""Put what a build made where people look for it: the report, its samples, calibration sets."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from edgekd.core.artifact import File
from edgekd.core.record import Record
from edgekd.stages.bench.gates import junit
from edgekd.stages.report.report import report


def replace_files(files: Iterable[File], home: Path) -> None:
    """Copy files to where people look for them, each whole or not at all; two builds may do so at once."""
    home.mkdir(parents=True, exist_ok=True)
    for file in files:
        partial = home / f"{file.path.name}.{uuid4().hex[:8]}.partial"
        try:
            shutil.copyfile(file.path, partial)
            partial.replace(home / file.path.name)
        finally:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Rendered:
    """The report in all its forms, with the raw samples."""

    files: tuple[File, ...]


def rendered(out: Path, record: Record) -> Rendered:
    report(record, out)
    if record.gates:
        junit(record.gates, out / "junit.xml")
    return Rendered(tuple(File.of(path) for path in sorted(out.iterdir()) if path.is_file()))


def templates() -> list[File]:
    """What the report is filled into; no module imports them, so the ledger has to be told."""
    return [File.of(path) for path in sorted(Path(report.__code__.co_filename).parent.glob("*.j2"))]


def publish(made: Rendered, out: Path) -> None:
    replace_files(made.files, out)
    current = {file.path.name for file in made.files}
    for old in (*out.glob("samples-*.npz"), *out.glob("junit.xml")):
        if old.name not in current:
            old.unlink()
