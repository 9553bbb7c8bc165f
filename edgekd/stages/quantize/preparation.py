"""Preparation: change an FP32 network so that it computes the same, with numbers that suit INT8 better."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import Exported, File
from edgekd.core.quant_scheme import QuantScheme
from edgekd.errors import ConfigError, ModelError, ParityError
from edgekd.onnx import inspect, writer
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.session import run_model
from edgekd.stages.quantize.activations import stream_tensors
from edgekd.stages.quantize.channel_scaling import ChannelRange, scale_channels
from edgekd.stages.quantize.equalize import equalization_factors, find_equalizable
from edgekd.stages.quantize.ranges import QuantizeConfig, check_batches, check_quantizable, load_prepared
from edgekd.stages.quantize.smoothquant import find_smoothable, smoothing_factors

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)
COMPARED = 64  # calibration inputs whose outputs must stay the same
TOLERANCE = 1e-4  # of the largest absolute output


def scheme_for(scheme: QuantScheme, config: QuantizeConfig) -> QuantScheme:
    """Return a target's scheme with the settings of `config`. Raises ConfigError where the two do not go together."""
    if scheme.format == "calibration_cache" and (config.changes_weights or config.per_channel is not None):
        raise ConfigError(
            f"the format `{scheme.format}` leaves the network as it is, and its weights to TensorRT, so that it cannot "
            "be equalized, smoothed, corrected, or given scales per channel",
            hint="leave out cross_layer_equalization, smoothquant_alpha, bias_correction and per_channel, "
            "or choose another target",
        )
    if scheme.format == "calibration_cache" and config.keep_float:
        raise ConfigError(
            f"in the format `{scheme.format}` TensorRT itself decides which layers of a DLA are float",
            hint="leave out `keep_float`, or choose another target",
        )
    return scheme if config.per_channel is None else replace(scheme, per_channel=config.per_channel)


def check_learned_ranges(config: QuantizeConfig) -> None:
    """Raise ConfigError where ranges are learned for a network that would be changed after its training."""
    if config.changes_weights:
        raise ConfigError(
            "the ranges that the method learns belong to the weights that it trains, which `cross_layer_equalization`, "
            "`smoothquant_alpha` and `bias_correction` would change afterwards",
            hint="leave them out, or use another method than quant_aware",
        )


def prepare_files(out: Path, model: Exported, images: File, config: QuantizeConfig) -> Exported:
    """Write both files of `model` into `out`, equalized and smoothed by the same numbers. Raises as `prepare_file`."""
    inputs = load_calibration(images.path, model.single.input)
    sources = (model.dynamic, model.single)
    networks = [load_prepared(source.file.path) for source in sources]
    rescale(networks, inputs, config)
    prepared = []
    for source, network in zip(sources, networks, strict=True):
        target = out / source.file.path.name
        write_prepared(source.file.path, network, target, inputs, config)
        prepared.append(replace(source, file=File.of(target)))
    return Exported(prepared[1], prepared[0])


def prepare_file(path: Path, target: Path, inputs: np.ndarray, config: QuantizeConfig) -> Path:
    """Write the FP32 ONNX file `path`, of any origin, equalized and smoothed to `target`, and return that.

    `inputs` are calibration inputs, (N, ...).

    Raises:
        ModelError: the file cannot be quantized.
        DataError: the inputs do not fit.
        ParityError: the outputs of the new file differ.
    """
    check_batches(path, check_quantizable(path), inputs)
    network = load_prepared(path)
    rescale([network], inputs, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_prepared(path, network, target, inputs, config)
    return target


def rescale(networks: Sequence[onnx.ModelProto], inputs: np.ndarray, config: QuantizeConfig) -> None:
    """Equalize, then smooth forms of one network in place, with the factors for the first of them."""
    first = networks[0]
    if config.cross_layer_equalization:
        equalizable = find_equalizable(first)
        ranges = channel_ranges(first, {channels.tensor: channels.producer.axis for channels in equalizable}, inputs)
        apply(networks, equalization_factors(first, equalizable, ranges))
        nothing = "no two layers with nothing but a ReLU or a pooling between them"
        log.info("equalized: %s", format_count(len(equalizable), nothing))
    if config.smoothquant_alpha:
        smoothable = find_smoothable(first)
        ranges = channel_ranges(first, {channels.path.end: channels.path.axis for channels in smoothable}, inputs)
        apply(networks, smoothing_factors(first, smoothable, ranges, config.smoothquant_alpha))
        nothing = "no matrix product behind a normalization or another product"
        log.info("smoothed: %s", format_count(len(smoothable), nothing))


def format_count(count: int, nothing: str) -> str:
    return f"{count} tensor{'s' * (count > 1)}" if count else f"nothing to do, there is {nothing}"


def apply(networks: Sequence[onnx.ModelProto], factors: Mapping[str, np.ndarray]) -> None:
    """Scale the channels of each network by `factors`."""
    for network in networks:
        missing = set(factors).difference(scale_channels(network, factors))
        if missing:
            raise ModelError(
                f"the network with a batch of 1 has no tensor `{min(missing)}` that can be scaled",
                hint="quantize one of the two files alone, with `edgekd quantize`",
            )


def channel_ranges(network: onnx.ModelProto, axes: Mapping[str, int], inputs: np.ndarray) -> dict[str, ChannelRange]:
    """Return the ranges of tensors by name, along the axes that count their channels. One batch is in memory."""
    ranges: dict[str, ChannelRange] = {}
    for tensors in stream_tensors(network, list(axes), inputs, "inputs to prepare by") if axes else ():
        for name, values in tensors.items():
            other_axes = tuple(i for i in range(values.ndim) if i != axes[name] % values.ndim)
            low, high = values.min(other_axes).astype(np.float64), values.max(other_axes).astype(np.float64)
            before = ranges.get(name, ChannelRange(low, high))
            ranges[name] = ChannelRange(np.minimum(before.lowest, low), np.maximum(before.highest, high))
    return ranges


def write_prepared(
    path: Path, network: onnx.ModelProto, target: Path, inputs: np.ndarray, config: QuantizeConfig
) -> None:
    """Write the changed network with IR version and metadata of `path`. Raises ParityError if its outputs differ."""
    import onnx

    original = onnx.load(str(path), load_external_data=False)
    network.ir_version = original.ir_version
    changes = ["cross_layer_equalization"] * config.cross_layer_equalization
    changes += [f"smoothquant_alpha {config.smoothquant_alpha:g}"] * bool(config.smoothquant_alpha)
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    writer.write(network, target, metadata | {writer.RESCALED: ", ".join(changes)})
    batch = inspect.facts(path).input.shape[0] or 1
    some = inputs[: max(min(COMPARED, len(inputs)) // batch, 1) * batch]
    exact, outputs = (run_model(file, some) for file in (path, target))
    gap = float(np.abs(outputs - exact).max() / (np.abs(exact).max() or 1.0))
    if not gap <= TOLERANCE:  # also true of nan
        raise ParityError(
            f"prepared for INT8, the outputs of `{path.name}` move by {gap:.1e} of the largest one "
            f"(allowed: {TOLERANCE:.0e})",
            hint="leave out `cross_layer_equalization` and `smoothquant_alpha`",
        )
