"""Quantize FP32 ONNX files to static INT8 with Q/DQ nodes, in the scheme of a target; for files of any origin."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import Exported, File, OnnxModel
from edgekd.core.quant_scheme import QuantScheme
from edgekd.errors import ConfigError, ModelError
from edgekd.onnx import inspect
from edgekd.onnx import writer as onnx_writer
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.session import run_model
from edgekd.stages.quantize.bias_correction import correct_biases
from edgekd.stages.quantize.float_layers import float_node_outputs, prevent_ort_requantize
from edgekd.stages.quantize.preparation import prepare_file, prepare_files, scheme_for
from edgekd.stages.quantize.qdq import quantize_explicit
from edgekd.stages.quantize.ranges import (
    Bounds,
    QuantizeConfig,
    Ranges,
    best_ranges,
    calibrate,
    calibrate_methods,
    check_batches,
    check_quantizable,
    load_prepared,
    propagate_bounds,
)
from edgekd.utils.arrays import power_ratio_db

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)
# a BatchNormalization that no convolution could take up: 8 bits for all channels cost accuracy, gain no time
FLOAT_OPS = {"BatchNormalization"}
VERIFIED_INPUTS = 32  # calibration inputs that the finished file must answer
HOLDOUT_EVERY, MAX_HOLDOUT = 4, 256  # one batch in so many is held out to compare ranges; at most about so many inputs


@dataclass(frozen=True)
class Int8Options:
    """How an INT8 file is written, beside the ranges of its tensors."""

    scheme: QuantScheme
    keep_float: tuple[str, ...] = ()  # layers, as `select_layers` reads their names
    bias_correction: bool = False

    @classmethod
    def of(cls, scheme: QuantScheme, config: QuantizeConfig) -> Int8Options:
        """Return the options that `config` names for a target's scheme. Raises as `scheme_for`."""
        return cls(scheme_for(scheme, config), config.keep_float, config.bias_correction)

    def as_onnx(self) -> Int8Options:
        """Return the options for an ONNX file, see `onnx_scheme`."""
        return replace(self, scheme=onnx_scheme(self.scheme))


def quantize(out: Path, model: Exported, images: File, scheme: QuantScheme, config: QuantizeConfig) -> Exported:
    """Write both files of `model` in INT8, with the same ranges: calibrated once, one image at a time.

    Raises:
        ModelError: the files cannot be quantized.
        DataError: the calibration images do not fit.
    """
    inputs = load_calibration(images.path, model.single.input)  # below: tensors may be constants in the other file
    options = Int8Options.of(scheme, config)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        prepared = prepare_files(Path(folder), model, images, config) if config.rescales else model
        ranges = select_ranges(prepared.dynamic.file.path, inputs, options, config)
        return write_int8_files(out, prepared, images, ranges, options)


def write_int8_files(out: Path, model: Exported, images: File, ranges: Ranges, options: Int8Options) -> Exported:
    """Write both files of `model` in INT8 into `out`; `images` are the calibration images. Raises as `quantize`."""
    inputs = load_calibration(images.path, model.single.input)
    name = f"{model.single.name}-int8"
    single = write_int8(model.single.file.path, out / f"{name}.onnx", inputs, ranges, options)
    dynamic = write_int8(model.dynamic.file.path, out / f"{name}-dynamic.onnx", inputs, ranges, options, single.macs)
    return Exported(single, dynamic)


def quantize_file(
    model: Path, target: Path, inputs: np.ndarray, scheme: QuantScheme, config: QuantizeConfig
) -> OnnxModel:
    """Write the FP32 ONNX file `model`, of any origin, as INT8 to `target`.

    `target` is written only when the new file is verified. `inputs` are calibration inputs, (N, ...), for the only
    input of the network.

    Raises:
        ModelError: the file cannot be quantized.
        DataError: the inputs do not fit.
        ConfigError: `target` is `model`, or options do not go together.
    """
    if target.exists() and model.exists() and target.samefile(model):
        raise ConfigError(f"`{target}` would take the place of its own FP32 file", hint="name another file to write")
    options = Int8Options.of(scheme, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=target.parent) as folder:  # beside it: a rename, not a copy
        source = prepare_file(model, Path(folder, "fp32", model.name), inputs, config) if config.rescales else model
        ranges = select_ranges(source, inputs, options, config)
        int8 = write_int8(source, Path(folder, target.name), inputs, ranges, options)
        int8.file.path.replace(target)
    return replace(int8, file=File.of(target))


