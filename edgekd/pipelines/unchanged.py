"""Recognise a build that has nothing to do, from files alone: no plug-in is loaded that needs torch.

A build leaves a snapshot of all that it depends on and of all that it wrote. The next one that is asked for the same is
done if nothing of it differs. Whatever is in doubt (another machine, an edited source, a changed file, an undecided
gate) runs through the steps, whose keys decide. So a snapshot may be too strict, and never too lax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgekd
from edgekd.core import plugins, serialization
from edgekd.core.config_file import ConfigSource
from edgekd.errors import EdgekdError
from edgekd.pipelines.build_result import BuildResult
from edgekd.utils import cpu

if TYPE_CHECKING:
    from edgekd.config import BuildConfig
    from edgekd.core.target import Target
    from edgekd.pipelines.run import Run

SNAPSHOT = "steps/unchanged.json"  # below the folder of a build
RESULT = "results/result.json"  # below a bundle: a person may bring one at any time


def load_unchanged(out: Path, request: Mapping[str, Any]) -> BuildResult | None:
    """Return the result of the build in `out` if a build of `request` would do nothing; None if in doubt."""
    try:
        saved = json.loads((out / SNAPSHOT).read_text())
        if saved["request"] != json.loads(json.dumps(request)):
            return None
        same = (
            all(file_hash(Path(name)) == sha256 for name, sha256 in saved["files"].items())
            and all(fingerprint(name) == text for name, text in saved["fingerprints"].items())
            and all(unavailable_reason(name) == reason for name, reason in saved["unavailable"].items())
        )
        return BuildResult.from_json(saved["result"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EdgekdError):  # it is no snapshot of this version
        return None


def forget(out: Path) -> None:
    """Delete the snapshot: a build begins."""
    (out / SNAPSHOT).unlink(missing_ok=True)


def remember(run: Run, request: Mapping[str, Any], result: BuildResult, calibration: Path) -> None:
    """Save a snapshot of a build that ended; none where the next one has something to do or to look at anyway.

    Args:
        calibration: the folder that the calibration set was copied to.
    """
    targets = run.config.targets
    runs_bundles = any(target.runtime == "tensorrt" and not target.unavailable_reason() for target in targets)
    if result.exit_code == 4 or runs_bundles:
        return
    out = result.out
    homes = [out / "steps" / entry["home"] for entry in run.cache.entries.values()]
    folders = (*homes, calibration, out / "artifacts", *out.glob("bundle-*"))
    written = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    written += [path for path in out.iterdir() if path.is_file()]
    results = [out / f"bundle-{name}" / RESULT for name in result.summary["targets"]]
    paths = {path.absolute() for path in (*written, *results)}
    inputs = {str(file.path.absolute()): file.sha256 for file in run.cache.files}  # as they were when they were used
    snapshot = {
        "request": request,
        "files": {str(path): file_hash(path) for path in sorted(paths)} | inputs,
        "fingerprints": run.cache.fingerprints,
        "unavailable": {target_name(target): target.unavailable_reason() for target in targets},
        "result": result.to_json(),
    }
    partial = out / f"{SNAPSHOT}.partial"
    partial.write_text(json.dumps(snapshot))
    partial.rename(out / SNAPSHOT)


def file_hash(path: Path) -> str:
    """Return the sha256 of a file; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """Return what a build depends on that nobody asks for: the code of edgekd and plug-ins, packages, the machine.

    It is part of a request, so it is taken before a build: sources may be edited while the build runs.
    """
    sources = hashlib.sha256()
    folders = [*map(Path, edgekd.__path__), *(Path(edgekd.__path__[0]).parent / "deploy").glob("runner")]
    files = {p for folder in folders for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    for folder in plugins.FOLDERS:
        modules = {module for module in plugins.modules(folder).values() if not module.startswith("edgekd.")}
        files |= {Path(spec.origin) for spec in map(find_spec, modules) if spec and spec.origin}
    for path in sorted(files):
        sources.update(f"{path} {file_hash(path)}\n".encode())
    places = [Path(place) for place in sys.path if Path(place).is_dir()]
    return {
        "sources": sources.hexdigest(),
        "packages": sorted(path.name for place in places for path in place.glob("*.dist-info")),
        "python": sys.version,
        "system": list(os.uname()),
        "folder": str(Path.cwd()),  # relative paths of a configuration start there
        "processor": [cpu.name(), *cpu.flags()],
        "gpus": [*sorted(path.name for path in Path("/dev").glob("nvidia*")), os.environ.get("CUDA_VISIBLE_DEVICES")],
    }


def fingerprint(name: str) -> str:
    """Return the fingerprint of a plug-in; see `step_cache.fingerprints`."""
    settings = json.loads(name)
    kind = plugins.load(settings.pop("folder"), settings.pop("use"))
    text: str = serialization.from_json(kind, settings).fingerprint()
    return text


def describe(config: BuildConfig | ConfigSource) -> dict[str, Any]:
    """Return a configuration as JSON, for a request; one that is not loaded as it is asked for."""
    if isinstance(config, ConfigSource):
        return dataclasses.asdict(config) | {"source": config.read()}
    settings: dict[str, Any] = serialization.to_json(config)
    return settings


def target_name(target: Target) -> str:
    """Return a target as JSON."""
    return json.dumps(serialization.to_json(target), sort_keys=True)


def unavailable_reason(name: str) -> str:
    """Return why this machine cannot run a target, given as `target_name` returns it; empty if it can."""
    settings = json.loads(name)
    target: Target = plugins.load("targets", settings.pop("use"))(**settings)
    return target.unavailable_reason()
