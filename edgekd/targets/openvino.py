"""openvino: OpenVINO on this processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from edgekd.core.artifact import ComputePrecision
from edgekd.core.quant_scheme import QUANT_SCHEMES, QuantScheme
from edgekd.core.target import DeploymentPlan, Target
from edgekd.errors import ConfigError
from edgekd.utils.cpu import flags, saturates


@dataclass(frozen=True)
class OpenVino(Target):
    hint: Literal["latency", "throughput"] = (
        "latency"  # throughput: several streams; a call is timed alone all the same
    )
    vnni: bool | None = None  # whether an x86 processor has VNNI; null: as this machine's

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", hint="use 1 or more; 1 is the steadiest")

    @property
    def scheme(self) -> QuantScheme:
        """Weights have 7 bits where products of 8 bits saturate, as NNCF's overflow fix has it."""
        return replace(QUANT_SCHEMES["openvino"], reduce_range=not self.exact)

    @property
    def exact(self) -> bool:
        """Whether products of 8-bit weights do not saturate."""
        return not saturates(platform.machine(), flags()) if self.vnni is None else self.vnni

    def on(self, machine: str, flags: tuple[str, ...] | None) -> OpenVino:
        exact = not saturates(machine, flags)
        return self if self.vnni is not None or exact == self.exact else replace(self, vnni=exact)

    @property
    def deployment_plan(self) -> DeploymentPlan:
        reason = "the processor has no VNNI, or does not report it: INT8 weights have 7 bits, which saturate on none"
        return DeploymentPlan() if self.exact else DeploymentPlan(instead=(reason,))

    @property
    def compute_precisions(self) -> tuple[ComputePrecision, ...]:
        """On processors with bf16 the default is bf16, which is faster and less exact: both are measured."""
        return ("fp32", "native")

    @property
    def options(self) -> dict[str, str]:
        return {"hint": self.hint}

    @property
    def label(self) -> str:
        return f"{self.threads}t-{self.hint}"

    def unavailable_reason(self) -> str:
        return "" if find_spec("openvino") else "openvino is not installed (pip install 'edgekd[openvino]')"

    @property
    def runtime(self) -> str:
        return "openvino"


PLUGIN = OpenVino
