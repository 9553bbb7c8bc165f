"""cpu: ONNX Runtime on a processor, this one or another."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from edgekd.core.dialects import DIALECTS
from edgekd.core.errors import ConfigError
from edgekd.core.processor import flags
from edgekd.core.target import Dialect, Target

Architecture = Literal["x86", "arm"]


@dataclass(frozen=True)
class Cpu(Target):
    arch: Literal["auto", "x86", "arm"] = "auto"  # of the processor; auto: this machine's

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", hint="use 1 or more; 1 is the steadiest")

    @property
    def dialect(self) -> Dialect:
        """x86 is fast with unsigned activations only; its chips without VNNI saturate on full 8-bit weights."""
        arch = here() if self.arch == "auto" else self.arch
        if arch == "arm":
            return DIALECTS["ort-arm"]
        # of another machine's chip nothing is known: the reduced range is right on all
        vnni = arch == here() and {"avx512_vnni", "avx_vnni"} & set(flags())
        return replace(DIALECTS["ort-x86"], reduce_range=not vnni)

    def on(self, machine: str) -> Cpu:
        arch, known = arch_of(machine), here() if self.arch == "auto" else self.arch
        return self if arch == known else replace(self, arch=arch)

    def missing(self) -> str:
        if self.arch not in ("auto", here()):
            return f"this machine's processor is {platform.machine()}, not {self.arch}"
        return "" if find_spec("onnxruntime") else "onnxruntime is not installed"

    @property
    def runtime(self) -> str:
        return "onnxruntime"

    @property
    def trait(self) -> str:
        return super().trait if self.arch == "auto" else f"{self.arch}-{super().trait}"


def here() -> Architecture:
    return arch_of(platform.machine())


def arch_of(machine: str) -> Architecture:
    return "x86" if machine in ("x86_64", "AMD64") else "arm"


PLUGIN = Cpu
