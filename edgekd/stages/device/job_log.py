"""What a job on a bundle says while it runs, here or on a device: its progress shown, and its end in words."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from edgekd.errors import EdgekdError
from edgekd.utils.progress import Advance, bar

log = logging.getLogger(__name__)
AGAIN = "type the same command again: it picks up what runs, and goes on from what is finished"
LAST_WORDS = 5  # lines of a job that died without an explanation


def heard(line: bytes) -> dict[str, Any]:
    """What a line of a program of ours tells; nothing, where a shell or a runtime speaks."""
    try:
        found = json.loads(line) if line.startswith(b"{") else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class Seen:
    """What a job said so far."""

    offset: int = 0  # bytes of its log
    errors: dict[str, str] = field(default_factory=dict)  # with what helps
    last: list[str] = field(default_factory=list)  # lines that are no progress
    code: int | None = None  # its exit code, as a shell tells it; None: its end left none

    def take(self, line: str) -> dict[str, Any]:
        told = heard(line.encode())
        if "error" in told:
            self.errors[told["error"]] = told["hint"]
        elif "warning" in told:
            log.warning("warning: %s", told["warning"] + (f" ({told['hint']})" if told.get("hint") else ""))
        elif not told and line.strip():
            self.last = [*self.last, line.rstrip()][-LAST_WORDS:]
        return told

    def failure(self, place: str, its_log: str = "") -> EdgekdError:
        """What its end means; `place` is where it ran, `its_log` where all its words are."""
        if self.errors and (self.code or 0) < 128:
            hints = "; ".join(dict.fromkeys(filter(None, self.errors.values())))
            return EdgekdError(f"{place}: {'; '.join(self.errors)}", hint=f"on {place}: {hints}. Then {AGAIN}")
        if self.code is None:
            return EdgekdError(f"{place}: the job is gone; the device was switched off, or ended it", hint=AGAIN)
        end = f"was ended by signal {self.code - 128}" if self.code > 128 else f"ended with exit code {self.code}"
        words = f"; its last words: {' / '.join(self.last)}" if self.last else ""
        more = f". Its log is {its_log}" if its_log else ""
        return EdgekdError(f"{place}: the job {end}{words}", hint=AGAIN + more)


class Shown:
    """A bar for every part of a job that counts on its own."""

    def __init__(self, label: str, stack: ExitStack) -> None:
        self.label, self.stack = label, stack
        self.total, self.done = 0, 0
        self.advance: Advance | None = None

    def __call__(self, told: dict[str, Any]) -> None:
        if "progress" not in told:
            return
        if self.advance is None or told["of"] != self.total or told["progress"] < self.done:
            self.stack.close()
            self.total, self.done = told["of"], 0
            self.advance = self.stack.enter_context(bar(self.label, self.total))
        self.advance(told["progress"] - self.done, note=told.get("note", ""))
        self.done = told["progress"]
