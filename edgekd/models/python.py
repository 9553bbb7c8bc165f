"""A network from the user's own code: `function: package.module:name`, called with `args`, returns an nn.Module."""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from edgekd.core.errors import ConfigError
from edgekd.core.model import Model


@dataclass(frozen=True)
class Python(Model):
    function: str
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.function.count(":") != 1:
            raise ConfigError(f"function is `{self.function}`", hint="write package.module:function")

    def build(self, classes: int, channels: int) -> nn.Module:
        """Raises ConfigError if the function is not there or returns no module. It is asked for nothing but `args`."""
        module, _, name = self.function.partition(":")
        self.origin()
        made = getattr(importlib.import_module(module), name, None)
        if not callable(made):
            raise ConfigError(f"`{module}` has no function `{name}`", hint="check the spelling")
        network = made(**self.args)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"`{self.function}` returned {type(network).__name__}", hint="return a torch nn.Module")
        return network

    def fingerprint(self) -> str:
        """Of the file that holds the function; what that imports is not followed."""
        return hashlib.sha256(self.origin().read_bytes()).hexdigest()

    def origin(self) -> Path:
        """The file of the module, looked for in the current folder first."""
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        module = self.function.partition(":")[0]
        try:
            spec = find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"there is no Python module `{module}`",
                hint="run from the folder that holds it, or install its package",
            )
        return Path(spec.origin)


PLUGIN = Python
