"""A network from the user's own code: `function: package.module:name`, called with `args`, returns an nn.Module."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.utils.external import external_code


@dataclass(frozen=True)
class Python(Model):
    function: str
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, name = self.function.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), name)):
            raise ConfigError(f"function is `{self.function}`", hint="write package.module:function")

    def build(self, classes: int, channels: int) -> nn.Module:
        """Return the network of the function, called with `args` only.

        Raises ConfigError if the function is not there, does not take `args`, or returns no module.
        """
        module, _, name = self.function.partition(":")
        self.spec()
        with importing(module):
            function = getattr(importlib.import_module(module), name, None)
        if not callable(function):
            raise ConfigError(f"`{module}` has no function `{name}`", hint="check the spelling")
        with external_code(
            f"`{self.function}` cannot be called with args {self.args}", f"it is {describe_call(function)}"
        ):
            network = function(**self.args)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"`{self.function}` returned {type(network).__name__}", hint="return a torch nn.Module")
        return network

    def fingerprint(self) -> str:
        """Of all Python files in the package of the function, or else of its file and those beside it.

        What they import from elsewhere is not followed.
        """
        spec, top = self.spec(), self.spec(self.function.partition(":")[0].partition(".")[0])
        module_file = Path(spec.origin or "")
        files = {module_file: module_file.name}  # with names that do not depend on the folder
        if top.submodule_search_locations is None:
            files |= {path: path.name for path in module_file.parent.glob("*.py")}
        for folder in top.submodule_search_locations or ():
            files |= {path: path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.py")}
        total = hashlib.sha256()
        for path, name in sorted(files.items(), key=lambda item: item[1]):
            total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return total.hexdigest()

    def spec(self, package: str = "") -> ModuleSpec:
        """Where the module of the function is, or the `package`, looked for in the current folder first.

        Raises ConfigError if there is none, or a package that it lies in cannot be imported.
        """
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        module = package or self.function.partition(":")[0]
        spec = None
        with importing(module):
            try:
                spec = find_spec(module)  # which imports the packages that it lies in
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
        if spec is None or not (package or spec.has_location):
            raise ConfigError(
                f"there is no Python module `{module}`",
                hint="run from the folder that holds it, or install its package",
            )
        return spec


def importing(module: str) -> AbstractContextManager[None]:
    return external_code(f"`{module}` cannot be imported", "fix it, or install what it imports")


def describe_call(function: Callable[..., Any]) -> str:
    """Return the signature of a function, for a message."""
    name = getattr(function, "__name__", "called")
    try:
        return f"{name}{signature(function)}"
    except (ValueError, TypeError):  # of a built-in
        return f"{name}(...)"


PLUGIN = Python
