"""The INT8 dialects that edgekd writes, by name; one set of calibration statistics serves them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekd.core.plugins import unknown
from edgekd.errors import ConfigError

Form = Literal["integers", "pairs", "cache"]


@dataclass(frozen=True)
class Dialect:
    """The INT8 that a runtime executes fast. Weights are always signed and symmetric.

    `integers`: weights and biases are stored as integers, Q/DQ nodes stand around every operator onnxruntime knows.
    `pairs`: weights and biases stay float; Q/DQ pairs stand before weighted operators and the skips of Adds only.
    `cache`: the network stays float, and the scales are in TensorRT's calibration cache.
    """

    activation: Literal["int8", "uint8"]
    symmetric_activation: bool
    per_channel: bool = True
    reduce_range: bool = False  # 7-bit weights, for processors whose INT8 products saturate
    form: Form = "integers"

    def __post_init__(self) -> None:
        signed = self.activation == "int8" and self.symmetric_activation
        if self.form != "integers" and (self.reduce_range or not signed):
            raise ConfigError(
                f"the form `{self.form}` is TensorRT's, which takes signed symmetric full-range INT8 only",
                hint="use activation int8, symmetric_activation true, reduce_range false",
            )


DIALECTS = {
    # x86 chips without VNNI saturate on full 8-bit weights: the target `cpu` reduces the range where it runs on one
    "ort-x86": Dialect("uint8", symmetric_activation=False),
    "ort-arm": Dialect("int8", symmetric_activation=False),
    # OpenVINO 2026.4 runs a ResNet-20 as fast in any Q/DQ form with unsigned activations (0.18 ms on a Zen 5 core,
    # medians of 500 calls each), and slower with signed symmetric ones (0.22 ms). NNCF 3.4, with the same calibration
    # images, makes nothing faster or more accurate: benchmarks/quantizers.py, docs/results.md
    "openvino": Dialect("uint8", symmetric_activation=False),
    "tensorrt": Dialect("int8", symmetric_activation=True, form="pairs"),
    "dla": Dialect("int8", symmetric_activation=True, per_channel=False, form="cache"),
}


def named(name: str) -> Dialect:
    """Raises ConfigError if there is no dialect called `name`."""
    if name not in DIALECTS:
        raise unknown(f"there is no dialect `{name}`", name, list(DIALECTS))
    return DIALECTS[name]
