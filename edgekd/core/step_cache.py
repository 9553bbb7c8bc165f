"""The run directory: every step's inputs, settings and outputs, so that none runs twice."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from edgekd.core import serialization
from edgekd.core.artifact import File
from edgekd.core.settings import Plugin
from edgekd.errors import Busy, ConfigError, StaleArtifact

log = logging.getLogger(__name__)
A = TypeVar("A")
P = ParamSpec("P")
NOUNS = {  # modules that decide nothing about what a step makes
    "edgekd.errors",
    *(
        f"edgekd.core.{name}"
        for name in ("artifact", "bench_result", "build_record", "config_file", "model", "plugins")
    ),
    *(f"edgekd.core.{name}" for name in ("serialization", "settings", "step_cache", "target")),
    *(f"edgekd.onnx.{name}" for name in ("validate", "traverse")),
    *(f"edgekd.utils.{name}" for name in ("arrays", "external", "paths", "progress", "text")),
}
KEEP = ".work"  # below a step's partial directory: what lets an interrupted step go on; gone when it is done


class Unreadable(StaleArtifact):
    """The entry of a step is none that this version reads."""


class Ledger:
    """One directory per step, named by the step and a key of all that determines its output."""

    def __init__(
        self,
        root: Path,
        circumstances: Any = None,
        entries: dict[str, dict[str, Any]] | None = None,
        counts: Callable[[Any], bool] = lambda made: True,
    ) -> None:
        self.root, self.circumstances, self.counts = root, circumstances, counts
        self.entries = {} if entries is None else entries  # of each step that was asked for

    @property
    def seconds(self) -> dict[str, float]:
        """How long each step took when it was made."""
        return {name: entry["seconds"] for name, entry in self.entries.items()}

    @property
    def latest(self) -> str:
        """When the newest step was made, UTC."""
        return max(str(entry["finished"]) for entry in self.entries.values())

    @property
    def written(self) -> dict[str, str]:
        """The entries of all steps that were asked for: path from the ledger's parent -> sha256."""
        files = [self.root / entry["home"] / "step.json" for entry in self.entries.values()]
        return {str(path.relative_to(self.root.parent)): File.of(path).sha256 for path in files}

    def given(self, circumstances: Any, counts: Callable[[Any], bool] = lambda made: True) -> Ledger:
        """The same ledger for a step that also depends on what is no argument of it: the machine, a program, a file.

        What was made before is made again unless it `counts`.
        """
        return Ledger(self.root, circumstances, self.entries, counts)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builds out of this directory. Raises Busy if one is running. The lock dies with its process."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise Busy(
                    f"`{self.root}` is in use by a running build (process {lock.read().strip() or 'unknown'})",
                    hint="wait for it, or choose another folder with --out",
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def step(
        self, name: str, kind: type[A], make: Callable[Concatenate[Path, P], A], *args: P.args, **kwargs: P.kwargs
    ) -> A:
        """`make(out, *args, **kwargs)`, or what it made before from the same things.

        `make` writes into `NAME.partial`, which is renamed when whole. If it was interrupted it finds what it
        left there, and may go on from it. What another version wrote and this one cannot read is put aside, as
        `NAME.unreadable`. Raises StaleArtifact where a file of it changed.
        """
        facts = {"step": name, "args": serialization.facts([args, kwargs]), "code": code(make.__module__, args, kwargs)}
        if self.circumstances is not None:
            facts["given"] = serialization.facts(self.circumstances)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        home = self.root / f"{name}-{key}"
        if home.exists():
            try:
                made = self.recall(name, kind, home)
            except Unreadable as error:
                aside = self.root / f"{home.name}.unreadable"
                shutil.rmtree(aside, ignore_errors=True)
                home.rename(aside)
                log.warning("%s: %s; it is kept as `%s`, and made again", name, error, aside.name)
            else:
                if self.counts(made):
                    log.info("%s: unchanged", name)
                    shutil.rmtree(home / KEEP, ignore_errors=True)
                    return made
        log.info("%s ...", name)
        started = time.perf_counter()
        work = self.root / f"{home.name}.partial"
        work.mkdir(parents=True, exist_ok=True)
        output = serialization.dump(make(work, *args, **kwargs))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        seconds = round(time.perf_counter() - started, 3)
        entry = facts | {"output": output, "seconds": seconds, "finished": now, "machine": machine()}
        (work / "step.json").write_text(json.dumps(entry, indent=2))
        if home.exists():  # what does not count: not before there is something in its place
            discard(home)
        work.rename(home)  # atomic: a directory without a suffix is always whole
        log.info("%s: done in %.1f s", name, seconds)
        shutil.rmtree(home / KEEP, ignore_errors=True)  # not before: a killed step goes on from it
        return self.recall(name, kind, home)

    def recall(self, name: str, kind: type[A], home: Path) -> A:
        """What a whole step made. Raises Unreadable if its entry is none, StaleArtifact if its files changed."""
        try:
            entry = json.loads((home / "step.json").read_text())
            if not whole(entry):
                raise ValueError("it is no entry of a step")
            self.entries[name] = entry | {"home": home.name}
            return serialization.load(kind, entry["output"], home)
        except (ConfigError, ValueError, KeyError, FileNotFoundError, RecursionError) as error:
            raise Unreadable(f"`{home}` cannot be read; another version of edgekd may have written it") from error

    def prune(self) -> None:
        """Delete every step that was not asked for, half done or whole."""
        asked = {entry["home"] for entry in self.entries.values()}
        for old in self.root.iterdir():
            if old.is_dir() and old.name not in asked:
                discard(old)
                log.info("deleted: %s", old.name)


