"""Doctor: what this machine has for edgekd, what is missing, and how to get it. Works without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgekd.core import plugins
from edgekd.core.target import Target
from edgekd.utils.cpu import flags

NEEDED = (
    *("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pydantic", "typer", "rich", "jinja2"),
    *("matplotlib", "safetensors", "pyyaml", "scikit-learn", "pillow", "typing-extensions"),
)
DISK_GIB = 2.0  # a build of 50,000 small images stays below
DEFAULT = "cpu"  # the target of a build that names none
ELSEWHERE = "its bundle is made here all the same; measure it over SSH (--device), or by hand (edgekd import-result)"


@dataclass(frozen=True)
class Finding:
    what: str
    fine: bool
    detail: str
    fix: str = ""
    needed: bool = True  # by a build that names no target

    @property
    def word(self) -> str:
        return "ok" if self.fine else "MISSING" if self.needed else "not here"


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
    found.append(ssh())
    found += [served(name, plugins.load("targets", name)()) for name in plugins.names("targets")]
    return found


def ssh() -> Finding:
    """OpenSSH, for devices."""
    need = "for build --device"
    if not shutil.which("ssh"):
        return Finding("ssh", False, f"not installed; {need}", "sudo apt install openssh-client", needed=False)
    said = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    return Finding("ssh", True, f"{said.partition(',')[0].strip()}, {need}", needed=False)


def served(name: str, target: Target) -> Finding:
    """What a target needs, and whether this machine has it."""
    what, reason = f"target {name}", target.missing()
    if target.delivery.jetpack:  # no machine but the board serves it, and nothing is missing here
        return Finding(what, True, f"{reason}: {ELSEWHERE}", needed=False)
    if not reason:
        return Finding(what, True, "can be measured here", needed=name == DEFAULT)
    return Finding(what, False, reason, f"install what is missing; or {ELSEWHERE}", needed=name == DEFAULT)


def text(found: list[Finding]) -> str:
    """For a terminal: a line for everything, then how to get what is not here."""
    lines = [f"{f.word:<8} {f.what:<16} {f.detail}" for f in found]
    return "\n".join([*lines, *(f"hint: {f.what}: {f.fix}" for f in found if not f.fine)])
