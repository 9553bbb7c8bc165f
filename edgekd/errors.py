"""The errors a user may meet: a sentence of fact, a hint with the fix, an exit code."""

from __future__ import annotations

import errno
import os


class EdgekdError(Exception):
    """An error that edgekd raises on purpose. `edgekd` exits with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what, self.hint = what, hint
        super().__init__(f"{what}\n\nhint: {hint}" if hint else what)


class ConfigError(EdgekdError, ValueError):
    """What the user wrote (configuration, override, argument) is not valid.

    A ValueError too, so that pydantic gathers it with the other mistakes of a configuration.
    """

    exit_code = 2


class DataError(EdgekdError):
    """The images or labels cannot be used as they are."""

    exit_code = 2


class CheckpointError(EdgekdError):
    """A checkpoint does not fit its model, or cannot be read safely."""

    exit_code = 2


class TrainingError(EdgekdError):
    """Training went wrong in a way that going on would hide (a loss that is not finite)."""


class ModelError(EdgekdError):
    """An ONNX file cannot be read, or is not of the kind that is needed."""

    exit_code = 2


class ExportError(EdgekdError):
    """A network did not become the ONNX file that was asked for."""


class ParityError(EdgekdError):
    """Two forms of one model disagree by more than the configuration allows."""


class TargetUnavailable(EdgekdError):
    """This machine cannot run on the target."""


class StaleArtifact(EdgekdError):
    """A file on disk is not the one that was recorded."""


class Busy(EdgekdError):
    """Another build is running in the same output folder."""


def os_failure(error: OSError) -> str:
    """What the system refused, in a sentence; finished steps stay whole whatever it was."""
    place = f" `{error.filename}`" if error.filename else ""
    hints = {
        errno.ENOSPC: "free some space, then run the same command again: it goes on where it stopped",
        errno.EACCES: "choose a folder that you may write to with --out",
        errno.EROFS: "choose a folder that can be written to with --out",
    }
    reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
    return f"{reason}{place}\n\nhint: {hints.get(error.errno or 0, 'check the path')}"
