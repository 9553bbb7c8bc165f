"""openvino: OpenVINO on this processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from edgekd.core.artifact import Floats
from edgekd.core.quant_scheme import DIALECTS, Dialect
from edgekd.core.target import Delivery, Target
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
    def dialect(self) -> Dialect:
        """Weights have 7 bits where products of 8 bits saturate, as NNCF's overflow fix has it."""
        return replace(DIALECTS["openvino"], reduce_range=not self.exact)

    @property
    def exact(self) -> bool:
        """Whether products of 8-bit weights do not saturate."""
        return not saturates(platform.machine(), flags()) if self.vnni is None else self.vnni

    def on(self, machine: str, flags: tuple[str, ...] | None) -> OpenVino:
        told = not saturates(machine, flags)
        return self if self.vnni is not None or told == self.exact else replace(self, vnni=told)

    @property
    def delivery(self) -> Delivery:
        words = "the processor has no VNNI, or does not tell: INT8 weights have 7 bits, which saturate on none"
        return Delivery() if self.exact else Delivery(instead=(words,))

    @property
    def floats(self) -> tuple[Floats, ...]:
        """On processors with bf16 the default is bf16, which is faster and less exact: both are measured."""
        return ("fp32", "default")

    @property
    def options(self) -> dict[str, str]:
        return {"hint": self.hint}

    @property
    def trait(self) -> str:
        return f"{self.threads}t-{self.hint}"

    def missing(self) -> str:
        return "" if find_spec("openvino") else "openvino is not installed (pip install 'edgekd[openvino]')"

    @property
    def runtime(self) -> str:
        return "openvino"


PLUGIN = OpenVino
