"""cpu: ONNX Runtime on a processor, this one or another."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from edgekd.core.quant_scheme import DIALECTS, Dialect
from edgekd.core.target import Delivery, Target
from edgekd.errors import ConfigError
from edgekd.utils.cpu import VNNI, X86, flags, saturates

Architecture = Literal["x86", "arm"]


@dataclass(frozen=True)
class Cpu(Target):
    arch: Literal["auto", "x86", "arm"] = "auto"  # of the processor; auto: this machine's
    vnni: bool | None = None  # whether an x86 processor has VNNI; null: as this machine's where it is of that kind

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", hint="use 1 or more; 1 is the steadiest")

    @property
    def dialect(self) -> Dialect:
        """x86 is fast with unsigned activations only; its chips without VNNI saturate on full 8-bit weights."""
        if self.known_arch == "arm":
            return DIALECTS["ort-arm"]
        return replace(DIALECTS["ort-x86"], reduce_range=not self.has_vnni)

    @property
    def delivery(self) -> Delivery:
        if self.known_arch == "arm" or self.has_vnni:
            return Delivery()
        words = "the processor has no VNNI, or does not tell: INT8 weights have 7 bits, which saturate on none"
        return Delivery(instead=(words,))

    @property
    def known_arch(self) -> Architecture:
        return here() if self.arch == "auto" else self.arch

    @property
    def has_vnni(self) -> bool:
        """Of an x86 processor; one that is not known counts as without."""
        own = self.known_arch == here() and bool(VNNI & set(flags()))
        return own if self.vnni is None else self.vnni

    def on(self, machine: str, flags: tuple[str, ...] | None) -> Cpu:
        arch = arch_of(machine)
        told = None if arch == "arm" else not saturates(machine, flags)
        there = replace(self, arch=arch, vnni=told if self.vnni is None else self.vnni)
        return self if (there.known_arch, there.dialect) == (self.known_arch, self.dialect) else there

    def missing(self) -> str:
        if self.arch not in ("auto", here()):
            return f"this machine's processor is {platform.machine()}, not {self.arch}"
        if self.vnni and here() == "x86" and not VNNI & set(flags()):
            return "this machine's processor has no VNNI"
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
    return "x86" if machine in X86 else "arm"


PLUGIN = Cpu
