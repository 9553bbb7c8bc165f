"""What this machine's processor can do."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

TELLING = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
X86 = ("x86_64", "AMD64")  # as `uname -m` names it
VNNI = {"avx512_vnni", "avx_vnni"}  # flags of x86 processors that add INT8 products up in 32 bits


def saturates(machine: str, known: tuple[str, ...] | None) -> bool:
    """Whether sums of uint8 times full-range int8 may saturate: on x86 without VNNI, or that does not tell."""
    return machine in X86 and not VNNI & set(known or ())


@cache
def name() -> str:
    """What the processor calls itself; the architecture where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, platform.machine())


@cache
def flags() -> tuple[str, ...]:
    """Those of the processor's flags that decide INT8 and bf16 speed; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    found = next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    return tuple(flag for flag in TELLING if flag in found)
