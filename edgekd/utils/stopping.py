"""SIGTERM ends a process even where its main thread never comes back from C code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 3.0
EXIT = 128 + signal.SIGTERM


@contextmanager
def stoppable(handler: Callable[[int, FrameType | None], object], last_words: str = "") -> Iterator[None]:
    """At SIGTERM `handler` is called; if the main thread does not get to it, the process ends with `last_words`.

    Python runs handlers between two steps of the main thread, so a call that hangs in a library ignores the signal. The
    C part of the handler writes to the wakeup descriptor at once, and another thread reads it.
    """
    handled = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as Python asks for

    def handle(number: int, frame: FrameType | None) -> None:
        handled.set()
        handler(number, frame)

    def watch() -> None:
        with os.fdopen(reading, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGTERM and not handled.wait(PATIENCE_S):
                    sys.stderr.write(last_words)
                    sys.stderr.flush()
                    os._exit(EXIT)

    signal.signal(signal.SIGTERM, handle)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # ends the thread
