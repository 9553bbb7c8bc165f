"""What a target is: the INT8 dialect of a device family, and what the runner needs to serve it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgekd.core.settings import Plugin


@dataclass(frozen=True)
class Dialect:
    """The INT8 that a runtime executes fast. Weights are always signed and symmetric."""

    activation: Literal["int8", "uint8"]
    symmetric_activation: bool
    per_channel: bool = True
    reduce_range: bool = False  # 7-bit weights, for processors whose INT8 products saturate


@dataclass(frozen=True)
class Target(Plugin, ABC):
    """A device family, with the settings for it."""

    FOLDER: ClassVar[str] = "targets"

    threads: int = 1  # of the runtime

    @property
    @abstractmethod
    def dialect(self) -> Dialect: ...

    @abstractmethod
    def missing(self) -> str:
        """Why this machine cannot serve the target; empty when it can. Never raises."""

    @property
    @abstractmethod
    def runtime(self) -> str:
        """The runner's name of the runtime: `onnxruntime`."""
