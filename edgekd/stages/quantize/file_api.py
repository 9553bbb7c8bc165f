"""Quantize a file of any origin in a dialect given by name, or in that of a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.core import plugins, quant_scheme, serialization
from edgekd.core.artifact import OnnxModel
from edgekd.core.quant_scheme import Dialect
from edgekd.errors import ConfigError
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.quantize.calibration_cache import CalibrationCache, cache_file
from edgekd.stages.quantize.quantize import quantize_file
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.targets._jetpack import cache_release


def quantize_by_name(
    model: Path,
    calib: Path,
    out: Path,
    target: str | None,
    dialect: str | None,
    jetpack: str | None,
    method: str,
    **more: Any,
) -> OnnxModel | CalibrationCache:
    """Write `out` from the FP32 ONNX file `model` and the network inputs in `calib`, (N, C, H, W).

    `method` and `more` are fields of QuantizeConfig.
    Raises ConfigError for names that do not exist or do not go together, ModelError and DataError as `quantize_file`.
    """
    chosen = choice(target, dialect)
    if jetpack is not None and chosen.form != "cache":
        raise ConfigError(
            "only a calibration cache is written for one JetPack",
            hint=f"leave out --jetpack; `edgekd lint {out} --jetpack {jetpack}` judges the file",
        )
    release = cache_release(jetpack) if chosen.form == "cache" else ""
    config = serialization.load(QuantizeConfig, {"method": method, **more})
    inputs = load_calibration(calib, inspect.facts(model).input)
    if release:
        return cache_file(model, out, inputs, release, config)
    return quantize_file(model, out, inputs, chosen, config)


def choice(target: str | None, dialect: str | None) -> Dialect:
    if target is not None and dialect is not None:
        raise ConfigError("a target has its own dialect", hint="give --target or --dialect, not both")
    if dialect is not None:
        return quant_scheme.named(dialect)
    own: Dialect = plugins.load("targets", target or "cpu")().dialect
    return own


def facts(model: OnnxModel | CalibrationCache) -> dict[str, Any]:
    """For machines."""
    return {**serialization.dump(model), "bytes": model.file.bytes}


def described(model: OnnxModel | CalibrationCache) -> str:
    """For people, in one line."""
    if isinstance(model, CalibrationCache):
        return f"{model.file.path}: scales of {model.tensors} tensors, to build with TensorRT {model.tensorrt}"
    size = f"{model.file.bytes / 1e3:.1f} kB, {model.macs / 1e6:.2f} M MACs"
    return f"{model.file.path}: {model.precision}, opset {model.opset}, {size}, sha256 {model.file.sha256[:12]}"
