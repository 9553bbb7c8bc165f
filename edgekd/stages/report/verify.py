"""Verify: the files of a build, which may come from anywhere, against its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.core import serialization
from edgekd.core.artifact import File
from edgekd.errors import ConfigError, EdgekdError
from edgekd.onnx import inspect, writer
from edgekd.stages.report.provenance import BUNDLES, NAME, SHIPS, STAMP, content, digest, props, read
from edgekd.utils.paths import leads_out


@dataclass(frozen=True)
class Listed:
    sha256: str


@dataclass(frozen=True)
class OfBundle:
    """The manifest of a bundle, as far as its files go."""

    files: dict[str, Listed]


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


def verify(folder: Path) -> Checked:
    """Every file of the build in `folder` against its manifest. Raises ConfigError if there is no manifest."""
    found = read(folder)
    findings = []
    sound = digest(found["provenance"]) == found["sha256"]
    if not sound:
        findings.append(Finding(NAME, "what it says of the build is not what its hash was taken of"))
    waiting = {**found["files"], **found["steps"]}
    absent = sorted({part for part in map(part_of, waiting) if part and not (folder / part).is_dir()})
    waiting = {name: sha256 for name, sha256 in waiting.items() if part_of(name) not in absent}
    looked: dict[str, str] = {}
    folders = [SHIPS]
    while waiting:
        looked |= waiting
        wrong = [f for name, sha256 in waiting.items() for f in compared(folder, name, sha256)]
        findings += wrong
        inside: dict[str, str] = {}
        for name in sorted(waiting.keys() - {f.file for f in wrong}):
            try:
                inside |= listed(folder, name)
            except ConfigError as error:
                findings.append(Finding(name, f"is no list of files: {error.what}"))
            else:
                folders += [Path(name).parent.as_posix()] * Path(name).match(BUNDLES)
        waiting = {name: sha256 for name, sha256 in inside.items() if name not in looked}
    findings += [
        Finding(name, "was not made by this build") for name in strangers(folder, folders) if name not in looked
    ]
    if sound:
        findings += stamps(folder, found, {f.file for f in findings})
    return Checked(folder, found["sha256"], len(looked), tuple(absent), tuple(findings))


def strangers(folder: Path, parts: list[str]) -> Iterator[str]:
    """The files below some folders of a build; what came back from a device is not of the build."""
    for part in parts:
        for path in sorted((folder / part).rglob("*")):
            inside = path.relative_to(folder / part).parts[0]
            if (path.is_symlink() or not path.is_dir()) and inside != "results":
                yield path.relative_to(folder).as_posix()


def part_of(name: str) -> str:
    """The folder that may be left behind when a build is sent; empty for what belongs to every copy of it."""
    first = name.partition("/")[0]
    return first if first == "steps" or first.startswith("bundle-") else ""


def compared(folder: Path, name: str, sha256: str) -> list[Finding]:
    path = folder / name
    if leads_out(folder, name):
        return [Finding(name, "lies outside of the build")]
    try:
        now = File.of(path).sha256 if path.is_file() else ""
    except OSError as error:
        return [Finding(name, f"cannot be read: {os.strerror(error.errno or 0).lower()}")]
    if not now:
        return [Finding(name, "is gone")]
    return [] if now == sha256 else [Finding(name, f"changed: sha256 {sha256[:12]} then, {now[:12]} now")]


def listed(folder: Path, name: str) -> dict[str, str]:
    """The files that an unchanged entry of a step, or manifest of a bundle, lists: path below `folder` -> sha256.

    Raises ConfigError if it is neither.
    """
    place = Path(name)
    if place.name == "step.json":
        entry = content(folder / name)
        try:
            found = dict(outputs(entry["output"]))
        except (KeyError, TypeError, RecursionError):
            raise ConfigError("it is no entry of a step") from None
        return {str(place.parent / file): sha256 for file, sha256 in found.items()}
    if place.match(BUNDLES):
        files = serialization.load(OfBundle, content(folder / name)).files
        return {str(place.parent / file): facts.sha256 for file, facts in files.items()}
    return {}


def outputs(value: Any) -> Iterator[tuple[str, str]]:
    """Name and hash of all files in what a step gave back."""
    if isinstance(value, dict):
        if value.keys() == {"name", "sha256"}:
            yield str(value["name"]), str(value["sha256"])
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
                model = inspect.load(folder / name)
            except EdgekdError as error:
                yield Finding(name, error.what)
                continue
            kept = props(model)
            if kept.pop(STAMP, "") != found["sha256"]:
                yield Finding(name, "is stamped with another manifest")
            elif hashlib.sha256(writer.content(model, kept)).hexdigest() != told["files"].get(told["ships"]):
                yield Finding(name, "is not the file that was measured")


def described(checked: Checked) -> str:
    """For people."""
    lines = [f"{f.file}: {f.what}" for f in checked.findings]
    if checked.absent:
        lines.append(f"not here, so not looked at: {', '.join(checked.absent)}")
    verdict = f"{len(checked.findings)} are not as they were" if checked.findings else "all as they were"
    return "\n".join([*lines, f"{checked.files} files of the build {checked.manifest[:12]}: {verdict}"])
