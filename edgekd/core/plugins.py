"""Find a plug-in by name: the name of its file, or a key of the table PLUGINS of a module that defines several."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekd.core.renamed import new_name
from edgekd.errors import ConfigError
from edgekd.utils.external import external_code

FOLDERS = ("methods", "models", "data", "tasks", "targets", "metrics")
MAX_SHOWN = 20  # names that an error lists: a network has hundreds of layers


@cache
def modules(folder: str) -> dict[str, str]:
    """Return the module of every plug-in of a folder by its name, without importing any.

    Packages outside of edgekd add theirs with entry points in the group `edgekd.<folder>`, each naming a module.
    """
    package = importlib.import_module(f"edgekd.{folder}")
    files = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"]
    built_in = {name: f"edgekd.{folder}.{m}" for m in files for name in table_keys(f"edgekd.{folder}.{m}") or [m]}
    if folder == "metrics":  # each task has its own
        built_in |= {name: m for m in modules("tasks").values() for name in table_keys(m, "METRICS")}
    return {e.name: e.value for e in entry_points(group=f"edgekd.{folder}")} | built_in


def table_keys(module: str, table: str = "PLUGINS") -> list[str]:
    """Return the keys of a table in a module, without importing it; none if it defines one plug-in, PLUGIN."""
    tables = [node.value for node in syntax_tree(module).body if isinstance(node, ast.Assign) and assigns(node, table)]
    return [str(ast.literal_eval(key)) for table in tables if isinstance(table, ast.Dict) for key in table.keys if key]


def assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def syntax_tree(module: str) -> ast.Module:
    spec = find_spec(module)
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else "")


def names(folder: str) -> list[str]:
    return sorted(modules(folder))


def load(folder: str, name: str) -> Any:
    """Return PLUGIN of the module `edgekd/<folder>/<name>.py`, or PLUGINS[name] of one.

    Raises:
        ConfigError: if there is none, or its module, which may be that of another package, cannot be imported.
    """
    if name not in modules(folder):
        raise unknown_name(f"there is no `{name}` in edgekd/{folder}/", name, names(folder))
    module = modules(folder)[name]
    if module.startswith("edgekd."):
        return plugin_of(folder, name, importlib.import_module(module))
    with external_code(f"the plug-in `{name}` of `{module}` cannot be loaded", "fix its package, or remove it"):
        return plugin_of(folder, name, importlib.import_module(module))


def plugin_of(folder: str, name: str, module: ModuleType) -> Any:
    if folder == "metrics" and hasattr(module, "METRICS"):
        return module.METRICS[name]
    return module.PLUGINS[name] if hasattr(module, "PLUGINS") else module.PLUGIN


def unknown_name(what: str, name: str, names: Sequence[str]) -> ConfigError:
    """Return an error for a name that is not among `names`; its hint is the new name of a former one, or a near one."""
    near = [f"`{one}`" for one in difflib.get_close_matches(name, names)]
    guess = f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}? " if near else ""
    if new := new_name(name, names):
        guess = f"it is called `{new}` now; "
    more = f", and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ConfigError(what, hint=f"{guess}known: {', '.join(names[:MAX_SHOWN])}{more}")


def name_of(plugin: object) -> str:
    """Return the name under which a plug-in object was chosen."""
    module = type(plugin).__module__
    return next(
        (n for n, place in modules(folder_of(type(plugin))).items() if place == module), module.rpartition(".")[2]
    )


def folder_of(kind: type) -> str:
    """Return the folder that implementations of an interface are in; empty if it is not an interface."""
    return next((vars(base)["FOLDER"] for base in kind.__mro__ if "FOLDER" in vars(base)), "")


def summary(folder: str, name: str) -> str:
    """One line of what a plug-in is: the first of its module's docstring, read without importing it.

    Metrics share modules: each says it itself.
    """
    if folder == "metrics":
        return f"{name}: {load(folder, name).summary}"
    return (ast.get_docstring(syntax_tree(modules(folder)[name])) or "").partition("\n")[0]


def load_class(folder: str, name: str) -> Any:
    """Return the plug-in of a folder whose class has that name. Raise AttributeError if there is none."""
    for plugin, module in modules(folder).items() if name[:1].isupper() else ():
        for node in syntax_tree(module).body:
            if isinstance(node, ast.Assign) and assigns(node, "PLUGIN") and ast.unparse(node.value) == name:
                return load(folder, plugin)
    raise AttributeError(f"module 'edgekd.{folder}' has no attribute '{name}'")
