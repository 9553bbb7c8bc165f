"""The manifest of a build: what it was made from, what was decided, and the hash of every file.

Its hash of all but the list of files stands in the metadata of every ONNX file that ships, so that a file in the field
leads back to its build. What ships is the file that was measured with that entry added, and nothing else changed.
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
from edgekd.core.bench_result import BenchResult, Contestant
from edgekd.core.build_record import Record
from edgekd.errors import ConfigError
from edgekd.onnx import inspect, writer
from edgekd.utils.paths import leads_out

SCHEMA = 1  # of manifest.json
NAME = "manifest.json"
STAMP = "edgekd.manifest"  # key of the metadata of a file that ships
SHIPS = "ships"  # the folder of what ships, by target
BUNDLES = "bundle-*/manifest.json"


@dataclass(frozen=True)
class Measured:
    """What a manifest says of a measurement, as far as its check goes."""

    files: dict[str, str]  # contestant -> sha256
    ships: str


@dataclass(frozen=True)
class Provenance:
    measured: dict[str, Measured]  # by target


@dataclass(frozen=True)
class Manifest:
    """What a manifest.json must have to be one."""

    schema: int
    sha256: str
    provenance: Provenance
    files: dict[str, str]
    steps: dict[str, str]


def certify(record: Record, out: Path, files: tuple[File, ...], steps: Mapping[str, str]) -> Path:
    """Write what ships and the manifest into `out`; `files` are those of the report there, `steps` the entries of all
    steps, by their path below `out` -> sha256. Gives back the manifest's path."""
    told = provenance(record)
    stamp = digest(told)
    shipped = [path for bench, contestant in chosen(record) for path in ship(bench, contestant, stamp, out)]
    for name in listed_before(out):
        if name.startswith(f"{SHIPS}/") and not leads_out(out, name) and out / name not in shipped:
            (out / name).unlink(missing_ok=True)
    names = [file.path.name for file in files] + [str(path.relative_to(out)) for path in shipped]
    names += [str(path.relative_to(out)) for path in sorted(out.glob(BUNDLES))]
    hashes = {name: File.of(out / name).sha256 for name in names}
    made = {
        "schema": SCHEMA,
        "sha256": stamp,
        "provenance": told,
        "files": hashes,
        "steps": dict(sorted(steps.items())),
    }
    put(out / NAME, written(made))
    return out / NAME


def renew(folder: Path, names: tuple[str, ...]) -> None:
    """Take up files that were written again from what the manifest vouches for, if there is one."""
    if (folder / NAME).exists():
        found = read(folder)
        found["files"] |= {name: File.of(folder / name).sha256 for name in names}
        put(folder / NAME, written(found))


def provenance(record: Record) -> dict[str, Any]:
    """What a build was made from, on which machines, and what was decided; no names of places."""
    return {
        "name": record.name,
        "edgekd": record.edgekd,
        "created": record.created,
        "command": record.command,
        "config": record.config,
        "origins": serialization.dump(record.origins),
        "versions": record.versions,
        "teacher": record.teacher.file.sha256,
        "students": {w.name: w.file.sha256 for w in record.students},
        "models": {f"{m.name} {m.precision}": m.file.sha256 for m in record.models},
        "measured": {
            " ".join(filter(None, (bench.target, bench.scenario))): {
                "machine": serialization.dump(bench.machine),
                "runtime": serialization.dump(bench.runtime),
                "samples": bench.samples.sha256 if bench.samples else None,
                "files": {m.contestant.name: m.contestant.file.sha256 for m in bench.measurements},
                "ships": bench.ships,
            }
            for bench in record.benches
        },
        "gates": serialization.dump(record.gates),
    }


def digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def chosen(record: Record) -> Iterator[tuple[BenchResult, Contestant]]:
    """What ships on every target that was measured."""
    for bench in record.benches:
        yield from ((bench, m.contestant) for m in bench.measurements if m.contestant.name == bench.ships)


def ship(bench: BenchResult, contestant: Contestant, stamp: str, out: Path) -> list[Path]:
    """The measured file with the stamp in its metadata, where people look for it; beside it the calibration cache of
    one that is float itself, and INT8 on its device."""
    import onnx

    model = onnx.load(str(contestant.file.path))
    stored = inspect.facts(contestant.file.path).precision
    made = [out / shipped(bench.target, contestant, stored)]
    made[0].parent.mkdir(parents=True, exist_ok=True)
    put(made[0], writer.content(model, {**props(model), STAMP: stamp}))
    if contestant.precision == "int8" != stored:
        for cache in (out / f"bundle-{bench.target}" / "models").glob(f"{glob.escape(network(contestant))}.cache"):
            made.append(made[0].with_name(cache.name))
            put(made[-1], cache.read_bytes())
    return made


def shipped(target: str, contestant: Contestant, stored: Precision) -> str:
    """Where a file that ships lies in the build's folder: ships/cpu/kpn-int8.onnx; `stored` is its own precision."""
    return f"{SHIPS}/{target}/{network(contestant).replace(' ', '-').replace('/', '-')}-{stored}.onnx"


def network(contestant: Contestant) -> str:
    return contestant.name.removesuffix(f" {contestant.precision}")


def listed_before(out: Path) -> list[str]:
    """The files of the manifest that is there already; none if it cannot be read."""
    try:
        return sorted(read(out)["files"])
    except ConfigError:
        return []


def props(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def put(path: Path, content: bytes) -> None:
    """Whole or not at all; what is there already is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def written(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a build. Raises ConfigError if there is none that can be read."""
    path = folder / NAME
    found = content(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ConfigError(f"`{path}` has schema {schema}; this edgekd reads {SCHEMA}", hint="build again")
    try:
        serialization.load(Manifest, found)
    except ConfigError as error:
        raise ConfigError(f"`{path}` is not whole: {error.what}", hint="build again") from None
    return found


def content(path: Path) -> Any:
    """Of a JSON file. Raises ConfigError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` cannot be read: {error}", hint="name the --out folder of a build") from None
