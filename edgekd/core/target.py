"""The interface of a target: the INT8 scheme of a device family, and what the runner needs to serve it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from edgekd.core.artifact import ComputePrecision
from edgekd.core.quant_scheme import QuantScheme
from edgekd.core.settings import Plugin

if TYPE_CHECKING:
    from torch import nn

    from edgekd.core.quant_spec import QuantSpec


Engine = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class DeploymentPlan:
    """What is sent to a device of a target, and what the device builds from it."""

    engines: tuple[Engine, ...] = ("fp32", "int8")  # of a student, in the order of a comparison
    opset: int | None = None  # the highest that its runtime reads; None: as high as this machine's
    typed: bool = False  # precisions are in the files, FP16 too (TensorRT: strongly typed networks)
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
    budget_ms: float | None = None  # of the median latency: the most accurate student within it is selected

    @property
    @abstractmethod
    def scheme(self) -> QuantScheme:
        """The INT8 scheme that the runtime executes fast."""

    @abstractmethod
    def unavailable_reason(self) -> str:
        """Return why this machine cannot serve the target; empty if it can. Never raises."""

    @property
    @abstractmethod
    def runtime(self) -> str:
        """The runner's name of the runtime: `onnxruntime`."""

    def on(self, machine: str, flags: tuple[str, ...] | None) -> Target:
        """Return the target for a device of that architecture, as `uname -m` names it, and with those processor flags.

        `flags` are of those in `cpu.TELLING`; None where the device does not report them.
        """
        return self

    @property
    def compute_precisions(self) -> tuple[ComputePrecision, ...]:
        """The precisions of float operations: float files are measured in each of them, INT8 files in the first."""
        return ("fp32",)

    @property
    def options(self) -> dict[str, str]:
        """The options of a job of the runner, beside the runtime and its threads."""
        return {}

    @property
    def label(self) -> str:
        """The suffix that distinguishes targets of one kind."""
        return f"{self.threads}t"

    @property
    def deployment_plan(self) -> DeploymentPlan:
        """The plan for a bundle."""
        return DeploymentPlan()


class TargetProbe(Protocol):
    """Measures a network on a target, for methods that need it: its latency, and what its INT8 file quantizes."""

    def can_measure(self) -> bool:
        """Whether latencies can be measured here."""

    def latency_ms(self, out: Path, network: nn.Module) -> float:
        """Return the median latency of one image, ms; `out` is a folder to work in."""

    def has_int8(self) -> bool:
        """Whether the target runs INT8 files."""

    def quant_spec(self, out: Path, network: nn.Module) -> QuantSpec:
        """Return what the INT8 file of a network quantizes; `out` is a folder to work in. Needs no device."""