def discard(step: Path) -> None:
    """Delete a step; under another name, for half of one that is deleted must not be taken for a whole one."""
    gone = step.with_name(f"{step.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(step.rename(gone))


def whole(entry: Any) -> bool:
    """Whether it says all that is asked of a step that was made."""
    kinds = {"seconds": (int, float), "finished": (str,), "machine": (dict,), "code": (dict,)}
    return (
        isinstance(entry, dict)
        and "output" in entry
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(word, str) for word in (*entry["machine"].values(), entry["code"].get("sha256")))
    )


def machine() -> dict[str, str]:
    return {"architecture": platform.machine(), "system": platform.platform(), "python": platform.python_version()}


def code(module: str, *values: Any) -> dict[str, Any]:
    """The edgekd modules that `module` and the plug-ins in `values` run through, and the packages that those import.

    The nouns of `core` are left out: an edit of an error message must not train a teacher anew.
    """
    modules: set[str] = set()
    packages: set[str] = set()
    waiting = [module, *(type(p).__module__ for p in plugins_in(values))]
    while waiting:
        name = waiting.pop()
        if name in modules or name in NOUNS:
            continue
        modules.add(name)
        for other in imports(name):
            if other.startswith("edgekd"):
                waiting.append(other)
            else:
                packages.add(other.partition(".")[0])
    digest = hashlib.sha256("".join(sorted(source(m) for m in modules)).encode()).hexdigest()
    outside = [f for f in (p.fingerprint() for p in plugins_in(values)) if f]
    return {"sha256": digest, "versions": versions(frozenset(packages)), "outside": outside}


def plugins_in(value: Any) -> Iterator[Plugin]:
    """All plug-in objects inside of `value`, wherever a dataclass or a container holds them."""
    if isinstance(value, Plugin):
        yield value
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from plugins_in(item)


@cache
def source(module: str) -> str:
    spec = find_spec(module)
    return Path(spec.origin).read_text() if spec and spec.origin else ""


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{a.name}" for a in node.names] if node.module.startswith("edgekd") else []
            found.update([name for name in below if is_module(name)] or [node.module])
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
    return frozenset(found)


def is_module(name: str) -> bool:
    """Whether `from a import b` names a module `a.b`, and not something inside of `a`."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # `a` is no package
        return False


@cache
def versions(packages: frozenset[str]) -> dict[str, str]:
    """The installed versions of top-level packages; the standard library is left out."""
    distributions = packages_distributions()
    found = {}
    for package in sorted(packages - set(sys.stdlib_module_names)):
        for name in distributions.get(package, [])[:1]:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # a broken installation: the import of it will say so
                continue
    return found
