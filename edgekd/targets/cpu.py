"""cpu: ONNX Runtime on this processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec

from edgekd.core.dialects import DIALECTS
from edgekd.core.errors import ConfigError
from edgekd.core.processor import flags
from edgekd.core.target import Dialect, Target


@dataclass(frozen=True)
class Cpu(Target):
    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", hint="use 1 or more; 1 is the steadiest")

    @property
    def dialect(self) -> Dialect:
        """x86 is fast with unsigned activations only; its chips without VNNI saturate on full 8-bit weights."""
        if platform.machine() in ("x86_64", "AMD64"):
            vnni = {"avx512_vnni", "avx_vnni"} & set(flags())
            return replace(DIALECTS["ort-x86"], reduce_range=not vnni)
        return DIALECTS["ort-arm"]

    def missing(self) -> str:
        return "" if find_spec("onnxruntime") else "onnxruntime is not installed"

    @property
    def runtime(self) -> str:
        return "onnxruntime"


PLUGIN = Cpu
