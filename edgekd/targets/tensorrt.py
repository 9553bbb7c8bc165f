"""tensorrt: TensorRT 10 or newer on a workstation with an NVIDIA GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.util import find_spec

from edgekd.core.quant_scheme import QUANT_SCHEMES, QuantScheme
from edgekd.core.target import DeploymentPlan, Target
from edgekd.errors import ConfigError

OPSET = 20  # all of TensorRT 10 and 11 reads it


@dataclass(frozen=True)
class TensorRt(Target):
    def __post_init__(self) -> None:
        if self.threads != 1:
            raise ConfigError(f"threads is {self.threads}, which TensorRT has none of", hint="leave it out")

    @property
    def scheme(self) -> QuantScheme:
        return QUANT_SCHEMES["tensorrt"]

    @property
    def deployment_plan(self) -> DeploymentPlan:
        return DeploymentPlan(
            engines=("fp32", "fp16", "int8"),
            opset=OPSET,
            typed=True,
            why=(
                f"TensorRT 10 and newer reads ONNX of opset {OPSET}",
                "precisions are in the files, which TensorRT 10 can take so, and 11 only so",
                "all precisions are built and measured: on small layers, INT8 can be slower than FP16",
            ),
        )

    def unavailable_reason(self) -> str:
        """Return why, without an import of TensorRT: without a driver it can end the process."""
        library = "" if find_spec("tensorrt") else "tensorrt is not installed (pip install 'edgekd[tensorrt]')"
        return ", and ".join(filter(None, (no_gpu(), library)))

    @property
    def runtime(self) -> str:
        return "tensorrt"


def no_gpu() -> str:
    """Return why there is no NVIDIA GPU to use; empty if there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return "" if code == 0 and count.value else f"the NVIDIA driver finds no GPU (CUDA error {code})"


PLUGIN = TensorRt
