"""What every test stands on."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

# Tests side by side share the cores; before torch is loaded, and for every program that they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from edgekd import _environment

_environment.prepare()  # before any runtime: it switches off what they would send

# A shell that starts the tests in its background has them ignore Ctrl-C, and every program that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SIGTERM_AT_START = signal.getsignal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A command that ended ignores SIGTERM; programs that are started after it, from here, would inherit it."""
    signal.signal(signal.SIGTERM, SIGTERM_AT_START)
    yield
    signal.signal(signal.SIGTERM, SIGTERM_AT_START)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: side by side, none of them is left to the end, with the other cores idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.scheduling import FileScheduling

    return FileScheduling(config, log) if config.getvalue("dist") == "loadfile" else None
