"""Run a network over calibration inputs and stream its inner tensors, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.inputs import batches
from edgekd.onnx.session import open_session
from edgekd.utils import progress

if TYPE_CHECKING:
    import onnx


def stream_tensors(
    network: onnx.ModelProto, names: Sequence[str], inputs: np.ndarray, label: str
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tensors `names` of `network` for one batch of `inputs`, (N, ...), after the other.

    `label` is shown on the progress bar.
    """
    import onnx

    exposed = onnx.ModelProto()
    exposed.CopyFrom(network)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        onnx.save(exposed, f"{folder}/exposed.onnx")
        session = open_session(Path(folder, "exposed.onnx"))
        value = session.get_inputs()[0]
        size = value.shape[0] if isinstance(value.shape[0], int) else 1
        with progress.progress_bar(label, len(inputs)) as advance:
            for batch in batches(inputs[: len(inputs) // size * size], size):
                yield dict(zip(names, session.run(list(names), {value.name: np.asarray(batch)}), strict=True))
                advance(size)
