"""The INT8 dialects that edgekd writes, by name; one set of calibration statistics serves them all."""

from __future__ import annotations

from edgekd.core.plugins import unknown
from edgekd.core.target import Dialect

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
