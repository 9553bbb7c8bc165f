"""The INT8 quantization schemes that edgekd writes, by name; one set of calibration statistics serves them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekd.core.plugins import unknown_name
from edgekd.errors import ConfigError

QuantFormat = Literal["qdq", "qdq_explicit", "calibration_cache"]


@dataclass(frozen=True)
class QuantScheme:
    """The INT8 that a runtime executes fast. Weights are always signed and symmetric.

    `qdq`: weights and biases are stored as integers, with Q/DQ nodes around every operator that onnxruntime quantizes.
    `qdq_explicit`: weights and biases stay float, with Q/DQ pairs before weighted operators and the skips of Adds only.
    `calibration_cache`: the network stays float, and the scales are in TensorRT's calibration cache.
    """

    activation: Literal["int8", "uint8"]
    symmetric_activation: bool
    per_channel: bool = True
    reduce_range: bool = False  # 7-bit weights, for processors whose INT8 products saturate
    format: QuantFormat = "qdq"

    def __post_init__(self) -> None:
        signed = self.activation == "int8" and self.symmetric_activation
        if self.format != "qdq" and (self.reduce_range or not signed):
            raise ConfigError(
                f"the format `{self.format}` is TensorRT's, which takes signed symmetric full-range INT8 only",
                hint="use activation int8, symmetric_activation true, reduce_range false",
            )


QUANT_SCHEMES = {
    # x86 chips without VNNI saturate on full 8-bit weights: the target `cpu` reduces the range where it runs on one
    "ort-x86": QuantScheme("uint8", symmetric_activation=False),
    "ort-arm": QuantScheme("int8", symmetric_activation=False),
    # OpenVINO 2026.4 runs a ResNet-20 as fast in any Q/DQ format with unsigned activations (0.18 ms on a Zen 5 core,
    # medians of 500 calls each), and slower with signed symmetric ones (0.22 ms). NNCF 3.4, with the same calibration
    # images, makes nothing faster or more accurate: benchmarks/quantizers.py, docs/results/int8-vs-nncf-ort.md
    "openvino": QuantScheme("uint8", symmetric_activation=False),
    "tensorrt": QuantScheme("int8", symmetric_activation=True, format="qdq_explicit"),
    "dla": QuantScheme("int8", symmetric_activation=True, per_channel=False, format="calibration_cache"),
}


def get_scheme(name: str) -> QuantScheme:
    """Return a scheme by name. Raises ConfigError if there is none of that name."""
    if name not in QUANT_SCHEMES:
        raise unknown_name(f"there is no quantization scheme `{name}`", name, list(QUANT_SCHEMES))
    return QUANT_SCHEMES[name]
