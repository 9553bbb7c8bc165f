"""cpu: ONNX Runtime on a processor, this one or another."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from edgekd.core.quant_scheme import QUANT_SCHEMES, QuantScheme
from edgekd.core.target import DeploymentPlan, Target
from edgekd.errors import ConfigError
from edgekd.utils.cpu import VNNI, X86, flags, saturates

Architecture = Literal["x86", "arm"]
NO_VNNI = "the processor has no VNNI, or does not report it: INT8 weights have 7 bits, which saturate on none"


@dataclass(frozen=True)
class Cpu(Target):
    arch: Literal["auto", "x86", "arm"] = "auto"  # of the processor; auto: this machine's
    vnni: bool | None = None  # whether an x86 processor has VNNI; null: as this machine's where it is of that kind

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", hint="use 1 or more; 1 is the steadiest")

    @property
    def scheme(self) -> QuantScheme:
        """Unsigned activations on x86, where only they are fast; 7-bit weights where 8-bit products saturate."""
        if self.resolved_arch == "arm":
            return QUANT_SCHEMES["ort-arm"]
        return replace(QUANT_SCHEMES["ort-x86"], reduce_range=not self.has_vnni)

    @property
    def deployment_plan(self) -> DeploymentPlan:
        if self.resolved_arch == "arm" or self.has_vnni:
            return DeploymentPlan()
        return DeploymentPlan(instead=(NO_VNNI,))

    @property
    def resolved_arch(self) -> Architecture:
        return this_arch() if self.arch == "auto" else self.arch

    @property
    def has_vnni(self) -> bool:
        """Whether an x86 processor has VNNI; one that is not known counts as without."""
        detected = self.resolved_arch == this_arch() and bool(VNNI & set(flags()))
        return detected if self.vnni is None else self.vnni

    def on(self, machine: str, flags: tuple[str, ...] | None) -> Cpu:
        arch = arch_of(machine)
        detected = None if arch == "arm" else not saturates(machine, flags)
        target = replace(self, arch=arch, vnni=detected if self.vnni is None else self.vnni)
        return self if (target.resolved_arch, target.scheme) == (self.resolved_arch, self.scheme) else target

    def unavailable_reason(self) -> str:
        if self.arch not in ("auto", this_arch()):
            return f"this machine's processor is {platform.machine()}, not {self.arch}"
        if self.vnni and this_arch() == "x86" and not VNNI & set(flags()):
            return "this machine's processor has no VNNI"
        return "" if find_spec("onnxruntime") else "onnxruntime is not installed"

    @property
    def runtime(self) -> str:
        return "onnxruntime"

    @property
    def label(self) -> str:
        return super().label if self.arch == "auto" else f"{self.arch}-{super().label}"


def this_arch() -> Architecture:
    """Return the architecture of this machine."""
    return arch_of(platform.machine())


def arch_of(machine: str) -> Architecture:
    """Return the architecture that `uname -m` names."""
    return "x86" if machine in X86 else "arm"


PLUGIN = Cpu
