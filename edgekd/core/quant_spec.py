"""Which tensors and weights an INT8 file quantizes, for quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.artifact import Fingerprint
from edgekd.core.quant_scheme import QuantScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that the INT8 file quantizes, with all tensors that share its scale."""

    fingerprints: tuple[Fingerprint, ...]  # the tensor's first
    low: float  # calibrated range
    high: float
    readers: tuple[Fingerprint, ...] | None  # consumers of the quantized values, by weights or outputs; None: all


@dataclass(frozen=True)
class QuantSpec:
    """What the INT8 file of a network quantizes, and how."""

    scheme: QuantScheme
    tensors: tuple[QuantizedTensor, ...]
    weights: tuple[tuple[Fingerprint, bool], ...]  # BatchNorm folded; True: a scale per output channel
