"""The step cache: a folder for each step of a run, keyed by all that determines its output, so that none runs twice."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import inspect
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

from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.settings import Plugin
from edgekd.errors import Busy, ConfigError, StaleArtifact

log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")
# What no output depends on: tools, the machinery of settings and steps, and records that only hold what they are told.
# A name stands for all modules below it. The rest of `core` computes (the inputs of a network, say), so it counts.
UNKEYED_MODULES = (
    *("edgekd.errors", "edgekd.utils", "edgekd.onnx.validate"),
    *(f"edgekd.core.{name}" for name in ("artifact", "bench_result", "build_record", "config_file", "model")),
    *(f"edgekd.core.{name}" for name in ("plugins", "renamed", "serialization", "settings", "step_cache", "target")),
)
WORK_DIR = ".work"  # in the folder of a step: what lets an interrupted one continue; deleted when it is complete


class UnreadableStep(StaleArtifact):
    """This version cannot read the entry of a step."""


class StepCache:
    """Runs steps, each into a folder that is named by the step and by the key of what determines its output."""

    def __init__(
        self,
        root: Path,
        dependencies: Any = None,
        is_valid: Callable[[Any], bool] = lambda output: True,
        shared: StepCache | None = None,
    ) -> None:
        self.root, self.dependencies, self.is_valid = root, dependencies, is_valid
        self.entries: dict[str, dict[str, Any]] = shared.entries if shared else {}  # of the steps of this run
        self.files: set[File] = shared.files if shared else set()  # inputs from outside of `root`
        self.fingerprints: dict[str, str] = shared.fingerprints if shared else {}  # as `fingerprints` returns them

    @property
    def seconds(self) -> dict[str, float]:
        """How long each step took when it ran."""
        return {name: entry["seconds"] for name, entry in self.entries.items()}

    @property
    def latest(self) -> str:
        """When the newest step ended, UTC."""
        return max(str(entry["finished"]) for entry in self.entries.values())

    @property
    def written(self) -> dict[str, str]:
        """The entry of each step of this run: path from the folder above `root` -> sha256."""
        files = [self.root / entry["home"] / "step.json" for entry in self.entries.values()]
        return {str(path.relative_to(self.root.parent)): File.of(path).sha256 for path in files}

    def depends_on(self, dependencies: Any, is_valid: Callable[[Any], bool] = lambda output: True) -> StepCache:
        """Return this cache for steps that also depend on what is not among their arguments.

        Args:
            dependencies: the machine, a program, a file: anything that `serialization.cache_key` takes.
            is_valid: tells of a cached output whether it may be used; if not, the step runs again.
        """
        return StepCache(self.root, dependencies, is_valid, shared=self)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builds out of this folder. Raises Busy if one is running. The lock ends with its process."""
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

    def step(self, name: str, fn: Callable[Concatenate[Path, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `fn(folder, *args, **kwargs)`, or what it returned before for the same key.

        `fn` writes into `NAME-KEY.partial`, which is renamed when it is complete; what an interrupted run left there,
        the next one finds. An entry that another version wrote and this one cannot read is kept as
        `NAME-KEY.unreadable`.

        Args:
            name: of the step; with the key, of its folder.
            fn: a function at the top level of a module, with the type of its result as an annotation.

        Raises:
            StaleArtifact: if a file of a cached output changed.
        """
        kind, key = return_type(fn), self.key(name, fn.__module__, args, kwargs)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        home = self.root / f"{name}-{digest}"
        if home.exists():
            try:
                cached: T = self.load_step(name, kind, home)
            except UnreadableStep as error:
                aside = self.root / f"{home.name}.unreadable"
                shutil.rmtree(aside, ignore_errors=True)
                home.rename(aside)
                log.warning("%s: %s; it is kept as `%s`, and the step runs again", name, error, aside.name)
            else:
                if self.is_valid(cached):
                    log.info("%s: unchanged", name)
                    shutil.rmtree(home / WORK_DIR, ignore_errors=True)
                    return cached
        log.info("%s ...", name)
        started = time.perf_counter()
        partial = self.root / f"{home.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        output = serialization.to_json(fn(partial, *args, **kwargs))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        seconds = round(time.perf_counter() - started, 3)
        entry = key | {"output": output, "seconds": seconds, "finished": now, "machine": machine()}
        (partial / "step.json").write_text(json.dumps(entry, indent=2))
        if home.exists():  # an output that is not valid is deleted only now that there is another
            discard(home)
        partial.rename(home)  # atomic: a folder without a suffix is always complete
        log.info("%s: done in %.1f s", name, seconds)
        shutil.rmtree(home / WORK_DIR, ignore_errors=True)  # after the rename: a killed step continues from it
        result: T = self.load_step(name, kind, home)
        return result

    def key(self, name: str, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all that determines the output of a step, and note what of it is from outside."""
        files = instances_in([args, kwargs, self.dependencies], File)
        self.files.update(file for file in files if not file.path.is_relative_to(self.root))
        code = code_key(module, args, kwargs)
        self.fingerprints.update(code["outside"])
        key = {"step": name, "args": serialization.cache_key([args, kwargs]), "code": code}
        if self.dependencies is not None:
            key["depends_on"] = serialization.cache_key(self.dependencies)
        return key

    def load_step(self, name: str, kind: Any, home: Path) -> Any:
        """Return the output of a complete step, of the type `kind`.

        Raises:
            UnreadableStep: if its entry cannot be read.
            StaleArtifact: if one of its files changed.
        """
        try:
            entry = json.loads((home / "step.json").read_text())
            if not is_complete(entry):
                raise ValueError("it is not the entry of a step")
            self.entries[name] = entry | {"home": home.name}
            return serialization.from_json(kind, entry["output"], home)
        except (ConfigError, ValueError, KeyError, FileNotFoundError, RecursionError) as error:
            raise UnreadableStep(f"`{home}` cannot be read; another version of edgekd may have written it") from error

    def prune(self) -> None:
        """Delete every step that this run did not use, complete or not."""
        used = {entry["home"] for entry in self.entries.values()}
        for old in self.root.iterdir():
            if old.is_dir() and old.name not in used:
                discard(old)
                log.info("deleted: %s", old.name)


def return_type(fn: Callable[..., Any]) -> Any:
    """Return the type of a function's result, from its annotation; the others are not evaluated."""
    plain = inspect.unwrap(fn)
    plain = getattr(plain, "__func__", plain)
    annotation = plain.__annotations__["return"]
    return eval(annotation, plain.__globals__) if isinstance(annotation, str) else annotation


def discard(step: Path) -> None:
    """Delete a step; renamed first, so that one that is half deleted does not look complete."""
    trash = step.with_name(f"{step.name}.gone")
    shutil.rmtree(trash, ignore_errors=True)
    shutil.rmtree(step.rename(trash))


def is_complete(entry: Any) -> bool:
    """Return whether an entry has all that a complete step has."""
    kinds = {"seconds": (int, float), "finished": (str,), "machine": (dict,), "code": (dict,)}
    return (
        isinstance(entry, dict)
        and "output" in entry
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(word, str) for word in (*entry["machine"].values(), entry["code"].get("sha256")))
    )


def machine() -> dict[str, str]:
    """Return what this computer and its Python are."""
    return {"architecture": platform.machine(), "system": platform.platform(), "python": platform.python_version()}


def code_key(module: str, *values: Any) -> dict[str, Any]:
    """Return a hash of the edgekd modules that `module` and the plug-ins in `values` import, directly or not, the
    versions of the packages that these import, and the fingerprints of the plug-ins.

    Modules count by their syntax: comments, docstrings, and the texts of errors and log messages do not count.
    """
    keyed: set[str] = set()
    packages: set[str] = set()
    waiting = [module, *(type(plugin).__module__ for plugin in instances_in(values, Plugin))]
    while waiting:
        name = waiting.pop()
        if name in keyed or is_unkeyed(name):
            continue
        keyed.add(name)
        for imported in imports(name):
            if imported.startswith("edgekd"):
                waiting.append(imported)
            else:
                packages.add(imported.partition(".")[0])
    digest = hashlib.sha256("".join(sorted(syntax_hash(name) for name in keyed)).encode()).hexdigest()
    return {"sha256": digest, "versions": versions(frozenset(packages)), "outside": fingerprints(values)}


def fingerprints(value: Any) -> dict[str, str]:
    """Return the fingerprint of each plug-in inside of `value` that has one, by its folder and settings as JSON."""
    texts = {}
    for plugin in instances_in(value, Plugin):
        name = json.dumps({"folder": plugins.folder_of(type(plugin)), **serialization.to_json(plugin)}, sort_keys=True)
        if name not in texts and (text := plugin.fingerprint()):
            texts[name] = text
    return texts


def is_unkeyed(module: str) -> bool:
    """Return whether no output depends on a module."""
    return any(module == name or module.startswith(f"{name}.") for name in UNKEYED_MODULES)


def instances_in(value: Any, kind: type[T]) -> Iterator[T]:
    """Yield all objects of a type inside of `value`, wherever a dataclass or a container holds them."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from instances_in(item, kind)


@cache
def syntax_tree(module: str) -> ast.Module:
    """Return the syntax of a module; an empty one for a built-in."""
    spec = find_spec(module)
    return ast.parse(Path(spec.origin).read_bytes() if spec and spec.origin else b"")


@cache
def syntax_hash(module: str) -> str:
    """Return a hash of what a module does, which comments, docstrings and messages do not change."""
    return hashlib.sha256(ast.dump(WithoutTexts().visit(syntax_tree(module))).encode()).hexdigest()


class WithoutTexts(ast.NodeTransformer):
    """Removes what people read: strings that stand alone, calls of `log`, and what an error says."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value.func if isinstance(node.value, ast.Call) else None
        logs = isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "log"
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if logs or text else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(error, None)


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules that a module imports when it runs, at its top or inside of a function."""
    names: set[str] = set()
    waiting: list[ast.AST] = [syntax_tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{a.name}" for a in node.names] if node.module.startswith("edgekd") else []
            names.update([name for name in below if is_module(name)] or [node.module])
        elif isinstance(node, ast.Import):
            names.update(a.name for a in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            waiting += ast.iter_child_nodes(node)
    return frozenset(names)


def is_module(name: str) -> bool:
    """Return whether `from a import b` imports a module `a.b`, not something inside of `a`."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # `a` is not a package
        return False


@cache
def versions(packages: frozenset[str]) -> dict[str, str]:
    """Return the installed versions of top-level packages, without the standard library."""
    distributions = packages_distributions()
    installed = {}
    for package in sorted(packages - set(sys.stdlib_module_names)):
        for name in distributions.get(package, [])[:1]:
            try:
                installed[name] = version(name)
            except PackageNotFoundError:  # a broken installation: the import of it will say so
                continue
    return installed
