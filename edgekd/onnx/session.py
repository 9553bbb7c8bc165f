"""Run ONNX files in onnxruntime, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import ModelError
from edgekd.onnx import validate
from edgekd.onnx.exact_sums import exact_entries, unshare

if TYPE_CHECKING:
    import numpy as np


CHUNK = 64  # images at once through a file with a dynamic batch: bounds the memory


class CheckedSession:
    """An onnxruntime session that reports inputs which it cannot take as a ModelError."""

    def __init__(self, session: Any, path: Path) -> None:
        self.session, self.path = session, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, names: list[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs `names`, or all, for the inputs in `feed`."""
        try:
            outputs: list[np.ndarray] = self.session.run(names, feed)
        except ort_errors() as error:
            cause = " ".join(str(error).split())
            accepted = ", ".join(f"{value.shape}, {value.type}" for value in self.session.get_inputs())
            raise ModelError(f"`{self.path}` refuses these inputs: {cause}", hint=f"it takes {accepted}") from error
        return outputs


def open_session(path: Path, optimised: bool = True, threads: int = 0, exact: bool = True) -> CheckedSession:
    """Open an onnxruntime session on the CPU; `threads` 0 means one per core. Raises ModelError if it does not load.

    Integers are summed without saturation, as on the processor that the file is for. Where that is this very processor,
    `exact` is False, and they are summed as it does.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    entries = exact_entries() if exact else {}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    source = loadable_source(path) if entries and optimised else str(path)
    try:
        return CheckedSession(ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]), path)
    except ort_errors() as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"onnxruntime {ort.__version__} does not load `{path}`: {cause}",
            hint="lower the opset, or update onnxruntime",
        ) from error


def loadable_source(path: Path) -> str | bytes:
    """Return what onnxruntime loads with the entries of `exact_sums`: the path, or the file's bytes with copies."""
    from onnx.external_data_helper import load_external_data_for_model

    model = validate.parsed(path)
    if not unshare(model):
        return str(path)
    load_external_data_for_model(model, str(path.parent))
    return bytes(model.SerializeToString())


def ort_errors() -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises: its errors, which have no common root, and what C++ ones become in Python."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    errors = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*errors, RuntimeError, ValueError, MemoryError)


def run_model(
    path: Path, inputs: np.ndarray, optimised: bool = True, threads: int = 0, exact: bool = True
) -> np.ndarray:
    """Return the first output for `inputs`, (N, ...), from onnxruntime in this process; for parity, never for timing.

    A static batch is fed in pieces of its size. Raises ModelError if N is no multiple of it, the inputs do not fit, or
    it does not answer with a row for each of them.
    """
    session = open_session(path, optimised, threads, exact)
    return run_session(session, inputs, session.get_outputs()[:1])[0]


def run_outputs(
    path: Path, inputs: np.ndarray, optimised: bool = True, threads: int = 0, exact: bool = True
) -> tuple[np.ndarray, ...]:
    """Return all outputs for `inputs`, in the order of the file; otherwise as `run_model`."""
    session = open_session(path, optimised, threads, exact)
    return run_session(session, inputs, session.get_outputs())


def run_session(session: CheckedSession, inputs: np.ndarray, outputs: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """Return some outputs of an open session, each for all inputs. Raises ModelError as `run_model` does."""
    import numpy as np

    value, path = session.get_inputs()[0], session.path
    batch = value.shape[0] if isinstance(value.shape[0], int) else 0
    if not len(inputs) or (batch and len(inputs) % batch):
        raise ModelError(
            f"`{path}` takes {batch or 'one or more'} inputs at once, which {len(inputs)} cannot be cut into",
            hint="give a multiple of the batch size, or export with batch 1",
        )
    step, names = batch or CHUNK, [output.name for output in outputs]
    pieces = [session.run(names, {value.name: inputs[i : i + step]}) for i in range(0, len(inputs), step)]
    if not all(isinstance(tensor, np.ndarray) and tensor.ndim for piece in pieces for tensor in piece):
        raise ModelError(f"`{path}` answers with no rows", hint="its outputs must have a row for each input")
    return tuple(np.concatenate(tensors) for tensors in zip(*pieces, strict=True))
