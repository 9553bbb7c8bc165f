"""Stage: measure a bundle on this machine, for a runtime that builds its engines from one, as a device does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgekd.stages.device.bundle import Bundle
from edgekd.stages.device.bundle_readme import COMMANDS
from edgekd.stages.device.job_log import JobLog, ProgressBars
from edgekd.stages.device.results import DeviceResult, load_result
from edgekd.utils import cpu

HERE = "this machine"


def probe(bundle: Bundle) -> dict[str, Any]:
    """Return what a measurement of `bundle` here depends on: versions, GPU, driver, processor.

    The runtime is loaded in a process of its own. Raises EdgekdError with what is missing.
    """
    with TemporaryDirectory() as out:
        run_commands(bundle, Path(out), ("doctor",))
        report = json.loads((Path(out) / "doctor.json").read_text())
    return {"versions": report["versions"], "device": report["device"], "processor": cpu.name()}


def measure(out: Path, bundle: Bundle) -> DeviceResult:
    """Build, verify and time what is in `bundle`, with live progress; engines and results are in `out`.

    An interrupted measurement continues from what is there. Raises EdgekdError with the message of the runner.
    """
    run_commands(bundle, out, COMMANDS)
    return load_result(out, bundle)


def run_commands(bundle: Bundle, out: Path, commands: tuple[str, ...]) -> None:
    """Run commands of the runner, one after the other. Raises EdgekdError for the first one that fails."""
    job_log = JobLog()
    with ExitStack() as stack:
        show = ProgressBars(HERE, stack)
        for command in commands:
            job_log.code = run_command(bundle, out, command, lambda line: show(job_log.add_line(line)))
            if job_log.code:
                break
    if job_log.code:
        raise job_log.error(HERE)


def run_command(bundle: Bundle, out: Path, command: str, on_line: Callable[[str], None]) -> int:
    """Return the exit code of one command, as a shell has it; `on_line` gets every line of its output."""
    folder = bundle.folder.resolve()
    argv = [sys.executable, str(folder / "runner.pyz"), command, "--bundle", str(folder), "--out", str(out)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as child:
        try:
            for line in child.stdout or ():
                on_line(line)
        except BaseException:
            child.terminate()  # it ends its own children, and keeps what is finished
            raise
        code = child.wait()
    return code if code >= 0 else 128 - code
