"""Student and teacher families, one file each."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from edgekd.core import plugins

    return plugins.load_class("models", name)
