"""The messages of a job on a bundle while it runs, here or on a device: its progress, its warnings, why it failed."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from edgekd.errors import EdgekdError
from edgekd.utils.progress import Advance, progress_bar

log = logging.getLogger(__name__)
HINT_RESUME = "type the same command again: it finds a job that still runs, and continues from what is finished"
LAST_LINES = 5  # of a job that ended without an explanation


def parse_message(line: bytes) -> dict[str, Any]:
    """Return the message in a line of the runner or the agent; {} if a shell or a runtime printed the line."""
    try:
        message = json.loads(line) if line.startswith(b"{") else {}
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


@dataclass
class JobLog:
    """The log of a job up to now."""

    offset: int = 0  # bytes that were read
    errors: dict[str, str] = field(default_factory=dict)  # error -> hint
    last: list[str] = field(default_factory=list)  # lines that are no messages
    code: int | None = None  # the exit code, as a shell has it; None: it left none

    def add_line(self, line: str) -> dict[str, Any]:
        """Return the message in the line; keep errors and other output, log warnings."""
        message = parse_message(line.encode())
        if "error" in message:
            self.errors[message["error"]] = message["hint"]
        elif "warning" in message:
            log.warning("warning: %s", message["warning"] + (f" ({message['hint']})" if message.get("hint") else ""))
        elif not message and line.strip():
            self.last = [*self.last, line.rstrip()][-LAST_LINES:]
        return message

    def error(self, machine: str, log_file: str = "") -> EdgekdError:
        """Return the error of a job that failed on `machine`; `log_file` is where its whole log is."""
        if self.errors and (self.code or 0) < 128:
            hints = "; ".join(dict.fromkeys(filter(None, self.errors.values())))
            return EdgekdError(
                f"{machine}: {'; '.join(self.errors)}", hint=f"on {machine}: {hints}. Then {HINT_RESUME}"
            )
        if self.code is None:
            return EdgekdError(
                f"{machine}: the job is gone; the device was switched off, or ended it", hint=HINT_RESUME
            )
        end = f"was ended by signal {self.code - 128}" if self.code > 128 else f"ended with exit code {self.code}"
        last = f"; its last lines: {' / '.join(self.last)}" if self.last else ""
        where = f". Its log is {log_file}" if log_file else ""
        return EdgekdError(f"{machine}: the job {end}{last}", hint=HINT_RESUME + where)


class ProgressBars:
    """A progress bar for each part of a job that counts on its own."""

    def __init__(self, label: str, stack: ExitStack) -> None:
        self.label, self.stack = label, stack
        self.total, self.done = 0, 0
        self.advance: Advance | None = None

    def __call__(self, message: dict[str, Any]) -> None:
        if "progress" not in message:
            return
        if self.advance is None or message["of"] != self.total or message["progress"] < self.done:
            self.stack.close()
            self.total, self.done = message["of"], 0
            self.advance = self.stack.enter_context(progress_bar(self.label, self.total))
        self.advance(message["progress"] - self.done, note=message.get("note", ""))
        self.done = message["progress"]
