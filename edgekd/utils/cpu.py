"""The processor of this machine."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

RELEVANT_FLAGS = (
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


def saturates(machine: str, flags: tuple[str, ...] | None) -> bool:
    """Return whether sums of uint8 times full-range int8 may saturate: on x86 without VNNI, or with unknown flags."""
    return machine in X86 and not VNNI & set(flags or ())


@cache
def name() -> str:
    """Return the processor's name, or its architecture where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.machine())


@cache
def flags() -> tuple[str, ...]:
    """Return the processor's flags that matter for INT8 and bf16; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    present = next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    return tuple(flag for flag in RELEVANT_FLAGS if flag in present)
