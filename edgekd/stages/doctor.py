"""Doctor: what this machine has for edgekd, what is missing, and how to get it. Works without torch."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgekd.core import plugins
from edgekd.core.processor import flags

NEEDED = (
    *("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pydantic", "typer", "rich", "jinja2"),
    *("matplotlib", "safetensors", "pyyaml", "scikit-learn", "pillow"),
)
DISK_GIB = 2.0  # a build of 50,000 small images stays below


@dataclass(frozen=True)
class Finding:
    what: str
    fine: bool
    detail: str
    fix: str = ""


def int8_speed(present: tuple[str, ...]) -> str:
    """What to expect of INT8 on a processor with these flags."""
    if {"avx512_vnni", "avx_vnni", "asimddp"} & set(present):
        return "dot products in hardware"
    return "no dot products in hardware: expect little speed-up; weights are kept to 7 bits on x86"


def examine(place: Path) -> list[Finding]:
    """Everything that a build in `place` depends on."""
    found = [Finding("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")]
    for name in NEEDED:
        try:
            found.append(Finding(name, True, version(name)))
        except PackageNotFoundError:
            found.append(Finding(name, False, "not installed", "pip install edgekd installs it"))
    cores = len(os.sched_getaffinity(0))
    found.append(Finding("processor", True, f"{cores} cores, {' '.join(flags()) or 'flags unknown'}"))
    found.append(Finding("int8", True, int8_speed(flags())))  # slow is not missing: all of edgekd works
    free = shutil.disk_usage(place).free / 2**30
    found.append(
        Finding("disk", free > DISK_GIB, f"{free:.1f} GiB free in {place}", "free some, or use --out elsewhere")
    )
    for name in plugins.names("targets"):
        reason = plugins.load("targets", name)().missing()
        found.append(
            Finding(f"target {name}", not reason, reason or "can be measured here", "a build leaves it unmeasured")
        )
    return found
