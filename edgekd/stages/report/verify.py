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
from edgekd.stages.report.provenance import ARTIFACTS, BUNDLES, NAME, STAMP, build_hash, content, props, read
from edgekd.utils.paths import escapes_folder


@dataclass(frozen=True)
class BundleFile:
    sha256: str


@dataclass(frozen=True)
class BundleFiles:
    """The manifest of a bundle, as far as its files go."""

    files: dict[str, BundleFile]


@dataclass(frozen=True)
class Finding:
    """One file that is not as the manifest says."""

    file: str  # from the build's folder
    what: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    folder: Path
    manifest: str  # sha256 of what the build was made from and decided
    files: int  # that were looked at
    absent: tuple[str, ...]  # parts of a build that may be left behind when it is sent, and were
    findings: tuple[Finding, ...]


def verify(folder: Path) -> Verification:
    """Every file of the build in `folder` against its manifest. Raises ConfigError if there is no manifest."""
    manifest = read(folder)
    findings = []
    sound = build_hash(manifest["provenance"]) == manifest["sha256"]
    if not sound:
        findings.append(Finding(NAME, "what it says of the build is not what its hash was taken of"))
    waiting = {**manifest["files"], **manifest["steps"]}
    absent = sorted({part for part in map(part_of, waiting) if part and not (folder / part).is_dir()})
    waiting = {name: sha256 for name, sha256 in waiting.items() if part_of(name) not in absent}
    looked: dict[str, str] = {}
    folders = [ARTIFACTS]
    while waiting:
        looked |= waiting
        wrong = [f for name, sha256 in waiting.items() for f in compare_hash(folder, name, sha256)]
        findings += wrong
        inside: dict[str, str] = {}
        for name in sorted(waiting.keys() - {f.file for f in wrong}):
            try:
                inside |= listed_files(folder, name)
            except ConfigError as error:
                findings.append(Finding(name, f"is no list of files: {error.what}"))
            else:
                folders += [Path(name).parent.as_posix()] * Path(name).match(BUNDLES)
        waiting = {name: sha256 for name, sha256 in inside.items() if name not in looked}
    findings += [
        Finding(name, "was not made by this build") for name in unlisted_files(folder, folders) if name not in looked
    ]
    if sound:
        findings += check_artifacts(folder, manifest, {f.file for f in findings})
    return Verification(folder, manifest["sha256"], len(looked), tuple(absent), tuple(findings))


def unlisted_files(folder: Path, parts: list[str]) -> Iterator[str]:
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


def compare_hash(folder: Path, name: str, sha256: str) -> list[Finding]:
    path = folder / name
    if escapes_folder(folder, name):
        return [Finding(name, "lies outside of the build")]
    try:
        now = File.of(path).sha256 if path.is_file() else ""
    except OSError as error:
        return [Finding(name, f"cannot be read: {os.strerror(error.errno or 0).lower()}")]
    if not now:
        return [Finding(name, "is gone")]
    return [] if now == sha256 else [Finding(name, f"changed: sha256 {sha256[:12]} then, {now[:12]} now")]


def listed_files(folder: Path, name: str) -> dict[str, str]:
    """The files that an unchanged entry of a step, or manifest of a bundle, lists: path below `folder` -> sha256.

    Raises ConfigError if it is neither.
    """
    place = Path(name)
    if place.name == "step.json":
        entry = content(folder / name)
        try:
            hashes = dict(outputs(entry["output"]))
        except (KeyError, TypeError, RecursionError):
            raise ConfigError("it is no entry of a step") from None
        return {str(place.parent / file): sha256 for file, sha256 in hashes.items()}
    if place.match(BUNDLES):
        files = serialization.from_json(BundleFiles, content(folder / name)).files
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


def check_artifacts(folder: Path, manifest: Mapping[str, Any], reported: set[str]) -> Iterator[Finding]:
    """Yield the selected files without the hash of this manifest, or that are not the measured file otherwise."""
    for target, facts in manifest["provenance"]["measured"].items():
        for name in sorted(manifest["files"].keys() - reported):
            if not (name.startswith(f"{ARTIFACTS}/{target}/") and name.endswith(".onnx")):
                continue
            try:
                model = inspect.load(folder / name)
            except EdgekdError as error:
                yield Finding(name, error.what)
                continue
            kept = props(model)
            if kept.pop(STAMP, "") != manifest["sha256"]:
                yield Finding(name, "is stamped with another manifest")
            elif hashlib.sha256(writer.to_bytes(model, kept)).hexdigest() != facts["files"].get(facts["selected"]):
                yield Finding(name, "is not the file that was measured")


def format_verification(result: Verification) -> str:
    """For people."""
    lines = [f"{f.file}: {f.what}" for f in result.findings]
    if result.absent:
        lines.append(f"not here, so not looked at: {', '.join(result.absent)}")
    verdict = f"{len(result.findings)} are not as they were" if result.findings else "all as they were"
    return "\n".join([*lines, f"{result.files} files of the build {result.manifest[:12]}: {verdict}"])
