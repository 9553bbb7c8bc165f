"""The manifest of a build: what it was made from, what was decided, and the hash of every file.

Its hash of everything but the list of files is in the metadata of every selected ONNX file, so that a deployed file can
be traced to its build. A selected file is the one that was measured with that entry added, and nothing else changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.core import serialization
from edgekd.core.artifact import File, Precision
from edgekd.core.bench_result import BenchmarkEntry, BenchResult
from edgekd.core.build_record import BuildRecord
from edgekd.errors import ConfigError
from edgekd.onnx import inspect, writer
from edgekd.utils.paths import escapes_folder

SCHEMA = 2  # of manifest.json
NAME = "manifest.json"
STAMP = "edgekd.manifest"  # key of the metadata of a selected file
ARTIFACTS = "artifacts"  # the folder of the selected files, by target
BUNDLES = "bundle-*/manifest.json"


@dataclass(frozen=True)
class Measured:
    """What a manifest says of a measurement, as far as its check goes."""

    files: dict[str, str]  # entry -> sha256
    selected: str


@dataclass(frozen=True)
class ManifestProvenance:
    measured: dict[str, Measured]  # by target


@dataclass(frozen=True)
class Manifest:
    """What a manifest.json must have to be one."""

    schema: int
    sha256: str
    provenance: ManifestProvenance
    files: dict[str, str]
    steps: dict[str, str]


def write_manifest(record: BuildRecord, out: Path, files: tuple[File, ...], steps: Mapping[str, str]) -> Path:
    """Write the selected files and the manifest into `out`, and return the manifest's path.

    Args:
        record: The build.
        out: Its folder.
        files: Those of the report in `out`.
        steps: The entries of all steps: path below `out` -> sha256.
    """
    facts = provenance(record)
    stamp = build_hash(facts)
    shipped = [path for bench, entry in selected_entries(record) for path in write_artifact(bench, entry, stamp, out)]
    for name in listed_before(out):
        if name.startswith(f"{ARTIFACTS}/") and not escapes_folder(out, name) and out / name not in shipped:
            (out / name).unlink(missing_ok=True)
    names = [file.path.name for file in files] + [str(path.relative_to(out)) for path in shipped]
    names += [str(path.relative_to(out)) for path in sorted(out.glob(BUNDLES))]
    hashes = {name: File.of(out / name).sha256 for name in names}
    manifest = {
        "schema": SCHEMA,
        "sha256": stamp,
        "provenance": facts,
        "files": hashes,
        "steps": dict(sorted(steps.items())),
    }
    write_whole(out / NAME, to_bytes(manifest))
    return out / NAME


def update_manifest(folder: Path, names: tuple[str, ...]) -> None:
    """Take up files that were written again from what the manifest vouches for, if there is one."""
    if (folder / NAME).exists():
        manifest = read(folder)
        manifest["files"] |= {name: File.of(folder / name).sha256 for name in names}
        write_whole(folder / NAME, to_bytes(manifest))


def provenance(record: BuildRecord) -> dict[str, Any]:
    """What a build was made from, on which machines, and what was decided; no names of places."""
    return {
        "name": record.name,
        "edgekd": record.edgekd,
        "created": record.created,
        "command": record.command,
        "config": record.config,
        "sources": serialization.to_json(record.provenance),
        "versions": record.versions,
        "teacher": record.teacher.file.sha256,
        "students": {w.name: w.file.sha256 for w in record.students},
        "models": {f"{m.name} {m.precision}": m.file.sha256 for m in record.models},
        "measured": {
            " ".join(filter(None, (bench.target, bench.scenario))): {
                "machine": serialization.to_json(bench.machine),
                "runtime": serialization.to_json(bench.runtime),
                "samples": bench.samples.sha256 if bench.samples else None,
                "files": {m.model.name: m.model.file.sha256 for m in bench.measurements},
                "selected": bench.selected,
            }
            for bench in record.benches
        },
        "gates": serialization.to_json(record.gates),
    }


def build_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def selected_entries(record: BuildRecord) -> Iterator[tuple[BenchResult, BenchmarkEntry]]:
    """Yield the selected entry of every target that was measured."""
    for bench in record.benches:
        yield from ((bench, m.model) for m in bench.measurements if m.model.name == bench.selected)


def write_artifact(bench: BenchResult, entry: BenchmarkEntry, stamp: str, out: Path) -> list[Path]:
    """The measured file with the stamp in its metadata, where people look for it; beside it the calibration cache of
    one that is float itself, and INT8 on its device."""
    import onnx

    model = onnx.load(str(entry.file.path))
    stored = inspect.facts(entry.file.path).precision
    paths = [out / artifact_path(bench.target, entry, stored)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    write_whole(paths[0], writer.to_bytes(model, {**props(model), STAMP: stamp}))
    if entry.precision == "int8" != stored:
        for cache in (out / f"bundle-{bench.target}" / "models").glob(f"{glob.escape(network(entry))}.cache"):
            paths.append(paths[0].with_name(cache.name))
            write_whole(paths[-1], cache.read_bytes())
    return paths


def artifact_path(target: str, entry: BenchmarkEntry, stored: Precision) -> str:
    """Where a selected file is in the build's folder: artifacts/cpu/kpn-int8.onnx; `stored` is its own precision."""
    return f"{ARTIFACTS}/{target}/{network(entry).replace(' ', '-').replace('/', '-')}-{stored}.onnx"


def network(entry: BenchmarkEntry) -> str:
    return entry.name.removesuffix(f" {entry.precision}")


def listed_before(out: Path) -> list[str]:
    """The files of the manifest that is there already; none if it cannot be read."""
    try:
        return sorted(read(out)["files"])
    except ConfigError:
        return []


def props(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all; what is there already is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def to_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a build. Raises ConfigError if there is none that can be read."""
    path = folder / NAME
    manifest = content(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise ConfigError(f"`{path}` has schema {schema}; this edgekd reads {SCHEMA}", hint="build again")
    try:
        serialization.from_json(Manifest, manifest)
    except ConfigError as error:
        raise ConfigError(f"`{path}` is not whole: {error.what}", hint="build again") from None
    return manifest


def content(path: Path) -> Any:
    """Of a JSON file. Raises ConfigError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` cannot be read: {error}", hint="name the --out folder of a build") from None
