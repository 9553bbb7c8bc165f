"""Progress with remaining time, on stderr: a bar in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]  # advance(steps=1, note="")
EVERY_S = 10.0  # between two plain lines


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Advance]:
    """`with bar("epochs", 40) as advance: ... advance(note="loss 0.31")`."""
    if not logging.getLogger("edgekd").isEnabledFor(logging.INFO):
        yield lambda steps=1, note="": None
    elif sys.stderr.isatty():
        yield from _rich(label, total)
    else:
        yield from _plain(label, total)


def _rich(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, note="")
        yield lambda steps=1, note="": progress.update(task, advance=steps, note=note)


def _plain(label: str, total: int) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last < EVERY_S and done < total:
            return
        last = now
        left = (now - started) / max(done, 1) * (total - done)
        print(f"{label}: {done}/{total}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
