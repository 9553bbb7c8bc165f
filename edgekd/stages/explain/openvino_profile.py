"""Kernels: which ones OpenVINO chose for an ONNX file on this processor, and how long each takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.errors import ModelError
from edgekd.stages.explain.speed_causes import COST, Cause, percent

WEIGHTED = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
CALLS = 300
WARM_UP = 30


@dataclass(frozen=True)
class Kernel:
    name: str
    op: str
    kernel: str  # brgconv_avx512_I8: the last part is the precision
    us: float  # mean

    @property
    def integer(self) -> bool:
        return self.kernel.rpartition("_")[2].lower() in ("i8", "u8")


def kernels(path: Path, inputs: np.ndarray, threads: int) -> list[Kernel]:
    """Everything that OpenVINO executes in one call, floats in FP32. Raises ModelError if it refuses the file."""
    import openvino  # type: ignore[import-untyped]

    settings = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        model = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"OpenVINO {openvino.__version__.partition('-')[0]} does not take it: {cause[-200:]}",
            hint="edgekd quantize --scheme openvino",
        ) from error
    shape = model.inputs[0].partial_shape
    batch = shape[0].get_length() if shape[0].is_static else 1
    request = model.create_infer_request()
    spent: dict[tuple[str, str, str], float] = {}
    for i in range(WARM_UP + CALLS):
        request.infer([np.take(inputs, range(i * batch, (i + 1) * batch), axis=0, mode="wrap")])
        if i + 1 in (WARM_UP, WARM_UP + CALLS):
            # its times are means of all calls so far, the first one with the making of the kernels included
            sign = 1 if i >= WARM_UP else -1
            for one in request.get_profiling_info():
                if one.status == one.Status.EXECUTED:
                    key = (one.node_name, one.node_type, one.exec_type)
                    spent[key] = spent.get(key, 0.0) + sign * (i + 1) * one.real_time.total_seconds() * 1e6
    return [Kernel(*key, max(us / CALLS, 0.0)) for key, us in spent.items()]


def floats(executed: list[Kernel]) -> list[Cause]:
    """Layers that OpenVINO computes in float."""
    total = sum(one.us for one in executed) or 1.0
    lost = sorted((n for n in executed if n.op in WEIGHTED and not n.integer), key=lambda n: -n.us)
    share = sum(one.us for one in lost) / total
    if not lost or share < COST:
        return []
    names = ", ".join(f"`{one.name}` ({one.kernel})" for one in lost[:3])
    text = f"{len(lost)} layers run in float, {percent(share)} of the time: {names}"
    return [Cause("speed", text, "edgekd quantize --scheme openvino", "nncf.quantize without ignored_scope", share)]
