"""openvino: OpenVINO on this processor."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from edgekd.core.artifact import Floats
from edgekd.core.dialects import DIALECTS
from edgekd.core.errors import ConfigError
from edgekd.core.target import Dialect, Target


@dataclass(frozen=True)
class OpenVino(Target):
    hint: Literal["latency", "throughput"] = (
        "latency"  # throughput: several streams; a call is timed alone all the same
    )

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", hint="use 1 or more; 1 is the steadiest")

    @property
    def dialect(self) -> Dialect:
        return DIALECTS["openvino"]

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
