"""What a target is: the INT8 dialect of a device family, and what the runner needs to serve it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from edgekd.core.artifact import Floats
from edgekd.core.quant_scheme import Dialect
from edgekd.core.settings import Plugin

if TYPE_CHECKING:
    from torch import nn

    from edgekd.core.quant_spec import Blueprint


Engine = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Delivery:
    """What a device of a target is sent, and what it builds from it."""

    engines: tuple[Engine, ...] = ("fp32", "int8")  # of a student, in the order of a comparison
    opset: int | None = None  # the highest that its runtime reads; None: as high as this machine's
    typed: bool = False  # precisions stand in the files, FP16 too (TensorRT: strongly typed networks)
    dla: int | None = None  # the DLA core that engines run on
    jetpack: str | None = None
    board: str | None = None
    tensorrt: str | None = None
    why: tuple[str, ...] = ()  # reasons of this plan, in sentences without a full stop
    instead: tuple[str, ...] = ()  # what is done where something cannot be had


@dataclass(frozen=True)
class Target(Plugin, ABC):
    """A device family, with the settings for it."""

    FOLDER: ClassVar[str] = "targets"

    threads: int = 1  # of the runtime
    budget_ms: float | None = None  # of the median latency: of a family of students, the most accurate within it ships

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

    def on(self, machine: str, flags: tuple[str, ...] | None) -> Target:
        """The target for a device of that architecture, as `uname -m` names it, and with those processor flags.

        `flags` are of those in `processor.TELLING`; None where the device does not tell.
        """
        return self

    @property
    def floats(self) -> tuple[Floats, ...]:
        """What float operations are computed in: float files are measured in each of them, INT8 files in the first."""
        return ("fp32",)

    @property
    def options(self) -> dict[str, str]:
        """What a job of the runner says beside the runtime and its threads."""
        return {}

    @property
    def trait(self) -> str:
        """What tells it from another target of its kind."""
        return f"{self.threads}t"

    @property
    def delivery(self) -> Delivery:
        """What goes into a bundle for it."""
        return Delivery()


class Pricing(Protocol):
    """Says what a network is on a target, for methods that ask: what it costs, and what its INT8 file rounds."""

    def possible(self) -> bool:
        """Whether latencies can be measured here."""

    def price_ms(self, out: Path, network: nn.Module) -> float:
        """The median latency of one image, ms; `out` is a folder to work in."""

    def drafts(self) -> bool:
        """Whether the target runs INT8 files."""

    def blueprint(self, out: Path, network: nn.Module) -> Blueprint:
        """What its INT8 file rounds; `out` is a folder to work in. Needs no device."""
