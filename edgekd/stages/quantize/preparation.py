"""Preparation: an FP32 network that answers as before, but whose numbers suit INT8 better."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import Exported, File
from edgekd.core.quant_scheme import Dialect
from edgekd.errors import ConfigError, ModelError, ParityError
from edgekd.onnx import inspect, session, writer
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.quantize.activations import streamed
from edgekd.stages.quantize.channel_scaling import Extremes, scale
from edgekd.stages.quantize.equalize import equalizable, equalizing
from edgekd.stages.quantize.ranges import QuantizeConfig, check_batches, prepared, quantizable
from edgekd.stages.quantize.smoothquant import smoothable, smoothing

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)
COMPARED = 64  # calibration inputs that must be answered as before
TOLERANCE = 1e-4  # of the largest absolute answer


def dialect_for(own: Dialect, config: QuantizeConfig) -> Dialect:
    """A target's dialect with what `config` says of it. Raises ConfigError where the two do not go together."""
    if own.form == "cache" and (config.changes or config.per_channel is not None):
        raise ConfigError(
            f"the form `{own.form}` leaves the network as it is, and its weights to TensorRT, so that it cannot be "
            "equalized, smoothed, corrected, or given scales per channel",
            hint="leave out equalize, smooth, correct_bias and per_channel, or choose another target",
        )
    if own.form == "cache" and config.floats:
        raise ConfigError(
            f"in the form `{own.form}` TensorRT itself decides which layers of a DLA are float",
            hint="leave out `floats`, or choose another target",
        )
    return own if config.per_channel is None else replace(own, per_channel=config.per_channel)


def check_learnt(config: QuantizeConfig) -> None:
    """Raises ConfigError where ranges are learnt for a network that is to be changed after its training."""
    if config.changes:
        raise ConfigError(
            "the ranges that the method learns belong to the weights that it trains, which `equalize`, `smooth` and "
            "`correct_bias` would change afterwards",
            hint="leave them out, or teach with another method than quant_aware",
        )


def prepare(out: Path, model: Exported, images: File, config: QuantizeConfig) -> Exported:
    """Both files of `model`, equalized and smoothed as asked, both by the same numbers. Raises as `prepare_file`."""
    inputs = load_calibration(images.path, model.single.input)
    sources = (model.dynamic, model.single)
    networks = [prepared(source.file.path) for source in sources]
    rescale(networks, inputs, config)
    made = []
    for source, network in zip(sources, networks, strict=True):
        target = out / source.file.path.name
        finish(source.file.path, network, target, inputs, config)
        made.append(replace(source, file=File.of(target)))
    return Exported(made[1], made[0])


def prepare_file(path: Path, target: Path, inputs: np.ndarray, config: QuantizeConfig) -> Path:
    """Write the FP32 ONNX file `path`, of any origin, to `target`, equalized and smoothed as asked; that file.

    Raises ModelError if it cannot be quantized, DataError if the calibration inputs, (N, ...), do not fit, ParityError
    if the new file answers them otherwise.
    """
    check_batches(path, quantizable(path), inputs)
    network = prepared(path)
    rescale([network], inputs, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    finish(path, network, target, inputs, config)
    return target


def rescale(networks: Sequence[onnx.ModelProto], inputs: np.ndarray, config: QuantizeConfig) -> None:
    """Equalize, then smooth forms of one network in place, as the first of them asks for."""
    first = networks[0]
    if config.equalize:
        found = equalizable(first)
        seen = extremes(first, {seam.tensor: seam.maker.axis for seam in found}, inputs)
        apply(networks, equalizing(first, found, seen))
        log.info("equalized: %s", told(len(found), "no two layers with nothing but a ReLU or a pooling between them"))
    if config.smooth:
        found = smoothable(first)
        seen = extremes(first, {seam.way.taken: seam.way.axis for seam in found}, inputs)
        apply(networks, smoothing(first, found, seen, config.smooth))
        log.info("smoothed: %s", told(len(found), "no matrix product behind a normalization or another product"))


def told(count: int, none: str) -> str:
    return f"{count} tensor{'s' * (count > 1)}" if count else f"nothing to do, there is {none}"


def apply(networks: Sequence[onnx.ModelProto], factors: Mapping[str, np.ndarray]) -> None:
    for network in networks:
        lost = set(factors).difference(scale(network, factors))
        if lost:
            raise ModelError(
                f"the network with a batch of 1 has no tensor `{min(lost)}` that can be scaled",
                hint="quantize one of the two files alone, with `edgekd quantize`",
            )


def extremes(network: onnx.ModelProto, axes: Mapping[str, int], inputs: np.ndarray) -> dict[str, Extremes]:
    """The extremes of tensors, by name, along the axes that count their channels. One batch is in memory."""
    found: dict[str, Extremes] = {}
    for seen in streamed(network, list(axes), inputs, "inputs to prepare by") if axes else ():
        for name, values in seen.items():
            rest = tuple(i for i in range(values.ndim) if i != axes[name] % values.ndim)
            low, high = values.min(rest).astype(np.float64), values.max(rest).astype(np.float64)
            known = found.get(name, Extremes(low, high))
            found[name] = Extremes(np.minimum(known.lowest, low), np.maximum(known.highest, high))
    return found


def finish(path: Path, network: onnx.ModelProto, target: Path, inputs: np.ndarray, config: QuantizeConfig) -> None:
    """Write the changed network with the form of `path`. Raises ParityError where it answers otherwise."""
    import onnx

    original = onnx.load(str(path), load_external_data=False)
    network.ir_version = original.ir_version
    done = [*["equalize"] * config.equalize, *[f"smooth {config.smooth:g}"] * bool(config.smooth)]
    kept = {entry.key: entry.value for entry in original.metadata_props}
    writer.write(network, target, kept | {writer.RESCALED: ", ".join(done)})
    batch = inspect.facts(path).input.shape[0] or 1
    some = inputs[: max(min(COMPARED, len(inputs)) // batch, 1) * batch]
    want, got = (session.answers(file, some) for file in (path, target))
    gap = float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))
    if not gap <= TOLERANCE:  # also true of nan
        raise ParityError(
            f"prepared for INT8, the answers of `{path.name}` move by {gap:.1e} of the largest one "
            f"(allowed: {TOLERANCE:.0e})",
            hint="leave out `equalize` and `smooth`",
        )