def select_ranges(path: Path, inputs: np.ndarray, options: Int8Options, config: QuantizeConfig) -> Ranges:
    """Return the ranges of the FP32 file `path` on `inputs`, (N, ...), by the method that `config` names.

    With `auto`, every 4th batch, or fewer of many, is held out, and the method whose INT8 file has the least error on
    them is selected. Raises as `quantize_file`.
    """
    if config.method != "auto":
        return calibrate(path, inputs, config)
    size = check_batches(path, check_quantizable(path), inputs)
    every = max(HOLDOUT_EVERY, len(inputs) // MAX_HOLDOUT)
    held_out = [inputs[i : i + size] for i in range((HOLDOUT_EVERY - 1) * size, len(inputs), every * size)]
    if not held_out:
        raise ConfigError(
            f"the method `auto` holds out every {HOLDOUT_EVERY}th batch, and there are {len(inputs) // size}",
            hint=f"give {HOLDOUT_EVERY * size} inputs or more, or name a method",
        )
    holdout = np.concatenate(held_out)
    others = [i for i in range(len(inputs) // size) if i % every != HOLDOUT_EVERY - 1]
    picks = np.linspace(0, len(others) - 1, min(len(others), MAX_HOLDOUT)).astype(int)
    rest = np.concatenate([inputs[others[i] * size : (others[i] + 1) * size] for i in picks])
    exact = run_model(path, holdout)
    candidates = calibrate_methods(path, inputs, config, lambda number: number % every != HOLDOUT_EVERY - 1)

    def score(ranges: Ranges) -> float:
        with TemporaryDirectory(prefix="edgekd-") as folder:
            int8 = write_int8(path, Path(folder, "int8.onnx"), rest, ranges, options.as_onnx())
            return snr_db(exact, run_model(int8.file.path, holdout))

    best = best_ranges(candidates, score)
    scores = ", ".join(f"{method} {ratio:.1f} dB" for method, ratio in best.scores.items())
    log.info("ranges by %s (signal-to-noise ratio in INT8, %d inputs held out: %s)", best.method, len(holdout), scores)
    return best


def onnx_scheme(scheme: QuantScheme) -> QuantScheme:
    """Return the scheme, or for a network that stays float the one whose ONNX file computes most like it."""
    return replace(scheme, format="qdq_explicit") if scheme.format == "calibration_cache" else scheme


def snr_db(exact: np.ndarray, output: np.ndarray) -> float:
    """Return the power of `exact` to that of its difference to `output`, in dB; at most 120."""
    signal, noise = (float((array.astype(np.float64) ** 2).sum()) for array in (exact, output - exact))
    return power_ratio_db(signal, noise)


def write_int8(
    path: Path, target: Path, inputs: np.ndarray, ranges: Ranges, options: Int8Options, macs: int | None = None
) -> OnnxModel:
    """Write the FP32 file `path` in INT8 to `target` and verify it. Opset, IR version and metadata stay as they are.

    Args:
        path: an FP32 ONNX file.
        target: the file to write.
        inputs: (N, ...); with bias correction, they must be the calibration inputs.
        ranges: the ranges of all float tensors of `path`.
        options: the scheme, the layers that stay float, and whether biases are corrected.
        macs: multiply-accumulates, needed where the file computes with its batch size, so that they are not countable.

    Raises: ModelError if the file cannot be quantized, ConfigError if the scheme has no ONNX file.
    """
    import onnx

    check_quantizable(path)
    scheme = options.scheme
    if scheme.format == "calibration_cache":
        raise ConfigError(
            f"the format `{scheme.format}` has no INT8 ONNX file: the network stays float",
            hint="write its calibration cache, `edgekd quantize --scheme dla`",
        )
    original = onnx.load(str(path), load_external_data=False)
    model = load_prepared(path)
    explicit = scheme.format == "qdq_explicit"
    bounds = propagate_bounds(ranges.bounds_for(scheme.symmetric_activation), model.graph)
    float_outputs = float_node_outputs(model, options.keep_float, float_adds=explicit)

    def quantized(network: onnx.ModelProto) -> onnx.ModelProto:
        if explicit:
            return quantize_explicit(network, bounds, scheme.per_channel, float_outputs)
        return quantize_ort(network, bounds, scheme, float_outputs)

    try:
        int8 = quantized(model)
        if options.bias_correction:
            int8 = quantized(correct_biases(load_prepared(path), int8, inputs, float_outputs))
    except ValueError as error:
        writer = "edgekd" if explicit else "onnxruntime"
        raise ModelError(f"{writer} cannot quantize `{path}`: {error}", hint="calibrate this very file") from error
    int8.ir_version = original.ir_version
    onnx_writer.write(int8, target, {entry.key: entry.value for entry in original.metadata_props})
    verify(path, target, inputs)
    described = inspect.describe(target, target.stem, macs)
    if described.precision != "int8":
        raise ModelError(
            f"of `{path}` no layer could be quantized", hint="give an FP32 file: weights of another type are not read"
        )
    return described


def quantize_ort(
    model: onnx.ModelProto,
    bounds: Mapping[str, Bounds],
    scheme: QuantScheme,
    float_outputs: Collection[str] = (),
) -> onnx.ModelProto:
    """Return `model` in INT8 as onnxruntime executes it fastest; operators that compute `float_outputs` stay float.

    Raises: ValueError if a tensor has no range.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData, TensorsData
    from onnxruntime.quantization.calibrate import CalibrationMethod
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    ranges = {n: TensorData(lowest=np.float32(a), highest=np.float32(b)) for n, (a, b) in bounds.items()}
    float_nodes = [node for node in model.graph.node if node.output[0] in float_outputs]
    for node in float_nodes:  # the quantizer takes names, and some exporters give none
        node.name = node.name or node.output[0]
    quantizer = QDQQuantizer(
        model,
        scheme.per_channel,
        scheme.reduce_range,
        QuantType.QInt8,
        QuantType.QInt8 if scheme.activation == "int8" else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[],
        nodes_to_exclude=[node.name for node in float_nodes],
        op_types_to_quantize=sorted({*QLinearOpsRegistry, *QDQRegistry} - FLOAT_OPS),
        extra_options={"ActivationSymmetric": scheme.symmetric_activation, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # new nodes were appended at the end
    int8: onnx.ModelProto = quantizer.model.model
    prevent_ort_requantize(int8, float_outputs)
    return int8


def verify(path: Path, target: Path, inputs: np.ndarray) -> None:
    """Raise ModelError unless `target` is valid, kept the interface of `path`, and has finite outputs for `inputs`."""
    before, after = inspect.facts(path), inspect.check(target)
    interface = (before.input, before.outputs, before.opset, before.ir)
    new_interface = (after.input, after.outputs, after.opset, after.ir)
    if interface != new_interface:
        raise ModelError(
            f"quantization changed the interface of `{path}` from {interface} to {new_interface}",
            hint="report it with the file",
        )
    batch = before.input.shape[0] or 1
    outputs = run_model(target, inputs[: batch * max(VERIFIED_INPUTS // batch, 1)])
    if not np.isfinite(outputs).all():
        raise ModelError(
            f"`{target.name}` answers calibration inputs with numbers that are not finite",
            hint="look for weights that are not finite in the FP32 file",
        )
