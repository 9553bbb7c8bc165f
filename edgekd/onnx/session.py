"""Run ONNX files in onnxruntime, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import ModelError

if TYPE_CHECKING:
    import numpy as np


CHUNK = 64  # images at once through a file with a dynamic batch: bounds the memory


class Opened:
    """An onnxruntime session; what it says of inputs that it cannot take is a ModelError."""

    def __init__(self, session: Any, path: Path) -> None:
        self.session, self.path = session, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, names: list[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs `names`, or all, for the inputs in `feed`."""
        try:
            found: list[np.ndarray] = self.session.run(names, feed)
        except ort_errors() as error:
            cause = " ".join(str(error).split())
            taken = ", ".join(f"{value.shape}, {value.type}" for value in self.session.get_inputs())
            raise ModelError(f"`{self.path}` refuses these inputs: {cause}", hint=f"it takes {taken}") from error
        return found


def session(path: Path, optimised: bool = True, threads: int = 0) -> Opened:
    """An onnxruntime session on the CPU; `threads` 0 stands for one per core. Raises ModelError if it does not load."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    try:
        return Opened(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), path)
    except ort_errors() as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"onnxruntime {ort.__version__} does not load `{path}`: {cause}",
            hint="lower the opset, or update onnxruntime",
        ) from error


def ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own errors, which have no common root, and what C++ ones become in Python."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError, MemoryError)


def answers(path: Path, inputs: np.ndarray, optimised: bool = True, threads: int = 0) -> np.ndarray:
    """The first output for `inputs`, (N, ...), from onnxruntime in this process; for parity, never for timing.

    A static batch is fed in pieces of its size. Raises ModelError if N is no multiple of it, the inputs do not fit, or
    it does not answer with a row for each of them.
    """
    import numpy as np

    running = session(path, optimised, threads)
    value = running.get_inputs()[0]
    batch = value.shape[0] if isinstance(value.shape[0], int) else 0
    if not len(inputs) or (batch and len(inputs) % batch):
        raise ModelError(
            f"`{path}` takes {batch or 'one or more'} inputs at once, which {len(inputs)} cannot be cut into",
            hint="give a multiple of the batch size, or export with batch 1",
        )
    step = batch or CHUNK
    pieces = [running.run(None, {value.name: inputs[i : i + step]})[0] for i in range(0, len(inputs), step)]
    if not all(isinstance(piece, np.ndarray) and piece.ndim for piece in pieces):
        raise ModelError(f"`{path}` answers with no rows", hint="its first output must have a row for each input")
    answer: np.ndarray = np.concatenate(pieces)
    return answer
