"""What all commands share: options, data on stdout, messages on stderr, errors as a sentence and an exit code."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgekd.errors import EdgekdError, os_failure
from edgekd.utils.stopping import stoppable
from edgekd.utils.text import escape_control_chars

# options of several commands
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


class EscapingFormatter(logging.Formatter):
    """Formats a message with its control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_chars(super().format(record))


def log_info(text: str) -> None:
    """Write a message for people to stderr."""
    logging.getLogger(__name__).info(text)


def emit(as_json: bool, data: Any, text: str) -> None:
    """Write data to stdout: as JSON, or as text."""
    typer.echo(json.dumps(data) if as_json else escape_control_chars(text))


def exit_with(code: int) -> None:
    """End the command with an exit code other than 0, without an error."""
    if code:
        raise typer.Exit(code)


class Terminated(BaseException):
    """SIGTERM was received: work stops as with Ctrl-C, and child processes end."""


def raise_terminated(number: int, frame: object) -> NoReturn:
    raise Terminated


def reraise_lost_signal(lost: sys.UnraisableHookArgs) -> None:
    """Raise an exception again that a signal raised inside of a destructor, where Python only prints it."""
    if not isinstance(lost.exc_value, Terminated | KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signal.signal(
        signal.SIGALRM, raise_terminated if isinstance(lost.exc_value, Terminated) else signal.default_int_handler
    )
    signal.setitimer(signal.ITIMER_REAL, SOON_S)


def run(app: typer.Typer) -> int:
    """Run the command line; return its exit code."""
    before, sys.unraisablehook = sys.unraisablehook, reraise_lost_signal
    try:
        # as the first process of a container it would be deaf to SIGTERM otherwise
        with stoppable(raise_terminated, f"error: {TERMINATED}\n"):
            return run_command(app)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = before


def run_command(app: typer.Typer) -> int:
    """Run a command, print its error, if any, and return its exit code."""
    usage: Any = typer.BadParameter.__mro__[2]  # typer's ClickException, whichever package it comes from
    try:
        return int(app(standalone_mode=False) or 0)
    except EdgekdError as error:
        return print_error(str(error), error.exit_code)
    except usage as error:
        error.show()
        return int(error.exit_code)
    except OSError as error:
        return print_error(os_failure(error), 1)
    except MemoryError:
        return print_error("memory ran out\n\nhint: give smaller images, fewer of them, or a smaller network", 1)
    except (KeyboardInterrupt, typer.Abort):
        return print_error(f"interrupted\n\nhint: {AGAIN}", 130)
    except Terminated:
        return print_error(TERMINATED, 143)


def print_error(text: str, code: int) -> int:
    typer.echo(escape_control_chars(f"error: {text}"), err=True)
    return code
