"""How a command talks: its options, data on stdout, words on stderr, what went wrong as a sentence and an exit code."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgekd.core.errors import EdgekdError, os_failure
from edgekd.core.stopping import stoppable
from edgekd.core.text import visible

# what several commands ask for
Recipe = Annotated[str, typer.Argument(help="A recipe (`edgekd list recipes`) or a YAML file.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="Device family; repeat for several.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override one value: student.epochs=5.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where results go.")]
Jetpack = Annotated[str | None, typer.Option(help="Of the device: 4.6, 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink everything to seconds; the numbers mean nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]

SOON_S = 0.05
STOPPED = (130, 143)  # exit codes after Ctrl-C and SIGTERM
AGAIN = "the same command again goes on where this one stopped"
TERMINATED = f"stopped by SIGTERM\n\nhint: {AGAIN}"


class Visible(logging.Formatter):
    """A message, with control characters spelled out."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(text: str) -> None:
    """For people: on stderr."""
    logging.getLogger(__name__).info(text)


def emit(as_json: bool, data: Any, text: str) -> None:
    """For machines or pipes: on stdout."""
    typer.echo(json.dumps(data) if as_json else visible(text))


def leave(code: int) -> None:
    """With an exit code of a command that ended well, but not as hoped for."""
    if code:
        raise typer.Exit(code)


class Stopped(BaseException):
    """SIGTERM came: whatever is under way is left as Ctrl-C leaves it, and child processes end."""


def stop(number: int, frame: object) -> NoReturn:
    raise Stopped


def missed(lost: sys.UnraisableHookArgs) -> None:
    """A destructor cannot be left by an exception: Python prints it and goes on. What was to end a command is raised
    again when the destructor is done."""
    if not isinstance(lost.exc_value, Stopped | KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signal.signal(signal.SIGALRM, stop if isinstance(lost.exc_value, Stopped) else signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, SOON_S)


def run(app: typer.Typer) -> int:
    """Its exit code, once what went wrong has been told."""
    before, sys.unraisablehook = sys.unraisablehook, missed
    try:
        # as the first process of a container it would be deaf to SIGTERM otherwise
        with stoppable(stop, f"error: {TERMINATED}\n"):
            return told(app)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = before


def told(app: typer.Typer) -> int:
    """Runs a command; its exit code."""
    usage: Any = typer.BadParameter.__mro__[2]  # typer's ClickException, whichever package it comes from
    try:
        return int(app(standalone_mode=False) or 0)
    except EdgekdError as error:
        return failed(str(error), error.exit_code)
    except usage as error:
        error.show()
        return int(error.exit_code)
    except OSError as error:
        return failed(os_failure(error), 1)
    except MemoryError:
        return failed("memory ran out\n\nhint: give smaller images, fewer of them, or a smaller network", 1)
    except (KeyboardInterrupt, typer.Abort):
        return failed(f"interrupted\n\nhint: {AGAIN}", 130)
    except Stopped:
        return failed(TERMINATED, 143)


def failed(text: str, code: int) -> int:
    typer.echo(visible(f"error: {text}"), err=True)
    return code
