"""Call code of others, which may raise anything: a user's modules and networks, plug-ins, libraries on any file."""

from __future__ import annotations

import errno
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekd.errors import ConfigError, EdgekdError

LONGEST = 300  # characters of a cause


@contextmanager
def external_code(what: str, hint: str, kind: type[EdgekdError] = ConfigError) -> Iterator[None]:
    """Raise `kind` with `what`, a sentence without its end, and the cause, for anything that is raised inside.

    The only place that catches everything, for no list of exceptions holds for code that was never seen.
    """
    try:
        yield
    except EdgekdError:
        raise
    except (Exception, SystemExit) as error:  # a module that leaves must not end a build with its own exit code
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise kind(f"{what}: {cause(error)}", hint=hint) from error


def cause(error: BaseException) -> str:
    """Return the type and the message of an error's first cause on one line, and its place in the user's code."""
    while error.__cause__:
        error = error.__cause__
    words = " ".join(str(error).split())[:LONGEST]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_installed(frame.filename)]
    place = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames[-1:])
    return f"{type(error).__name__}{': ' if words else ''}{words}{place}"


def is_installed(filename: str) -> bool:
    """Return whether code is edgekd's, an installed package's, or Python's."""
    places = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    return filename.startswith((*places, "<"))
