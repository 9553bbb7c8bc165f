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
    *("matplotlib", "safetensors", "ruamel.yaml", "scipy", "scikit-learn", "pillow", "typing-extensions"),
)
DISK_GIB = 2.0  # a build of 50,000 small images stays below
DEFAULT = "cpu"  # the target of a build that names none
ELSEWHERE = "its bundle is made here all the same; measure it over SSH (--device), or by hand (edgekd import-result)"


@dataclass(frozen=True)
class Check:
    what: str
    fine: bool
    detail: str
    fix: str = ""
    needed: bool = True  # by a build that names no target

    @property
    def word(self) -> str:
        return "ok" if self.fine else "MISSING" if self.needed else "not here"


def int8_speed(present: tuple[str, ...]) -> str:
    """Return what to expect of INT8 on a processor with these flags."""
    if {"avx512_vnni", "avx_vnni", "asimddp"} & set(present):
        return "dot products in hardware"
    return "no dot products in hardware: expect little speed-up; weights are kept to 7 bits on x86"


def check_machine(folder: Path) -> list[Check]:
    """Check everything that a build in `folder` depends on."""
    checks = [Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")]
    for name in NEEDED:
        try:
            checks.append(Check(name, True, version(name)))
        except PackageNotFoundError:
            checks.append(Check(name, False, "not installed", "pip install edgekd installs it"))
    cores = len(os.sched_getaffinity(0))
    checks.append(Check("processor", True, f"{cores} cores, {' '.join(flags()) or 'flags unknown'}"))
    checks.append(Check("int8", True, int8_speed(flags())))  # slow is not missing: all of edgekd works
    free = shutil.disk_usage(folder).free / 2**30
    checks.append(
        Check("disk", free > DISK_GIB, f"{free:.1f} GiB free in {folder}", "free some, or use --out elsewhere")
    )
    checks.append(check_ssh())
    checks += [check_target(name, plugins.load("targets", name)()) for name in plugins.names("targets")]
    return checks


def check_ssh() -> Check:
    """Check for OpenSSH, which devices need."""
    need = "for build --device"
    if not shutil.which("ssh"):
        return Check("ssh", False, f"not installed; {need}", "sudo apt install openssh-client", needed=False)
    stderr = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    return Check("ssh", True, f"{stderr.partition(',')[0].strip()}, {need}", needed=False)


def check_target(name: str, target: Target) -> Check:
    """Check what a target needs."""
    what, reason = f"target {name}", target.unavailable_reason()
    if target.deployment_plan.jetpack:  # no machine but the board serves it, and nothing is missing here
        return Check(what, True, f"{reason}: {ELSEWHERE}", needed=False)
    if not reason:
        return Check(what, True, "can be measured here", needed=name == DEFAULT)
    return Check(what, False, reason, f"install what is missing; or {ELSEWHERE}", needed=name == DEFAULT)


def format_checks(checks: list[Check]) -> str:
    """Return a line for every check, then how to get what is missing."""
    lines = [f"{f.word:<8} {f.what:<16} {f.detail}" for f in checks]
    return "\n".join([*lines, *(f"hint: {f.what}: {f.fix}" for f in checks if not f.fine)])
