"""The manifest of a build: what it was made from, what was decided, and the hash of every file; and its check.

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

from edgekd.core import onnx_facts, onnx_files, plain
from edgekd.core.artifact import File
from edgekd.core.errors import ConfigError, EdgekdError
from edgekd.core.record import Record
from edgekd.core.trial import BenchResult, Contestant

SCHEMA = 1  # of manifest.json
NAME = "manifest.json"
STAMP = "edgekd.manifest"  # key of the metadata of a file that ships
SHIPS = "ships"  # the folder of what ships, by target
BUNDLES = "bundle-*/manifest.json"


@dataclass(frozen=True)
class Finding:
    """One file that is not as the manifest says."""

    file: str  # from the build's folder
    what: str


@dataclass(frozen=True)
class Checked:
    """What `verify` found."""

    folder: Path
    manifest: str  # sha256 of what the build was made from and decided
    files: int  # that were looked at
    absent: tuple[str, ...]  # parts of a build that may be left behind when it is sent, and were
    findings: tuple[Finding, ...]


def certify(record: Record, out: Path, files: tuple[File, ...], steps: Mapping[str, str]) -> Path:
    """Write what ships and the manifest into `out`; `files` are those of the report there, `steps` the entries of all
    steps, by their path below `out` -> sha256. Gives back the manifest's path."""
    told = provenance(record)
    stamp = digest(told)
    shipped = [path for bench, contestant in chosen(record) for path in ship(bench, contestant, stamp, out)]
    for old in (out / name for name in listed_before(out) if name.startswith(f"{SHIPS}/")):
        if old not in shipped:
            old.unlink(missing_ok=True)
    names = [file.path.name for file in files] + [str(path.relative_to(out)) for path in shipped]
    names += [str(path.relative_to(out)) for path in sorted(out.glob(BUNDLES))]
    hashes = {name: File.of(out / name).sha256 for name in names}
    content = {
        "schema": SCHEMA,
        "sha256": stamp,
        "provenance": told,
        "files": hashes,
        "steps": dict(sorted(steps.items())),
    }
    put(out / NAME, written(content))
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
        "origins": plain.dump(record.origins),
        "versions": record.versions,
        "teacher": record.teacher.file.sha256,
        "students": {w.name: w.file.sha256 for w in record.students},
        "models": {f"{m.name} {m.precision}": m.file.sha256 for m in record.models},
        "measured": {
            " ".join(filter(None, (bench.target, bench.scenario))): {
                "machine": plain.dump(bench.machine),
                "runtime": plain.dump(bench.runtime),
                "samples": bench.samples.sha256 if bench.samples else None,
                "files": {m.contestant.name: m.contestant.file.sha256 for m in bench.measurements},
                "ships": bench.ships,
            }
            for bench in record.benches
        },
        "gates": plain.dump(record.gates),
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
    network = contestant.name.removesuffix(f" {contestant.precision}")
    home, name = out / SHIPS / bench.target, network.replace(" ", "-").replace("/", "-")
    home.mkdir(parents=True, exist_ok=True)
    stored = onnx_facts.facts(contestant.file.path).precision
    made = [home / f"{name}-{stored}.onnx"]
    put(made[0], onnx_files.content(model, {**props(model), STAMP: stamp}))
    if contestant.precision == "int8" != stored:
        for cache in (out / f"bundle-{bench.target}" / "models").glob(f"{glob.escape(network)}.cache"):
            made.append(home / cache.name)
            put(made[-1], cache.read_bytes())
    return made


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
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{path}` cannot be read: {error}", hint="name the --out folder of a build") from None
    kinds = {"sha256": str, "provenance": dict, "files": dict, "steps": dict}
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ConfigError(f"`{path}` has schema {schema}; this edgekd reads {SCHEMA}", hint="build again")
    if not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"`{path}` lacks one of {', '.join(kinds)}", hint="build again: it is not whole")
    return found


def verify(folder: Path) -> Checked:
    """Every file of the build in `folder` against its manifest. Raises ConfigError if there is no manifest."""
    found = read(folder)
    findings = []
    sound = digest(found["provenance"]) == found["sha256"]
    if not sound:
        findings.append(Finding(NAME, "what it says of the build is not what its hash was taken of"))
    for path in sorted((folder / SHIPS).glob("*/*.onnx")):
        if str(path.relative_to(folder)) not in found["files"]:
            findings.append(Finding(str(path.relative_to(folder)), "was not made by this build"))
    waiting = {**found["files"], **found["steps"]}
    absent = sorted({part for part in map(part_of, waiting) if part and not (folder / part).is_dir()})
    waiting = {name: sha256 for name, sha256 in waiting.items() if part_of(name) not in absent}
    looked: dict[str, str] = {}
    while waiting:
        looked |= waiting
        wrong = [f for name, sha256 in waiting.items() for f in compared(folder, name, sha256)]
        findings += wrong
        whole = waiting.keys() - {f.file for f in wrong}
        inside = {k: v for name in sorted(whole) for k, v in listed(folder, name).items()}
        waiting = {name: sha256 for name, sha256 in inside.items() if name not in looked}
    if sound:
        findings += stamps(folder, found, {f.file for f in findings})
    return Checked(folder, found["sha256"], len(looked), tuple(absent), tuple(findings))


def part_of(name: str) -> str:
    """The folder that may be left behind when a build is sent; empty for what belongs to every copy of it."""
    first = name.partition("/")[0]
    return first if first == "steps" or first.startswith("bundle-") else ""


def compared(folder: Path, name: str, sha256: str) -> list[Finding]:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return [Finding(name, "lies outside of the build")]
    if not path.is_file():
        return [Finding(name, "is gone")]
    now = File.of(path).sha256
    return [] if now == sha256 else [Finding(name, f"changed: sha256 {sha256[:12]} then, {now[:12]} now")]


def listed(folder: Path, name: str) -> dict[str, str]:
    """The files that an unchanged entry of a step, or manifest of a bundle, lists: path below `folder` -> sha256."""
    place = Path(name)
    if place.name == "step.json":
        output = json.loads((folder / name).read_text(encoding="utf-8"))["output"]
        return {str(place.parent / file): sha256 for file, sha256 in outputs(output)}
    if place.match(BUNDLES):
        files = json.loads((folder / name).read_text(encoding="utf-8"))["files"]
        return {str(place.parent / file): facts["sha256"] for file, facts in files.items()}
    return {}


def outputs(value: Any) -> Iterator[tuple[str, str]]:
    """Name and hash of all files in what a step gave back."""
    if isinstance(value, dict):
        if value.keys() == {"name", "sha256"}:
            yield value["name"], value["sha256"]
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from outputs(item)


def stamps(folder: Path, found: Mapping[str, Any], known: set[str]) -> Iterator[Finding]:
    """What ships must carry the hash of this manifest, and be the measured file otherwise."""
    for target, told in found["provenance"]["measured"].items():
        for name in sorted(found["files"].keys() - known):
            if not (name.startswith(f"{SHIPS}/{target}/") and name.endswith(".onnx")):
                continue
            try:
                model = onnx_facts.load(folder / name)
            except EdgekdError as error:
                yield Finding(name, error.what)
                continue
            kept = props(model)
            if kept.pop(STAMP, "") != found["sha256"]:
                yield Finding(name, "is stamped with another manifest")
            elif hashlib.sha256(onnx_files.content(model, kept)).hexdigest() != told["files"][told["ships"]]:
                yield Finding(name, "is not the file that was measured")


def described(checked: Checked) -> str:
    """For people."""
    lines = [f"{f.file}: {f.what}" for f in checked.findings]
    if checked.absent:
        lines.append(f"not here, so not looked at: {', '.join(checked.absent)}")
    verdict = f"{len(checked.findings)} are not as they were" if checked.findings else "all as they were"
    return "\n".join([*lines, f"{checked.files} files of the build {checked.manifest[:12]}: {verdict}"])
