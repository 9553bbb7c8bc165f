"""Quantize a file of any origin in a scheme given by name, or in that of a target."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.core import plugins, quant_scheme, serialization
from edgekd.core.artifact import OnnxModel
from edgekd.core.quant_scheme import QuantScheme
from edgekd.errors import ConfigError
from edgekd.onnx import inspect
from edgekd.onnx.exact_sums import exact_entries
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.session import run_model
from edgekd.stages.quantize.calibration_cache import CalibrationCache, quantize_to_cache
from edgekd.stages.quantize.quantize import VERIFIED_INPUTS, quantize_file, snr_db
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.targets._jetpack import cache_release

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
LEAST_DB = 0.1  # that is worth a warning


@dataclass(frozen=True)
class SchemeChoice:
    """The names that select a scheme: a target, or a scheme itself; neither is the target `cpu`."""

    target: str | None = None
    scheme: str | None = None
    jetpack: str | None = None  # for a calibration cache

    def load(self) -> QuantScheme:
        """Return the scheme. Raises ConfigError for names that do not exist or do not go together."""
        if self.target is not None and self.scheme is not None:
            raise ConfigError("a target has its own scheme", hint="give --target or --scheme, not both")
        if self.scheme is not None:
            return quant_scheme.get_scheme(self.scheme)
        scheme: QuantScheme = plugins.load("targets", self.target or "cpu")().scheme
        return scheme


def quantize_by_name(
    model: Path, calibration: Path, out: Path, choice: SchemeChoice, settings: Mapping[str, Any]
) -> OnnxModel | CalibrationCache:
    """Write `out` from the FP32 ONNX file `model` and the network inputs in `calibration`, (N, C, H, W).

    `settings` are fields of QuantizeConfig. Raises as `SchemeChoice.load` and `quantize_file`.
    """
    scheme, jetpack = choice.load(), choice.jetpack
    if jetpack is not None and scheme.format != "calibration_cache":
        raise ConfigError(
            "only a calibration cache is written for one JetPack",
            hint=f"leave out --jetpack; `edgekd lint {out} --jetpack {jetpack}` checks the file",
        )
    release = cache_release(jetpack) if scheme.format == "calibration_cache" else ""
    config = serialization.from_json(QuantizeConfig, dict(settings))
    inputs = load_calibration(calibration, inspect.facts(model).input)
    if release:
        return quantize_to_cache(model, out, inputs, release, config)
    int8 = quantize_file(model, out, inputs, scheme, config)
    if choice.scheme == "ort-x86" and exact_entries():
        warn_of_saturation(model, out, inputs)
    return int8


def warn_of_saturation(model: Path, int8: Path, inputs: np.ndarray) -> None:
    """Log what the outputs for `inputs`, (N, ...), lose against FP32 by sums that saturate on this processor."""
    batch = inspect.facts(model).input.shape[0] or 1
    sample = inputs[: max(min(VERIFIED_INPUTS, len(inputs)) // batch, 1) * batch]
    fp32 = run_model(model, sample)
    exact, here = (snr_db(fp32, run_model(int8, sample, exact=flag)) for flag in (True, False))
    if exact - here >= LEAST_DB:
        log.warning(
            "`%s` loses %.1f dB on this processor, whose 8-bit sums saturate without VNNI: %.1f dB of signal to noise "
            "on %d calibration inputs, and %.1f dB where nothing saturates\n\n"
            "hint: for this processor quantize with `--target cpu`, which leaves weights 7 bits",
            int8,
            exact - here,
            here,
            len(sample),
            exact,
        )


def to_json(model: OnnxModel | CalibrationCache) -> dict[str, Any]:
    """Return the result as JSON."""
    return {**serialization.to_json(model), "bytes": model.file.bytes}


def format_result(model: OnnxModel | CalibrationCache) -> str:
    """Return the result in one line."""
    if isinstance(model, CalibrationCache):
        return f"{model.file.path}: scales of {model.tensors} tensors, to build with TensorRT {model.tensorrt}"
    size = f"{model.file.bytes / 1e3:.1f} kB, {model.macs / 1e6:.2f} M MACs"
    return f"{model.file.path}: {model.precision}, opset {model.opset}, {size}, sha256 {model.file.sha256[:12]}"
