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
from edgekd.stages.device.job_log import Seen, Shown
from edgekd.stages.device.results import Returned, taken
from edgekd.utils import cpu

HERE = "this machine"


def look(bundle: Bundle) -> dict[str, Any]:
    """What a measurement of `bundle` here depends on: versions, GPU, driver, processor.

    The runtime is asked in a process of its own. Raises EdgekdError with what is missing.
    """
    with TemporaryDirectory() as out:
        run(bundle, Path(out), ("doctor",))
        found = json.loads((Path(out) / "doctor.json").read_text())
    return {"versions": found["versions"], "device": found["device"], "processor": cpu.name()}


def measure(out: Path, bundle: Bundle) -> Returned:
    """Build, verify and time what is in `bundle`, with live progress; engines and results are in `out`.

    If it was interrupted, it goes on from what is there. Raises EdgekdError with the words of the runner.
    """
    run(bundle, out, COMMANDS)
    return taken(out, bundle)


def run(bundle: Bundle, out: Path, commands: tuple[str, ...]) -> None:
    """Commands of the runner, one after the other, until one does not end well: then raises EdgekdError."""
    seen = Seen()
    with ExitStack() as stack:
        show = Shown(HERE, stack)
        for command in commands:
            seen.code = spoken(bundle, out, command, lambda line: show(seen.take(line)))
            if seen.code:
                break
    if seen.code:
        raise seen.failure(HERE)


def spoken(bundle: Bundle, out: Path, command: str, hear: Callable[[str], None]) -> int:
    """The exit code of one command, as a shell tells it; `hear` is called with every line that it says."""
    folder = bundle.folder.resolve()
    words = [sys.executable, str(folder / "edgekd_runner.py"), command, "--bundle", str(folder), "--out", str(out)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            for line in child.stdout or ():
                hear(line)
        except BaseException:
            child.terminate()  # it ends its own children, and keeps what is finished
            raise
        code = child.wait()
    return code if code >= 0 else 128 - code
