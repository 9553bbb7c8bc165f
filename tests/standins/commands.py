"""Commands of edgekd, run in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from edgekd.cli import main


def command(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """The exit code of a command, run in this process, and what it said on stderr."""
    before = sys.argv
    sys.argv = ["edgekd", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
    finally:
        sys.argv = before
    return ended.value.code, capsys.readouterr().err
