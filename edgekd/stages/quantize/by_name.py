"""Quantize a file of any origin in a dialect given by name, or in that of a target."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.core import dialects, onnx_facts, plain, plugins
from edgekd.core.artifact import OnnxModel
from edgekd.core.errors import ConfigError
from edgekd.core.exactness import exact_entries
from edgekd.core.target import Dialect
from edgekd.stages.quantize.cache import CalibrationCache, cache_file
from edgekd.stages.quantize.calibrate import load_calibration
from edgekd.stages.quantize.quantize import JUDGES, quantize_file, ratio_db
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.targets._jetpack import cache_release

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
LEAST_DB = 0.1  # that is worth a warning


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
    config = plain.load(QuantizeConfig, {"method": method, **more})
    inputs = load_calibration(calib, onnx_facts.facts(model).input)
    if release:
        return cache_file(model, out, inputs, release, config)
    made = quantize_file(model, out, inputs, chosen, config)
    if dialect == "ort-x86" and exact_entries():
        tell_saturation(model, out, inputs)
    return made


def tell_saturation(model: Path, int8: Path, inputs: np.ndarray) -> None:
    """Warn of what answers to `inputs`, (N, ...), lose to FP32 by sums that saturate on this processor, if they do."""
    batch = onnx_facts.facts(model).input.shape[0] or 1
    judges = inputs[: max(min(JUDGES, len(inputs)) // batch, 1) * batch]
    want = onnx_facts.answers(model, judges)
    exact, here = (ratio_db(want, onnx_facts.answers(int8, judges, exact=flag)) for flag in (True, False))
    if exact - here >= LEAST_DB:
        log.warning(
            "`%s` loses %.1f dB on this processor, whose 8-bit sums saturate for want of VNNI: its answers to %d "
            "calibration inputs stand %.1f dB above their error, and %.1f dB where nothing saturates\n\n"
            "hint: for this processor quantize with `--target cpu`, which leaves weights 7 bits",
            int8,
            exact - here,
            len(judges),
            here,
            exact,
        )


def choice(target: str | None, dialect: str | None) -> Dialect:
    if target is not None and dialect is not None:
        raise ConfigError("a target has its own dialect", hint="give --target or --dialect, not both")
    if dialect is not None:
        return dialects.named(dialect)
    own: Dialect = plugins.load("targets", target or "cpu")().dialect
    return own


def facts(model: OnnxModel | CalibrationCache) -> dict[str, Any]:
    """For machines."""
    return {**plain.dump(model), "bytes": model.file.bytes}


def described(model: OnnxModel | CalibrationCache) -> str:
    """For people, in one line."""
    if isinstance(model, CalibrationCache):
        return f"{model.file.path}: scales of {model.tensors} tensors, to build with TensorRT {model.tensorrt}"
    size = f"{model.file.bytes / 1e3:.1f} kB, {model.macs / 1e6:.2f} M MACs"
    return f"{model.file.path}: {model.precision}, opset {model.opset}, {size}, sha256 {model.file.sha256[:12]}"
