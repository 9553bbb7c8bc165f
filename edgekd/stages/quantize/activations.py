"""Stream: what tensors inside of a network are, over all calibration inputs, with one batch of them in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx import session
from edgekd.onnx.inputs import portions
from edgekd.utils import progress

if TYPE_CHECKING:
    import onnx


def streamed(
    network: onnx.ModelProto, names: Sequence[str], inputs: np.ndarray, label: str
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors `names` of `network` for one batch of `inputs`, (N, ...), after the other; `label` is on the bar."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(network)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        onnx.save(watched, f"{folder}/watched.onnx")
        running = session.session(Path(folder, "watched.onnx"))
        entering = running.get_inputs()[0]
        step = entering.shape[0] if isinstance(entering.shape[0], int) else 1
        with progress.bar(label, len(inputs)) as advance:
            for part in portions(inputs[: len(inputs) // step * step], step):
                yield dict(zip(names, running.run(list(names), {entering.name: np.asarray(part)}), strict=True))
                advance(step)
