"""Find a plug-in by name: the name of the choice is the name of its file."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekd.errors import ConfigError
from edgekd.utils.external import foreign

FOLDERS = ("methods", "models", "data", "targets", "metrics")
SHOWN = 20  # names that an error lists: a network has hundreds of layers


@cache
def places(folder: str) -> dict[str, str]:
    """Name -> module of every plug-in of a folder, without importing any.

    Packages outside of edgekd add theirs with entry points in the group `edgekd.<folder>`, each naming a module.
    """
    package = importlib.import_module(f"edgekd.{folder}")
    own = {m.name: f"edgekd.{folder}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"}
    return {e.name: e.value for e in entry_points(group=f"edgekd.{folder}")} | own


def names(folder: str) -> list[str]:
    return sorted(places(folder))


def load(folder: str, name: str) -> Any:
    """The PLUGIN constant of `edgekd/<folder>/<name>.py`. Raises ConfigError if there is no such file.

    One of another package is its code: it runs, and what it raises is told.
    """
    if name not in places(folder):
        raise unknown(f"there is no `{name}` in edgekd/{folder}/", name, names(folder))
    module = places(folder)[name]
    if module.startswith("edgekd."):
        return importlib.import_module(module).PLUGIN
    with foreign(f"the plug-in `{name}` of `{module}` cannot be loaded", "mend its package, or remove it"):
        return importlib.import_module(module).PLUGIN


def unknown(what: str, name: str, known: list[str]) -> ConfigError:
    """An error for a name that is not among `known`, with the nearest ones as the hint."""
    near = [f"`{one}`" for one in difflib.get_close_matches(name, known)]
    guess = f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}? " if near else ""
    more = f", and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return ConfigError(what, hint=f"{guess}known: {', '.join(known[:SHOWN])}{more}")


def name_of(plugin: object) -> str:
    """The name under which a plug-in object was chosen."""
    module = type(plugin).__module__
    return next(
        (n for n, place in places(folder_of(type(plugin))).items() if place == module), module.rpartition(".")[2]
    )


def folder_of(kind: type) -> str:
    """The folder that implementations of an interface live in; empty if it is not an interface."""
    return next((vars(base)["FOLDER"] for base in kind.__mro__ if "FOLDER" in vars(base)), "")


def summary(folder: str, name: str) -> str:
    """The first line of a plug-in's docstring, read without importing it."""
    spec = find_spec(places(folder)[name])
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) if spec and spec.origin else None
    return (doc or "").partition("\n")[0]
