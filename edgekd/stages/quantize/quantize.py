"""Quantize: FP32 ONNX to static INT8 with Q/DQ nodes, in the dialect of a target; for files of any origin."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import Exported, File, OnnxModel
from edgekd.core.quant_scheme import Dialect
from edgekd.errors import ConfigError, ModelError
from edgekd.onnx import inspect, session
from edgekd.onnx import writer as onnx_writer
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.quantize.bias_correction import corrected
from edgekd.stages.quantize.float_layers import shield, staying
from edgekd.stages.quantize.preparation import dialect_for, prepare, prepare_file
from edgekd.stages.quantize.qdq import explicit
from edgekd.stages.quantize.ranges import (
    QuantizeConfig,
    Ranges,
    best,
    calibrate,
    candidates,
    check_batches,
    completed,
    prepared,
    quantizable,
)

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)
FLOAT = {
    "BatchNormalization"
}  # one that no convolution could take up: 8 bits for all channels cost accuracy, gain no time
TRIED = 32  # calibration inputs that the finished file must answer
HELD, JUDGES = 4, 256  # one in so many batches judges ranges where no labels do; at most about so many inputs
NO_ERROR_DB = 120.0


def quantize(out: Path, model: Exported, images: File, dialect: Dialect, config: QuantizeConfig) -> Exported:
    """Both files of `model` in INT8, with the same ranges: calibrated once, one image at a time.

    Raises ModelError if the files cannot be quantized, DataError if the calibration images do not fit.
    """
    inputs = load_calibration(images.path, model.single.input)  # below: tensors may be constants in the other file
    dialect = dialect_for(dialect, config)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        suited = prepare(Path(folder), model, images, config) if config.rescales else model
        ranges = settled(suited.dynamic.file.path, inputs, dialect, config)
        return quantize_with(out, suited, images, dialect, ranges, config.floats, config.correct_bias)


def quantize_with(
    out: Path,
    model: Exported,
    images: File,
    dialect: Dialect,
    ranges: Ranges,
    floats: Collection[str] = (),
    correct_bias: bool = False,
) -> Exported:
    """Both files of `model` in INT8 but for the layers `floats`; `ranges` serve all dialects. Raises as `quantize`."""
    inputs = load_calibration(images.path, model.single.input)
    name = f"{model.single.name}-int8"
    one, many = out / f"{name}.onnx", out / f"{name}-dynamic.onnx"
    single = convert(model.single.file.path, one, inputs, dialect, ranges, None, floats, correct_bias)
    dynamic = convert(model.dynamic.file.path, many, inputs, dialect, ranges, single.macs, floats, correct_bias)
    return Exported(single, dynamic)


def quantize_file(model: Path, target: Path, inputs: np.ndarray, dialect: Dialect, config: QuantizeConfig) -> OnnxModel:
    """The FP32 ONNX file `model`, of any origin, as INT8 in `target`. `inputs` are (N, ...) for its only input.

    `target` is written only when the new file is proven to answer. Raises ModelError if the file cannot be quantized,
    DataError if the inputs do not fit, ConfigError if `target` is `model`.
    """
    if target.exists() and model.exists() and target.samefile(model):
        raise ConfigError(f"`{target}` would take the place of its own FP32 file", hint="name another file to write")
    dialect = dialect_for(dialect, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=target.parent) as folder:  # beside it: a rename, not a copy
        source = prepare_file(model, Path(folder, "fp32", model.name), inputs, config) if config.rescales else model
        ranges = settled(source, inputs, dialect, config)
        kept = (config.floats, config.correct_bias)
        made = convert(source, Path(folder, target.name), inputs, dialect, ranges, None, *kept)
        made.file.path.replace(target)
    return replace(made, file=File.of(target))


def settled(path: Path, inputs: np.ndarray, dialect: Dialect, config: QuantizeConfig) -> Ranges:
    """The ranges of the FP32 file `path` on `inputs`, (N, ...), by the method that `config` names.

    For `auto`, by the one whose INT8 file in `dialect` answers inputs that its ranges do not know with the least error:
    every 4th batch, or fewer of many, is held out. Raises as `quantize_file` does.
    """
    if config.method != "auto":
        return calibrate(path, inputs, config)
    step = check_batches(path, quantizable(path), inputs)
    every = max(HELD, len(inputs) // JUDGES)
    judges = [inputs[i : i + step] for i in range((HELD - 1) * step, len(inputs), every * step)]
    if not judges:
        raise ConfigError(
            f"the method `auto` holds out every {HELD}th batch to judge by, and here are {len(inputs) // step}",
            hint=f"give {HELD * step} inputs or more, or name a method",
        )
    held = np.concatenate(judges)
    others = [i for i in range(len(inputs) // step) if i % every != HELD - 1]
    some = np.linspace(0, len(others) - 1, min(len(others), JUDGES)).astype(int)
    rest = np.concatenate([inputs[others[i] * step : (others[i] + 1) * step] for i in some])
    want = session.answers(path, held)
    found = candidates(path, inputs, config, lambda number: number % every != HELD - 1)

    def grade(ranges: Ranges) -> float:
        with TemporaryDirectory(prefix="edgekd-") as folder:
            asked = (in_pairs(dialect), ranges, None, config.floats, config.correct_bias)
            made = convert(path, Path(folder, "int8.onnx"), rest, *asked)
            return ratio_db(want, session.answers(made.file.path, held))

    chosen = best(found, grade)
    told = ", ".join(f"{method} {ratio:.1f} dB" for method, ratio in chosen.tried.items())
    log.info("ranges by %s (answers to their error in INT8, %d inputs held out: %s)", chosen.method, len(held), told)
    return chosen


def in_pairs(dialect: Dialect) -> Dialect:
    """The dialect, or of a network that itself stays float the one whose ONNX file computes most like it."""
    return replace(dialect, form="pairs") if dialect.form == "cache" else dialect


def ratio_db(want: np.ndarray, got: np.ndarray) -> float:
    """The power of the answers `want` to that of their difference to `got`, in dB; at most 120."""
    signal, noise = (float((array.astype(np.float64) ** 2).sum()) for array in (want, got - want))
    return min(NO_ERROR_DB, 10 * math.log10(signal / noise)) if signal and noise else NO_ERROR_DB * (not noise)


def convert(
    path: Path,
    target: Path,
    inputs: np.ndarray,
    dialect: Dialect,
    ranges: Ranges,
    macs: int | None = None,
    floats: Collection[str] = (),
    correct_bias: bool = False,
) -> OnnxModel:
    """Write `path` in INT8 to `target` and try it on `inputs`. Opset, IR version and metadata stay as they are.

    `macs` are needed where the file computes with its batch size, so that they cannot be counted. `floats` are the
    layers that stay float, as `floats.chosen` reads them. With `correct_bias`, `inputs` must be calibration inputs.
    """
    import onnx

    quantizable(path)
    if dialect.form == "cache":
        raise ConfigError(
            f"the form `{dialect.form}` is no ONNX file: the network stays as it is",
            hint="write its calibration cache, `edgekd quantize --dialect dla`",
        )
    original = onnx.load(str(path), load_external_data=False)
    model = prepared(path)
    bounds = completed(ranges.serving(dialect.symmetric_activation), model.graph)
    kept = staying(model.graph, floats, adds=dialect.form == "pairs")

    def rounded(network: onnx.ModelProto) -> onnx.ModelProto:
        if dialect.form == "pairs":
            return explicit(network, bounds, dialect.per_channel, kept)
        return integers(network, bounds, dialect, kept)

    try:
        made = rounded(model)
        if correct_bias:
            made = rounded(corrected(prepared(path), made, inputs, kept))
    except ValueError as error:
        writer = "edgekd" if dialect.form == "pairs" else "onnxruntime"
        raise ModelError(f"{writer} cannot quantize `{path}`: {error}", hint="calibrate this very file") from error
    made.ir_version = original.ir_version
    onnx_writer.write(made, target, {entry.key: entry.value for entry in original.metadata_props})
    try_out(path, target, inputs)
    found = inspect.described(target, target.stem, macs)
    if found.precision != "int8":
        raise ModelError(
            f"of `{path}` no layer could be quantized", hint="give an FP32 file: weights of another type are not taken"
        )
    return found


def integers(
    model: onnx.ModelProto,
    bounds: Mapping[str, tuple[float, float]],
    dialect: Dialect,
    kept: Collection[str] = (),
) -> onnx.ModelProto:
    """`model` as onnxruntime executes it fastest, but for operators with an output in `kept`, which stay float.

    Raises ValueError if a tensor has no range.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData, TensorsData
    from onnxruntime.quantization.calibrate import CalibrationMethod
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    known = {n: TensorData(lowest=np.float32(a), highest=np.float32(b)) for n, (a, b) in bounds.items()}
    floating = [node for node in model.graph.node if node.output[0] in kept]
    for node in floating:  # the quantizer takes names, and some exporters give none
        node.name = node.name or node.output[0]
    quantizer = QDQQuantizer(
        model,
        dialect.per_channel,
        dialect.reduce_range,
        QuantType.QInt8,
        QuantType.QInt8 if dialect.activation == "int8" else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, known),
        nodes_to_quantize=[],
        nodes_to_exclude=[node.name for node in floating],
        op_types_to_quantize=sorted({*QLinearOpsRegistry, *QDQRegistry} - FLOAT),
        extra_options={"ActivationSymmetric": dialect.symmetric_activation, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # new nodes were appended at the end
    made: onnx.ModelProto = quantizer.model.model
    shield(made.graph, kept)
    return made


def try_out(path: Path, target: Path, inputs: np.ndarray) -> None:
    """Raises ModelError unless `target` is valid, kept its form, and answers calibration inputs with finite numbers."""
    before, after = inspect.facts(path), inspect.check(target)
    kept = (before.input, before.outputs, before.opset, before.ir)
    found = (after.input, after.outputs, after.opset, after.ir)
    if kept != found:
        raise ModelError(
            f"quantization changed the form of `{path}` from {kept} to {found}", hint="report it with the file"
        )
    batch = before.input.shape[0] or 1
    answers = session.answers(target, inputs[: batch * max(TRIED // batch, 1)])
    if not np.isfinite(answers).all():
        raise ModelError(
            f"`{target.name}` answers calibration inputs with numbers that are not finite",
            hint="look for weights that are not finite in the FP32 file",
        )
