"""Quantize: FP32 ONNX to static INT8 with Q/DQ nodes, in the dialect of a target; for files of any origin."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.core import onnx_facts, onnx_files, progress
from edgekd.core.artifact import File, OnnxModel
from edgekd.core.errors import ConfigError, ModelError
from edgekd.core.onnx_facts import Exported, OnnxFacts
from edgekd.core.settings import Settings
from edgekd.core.target import Dialect
from edgekd.stages.calibrate import check_inputs, load_calibration
from edgekd.stages.explicit import WEIGHTED, explicit

if TYPE_CHECKING:
    import onnx

LOWEST_OPSET = 13  # Q/DQ with a scale per channel
FLOAT = {
    "BatchNormalization"
}  # one that no convolution could take up: 8 bits for all channels cost accuracy, gain no time
TRIED = 32  # calibration inputs that the finished file must answer
CHUNK = 8  # batches whose activations are in memory at once
BINS = 512  # of a histogram for `entropy`; onnxruntime's own 128 leave it one candidate, the full range


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """How ranges are found: the extremes seen; the mean of each input's extremes (`moving_average`, as onnxruntime
    calls it); all but a share of the values; or those with the least Kullback-Leibler divergence after rounding."""

    method: Literal["minmax", "moving_average", "percentile", "entropy"] = "minmax"
    percentile: float = 99.99  # share of the values that `percentile` keeps

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}", hint="use a percentage above 50, such as 99.99")


@dataclass(frozen=True)
class Ranges:
    """The range of every float tensor of a network; the same for all dialects."""

    bounds: dict[str, tuple[float, float]]  # by tensor name: lowest, highest


def quantize(out: Path, model: Exported, images: File, dialect: Dialect, config: QuantizeConfig) -> Exported:
    """Both files of `model` in INT8, with the same ranges: calibrated once, one image at a time.

    Raises ModelError if the files cannot be quantized, DataError if the calibration images do not fit.
    """
    return quantize_with(out, model, images, dialect, ranges_of(out, model, images, config))


def ranges_of(out: Path, model: Exported, images: File, config: QuantizeConfig) -> Ranges:
    """The statistics of one network for all dialects, from one pass over the calibration images.

    Writes nothing into `out`: as a step of the ledger, it is kept there. Raises as `quantize` does.
    """
    inputs = load_calibration(images.path, model.single.input)
    return calibrate(model.dynamic.file.path, inputs, config)  # some of its tensors are constants in the other


def quantize_with(out: Path, model: Exported, images: File, dialect: Dialect, ranges: Ranges) -> Exported:
    """Both files of `model` in INT8; `ranges` serve all dialects. Raises as `quantize` does."""
    inputs = load_calibration(images.path, model.single.input)
    name = f"{model.single.name}-int8"
    single = convert(model.single.file.path, out / f"{name}.onnx", inputs, dialect, ranges)
    dynamic = convert(model.dynamic.file.path, out / f"{name}-dynamic.onnx", inputs, dialect, ranges, single.macs)
    return Exported(single, dynamic)


def quantize_file(model: Path, target: Path, inputs: np.ndarray, dialect: Dialect, config: QuantizeConfig) -> OnnxModel:
    """The FP32 ONNX file `model`, of any origin, as INT8 in `target`. `inputs` are (N, ...) for its only input.

    `target` is written only when the new file is proven to answer. Raises ModelError if the file cannot be quantized,
    DataError if the inputs do not fit, ConfigError if `target` is `model`.
    """
    if target.exists() and model.exists() and target.samefile(model):
        raise ConfigError(f"`{target}` would take the place of its own FP32 file", hint="name another file to write")
    ranges = calibrate(model, inputs, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=target.parent) as folder:  # beside it: a rename, not a copy
        made = convert(model, Path(folder, target.name), inputs, dialect, ranges)
        made.file.path.replace(target)
    return replace(made, file=File.of(target))


def calibrate(path: Path, inputs: np.ndarray, config: QuantizeConfig) -> Ranges:
    """The ranges of all float tensors of the prepared model, on `inputs`. Raises as `quantize_file` does."""
    import onnx
    from onnxruntime.quantization import create_calibrator
    from onnxruntime.quantization.calibrate import CalibrationMethod

    facts = quantizable(path)
    check_inputs(inputs, facts.input, "the calibration set")
    batch = facts.input.shape[0] or 1
    if len(inputs) % batch:
        raise ModelError(
            f"`{path}` takes {batch} inputs at once, and {len(inputs)} calibration inputs are no multiple of it",
            hint=f"give {len(inputs) // batch * batch or batch} inputs, or export with batch 1",
        )
    kinds: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
        "minmax": (CalibrationMethod.MinMax, {}),
        "moving_average": (CalibrationMethod.MinMax, {"moving_average": True}),
        "percentile": (CalibrationMethod.Percentile, {"percentile": config.percentile, "symmetric": False}),
        "entropy": (CalibrationMethod.Entropy, {"num_bins": BINS, "num_quantized_bins": 128}),
    }
    method, options = kinds[config.method]
    # an average must see all at once: onnxruntime gives every later chunk a weight of 1 %; it keeps two numbers each
    step = len(inputs) if config.method == "moving_average" else batch * CHUNK
    with TemporaryDirectory(prefix="edgekd-") as folder, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # an error below
        onnx.save(prepared(path), f"{folder}/model.onnx")
        calibrator = create_calibrator(
            Path(folder, "model.onnx"), None, f"{folder}/augmented.onnx", method, extra_options=options
        )
        with progress.bar("calibration images", len(inputs)) as advance:
            for start in range(0, len(inputs), step):
                calibrator.collect_data(Feed(facts.input.name, inputs[start : start + step], batch, advance))
        found = calibrator.compute_data()
    bounds = {name: (data.lowest.item(), data.highest.item()) for name, data in sorted(found.items())}
    broken = [name for name, pair in bounds.items() if not np.isfinite(pair).all()]
    if broken:
        raise ModelError(
            f"`{path}` computes numbers that are not finite on the calibration inputs, in the tensor `{broken[0]}`",
            hint="look for weights that are not finite, or a training that diverged",
        )
    return Ranges(bounds)


class Feed:
    """Calibration inputs a batch at a time, as onnxruntime asks for them."""

    def __init__(self, name: str, inputs: np.ndarray, batch: int, advance: progress.Advance) -> None:
        self.batches = self.cut(name, inputs, batch, advance)

    def cut(
        self, name: str, inputs: np.ndarray, batch: int, advance: progress.Advance
    ) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(inputs), batch):
            yield {name: inputs[start : start + batch]}
            advance(batch)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantizable(path: Path) -> OnnxFacts:
    """The facts of a file that can be quantized. Raises ModelError if it cannot."""
    facts = onnx_facts.facts(path)
    if facts.precision == "int8":
        raise ModelError(f"`{path}` is quantized already", hint="give the FP32 file that it was made from")
    if not set(WEIGHTED) & set(facts.nodes):
        raise ModelError(
            f"`{path}` has nothing to quantize: no {', '.join(WEIGHTED[:-1])} or {WEIGHTED[-1]}",
            hint=f"it holds {', '.join(facts.nodes)}; give a network with convolutions or matrix products",
        )
    if facts.opset < LOWEST_OPSET:
        raise ModelError(
            f"`{path}` has opset {facts.opset}, but INT8 with a scale per channel needs {LOWEST_OPSET}",
            hint=f"export it with opset {LOWEST_OPSET} or more, or use onnx.version_converter",
        )
    return facts


def prepared(path: Path) -> onnx.ModelProto:
    """The model with constants and BatchNorms folded and shapes known: files of other exporters often need it."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx_facts.session(path)  # what onnxruntime cannot load raises here, with its reason
    with TemporaryDirectory(prefix="edgekd-") as folder:
        quant_pre_process(path, f"{folder}/folded.onnx", skip_symbolic_shape=True)
        return onnx.load(f"{folder}/folded.onnx")


def convert(
    path: Path, target: Path, inputs: np.ndarray, dialect: Dialect, ranges: Ranges, macs: int | None = None
) -> OnnxModel:
    """Write `path` in INT8 to `target` and try it on `inputs`. Opset, IR version and metadata stay as they are.

    `macs` are needed where the file computes with its batch size, so that they cannot be counted.
    """
    import onnx

    quantizable(path)
    if dialect.form == "cache":
        raise ConfigError(
            f"the form `{dialect.form}` is no ONNX file: the network stays as it is",
            hint="write its calibration cache, `edgekd quantize --dialect dla`",
        )
    original = onnx.load(str(path), load_external_data=False)
    try:
        if dialect.form == "pairs":
            made = explicit(prepared(path), ranges.bounds, dialect.per_channel)
        else:
            made = integers(prepared(path), ranges.bounds, dialect)
    except ValueError as error:
        writer = "edgekd" if dialect.form == "pairs" else "onnxruntime"
        raise ModelError(f"{writer} cannot quantize `{path}`: {error}", hint="calibrate this very file") from error
    made.ir_version = original.ir_version
    onnx_files.write(made, target, {entry.key: entry.value for entry in original.metadata_props})
    try_out(path, target, inputs)
    return onnx_facts.described(target, target.stem, macs)


def integers(model: onnx.ModelProto, bounds: Mapping[str, tuple[float, float]], dialect: Dialect) -> onnx.ModelProto:
    """`model` as onnxruntime executes it fastest. Raises ValueError if a tensor has no range."""
    from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData, TensorsData
    from onnxruntime.quantization.calibrate import CalibrationMethod
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    known = {n: TensorData(lowest=np.float32(a), highest=np.float32(b)) for n, (a, b) in bounds.items()}
    quantizer = QDQQuantizer(
        model,
        dialect.per_channel,
        dialect.reduce_range,
        QuantType.QInt8,
        QuantType.QInt8 if dialect.activation == "int8" else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, known),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({*QLinearOpsRegistry, *QDQRegistry} - FLOAT),
        extra_options={"ActivationSymmetric": dialect.symmetric_activation, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # new nodes were appended at the end
    made: onnx.ModelProto = quantizer.model.model
    return made


def try_out(path: Path, target: Path, inputs: np.ndarray) -> None:
    """Raises ModelError unless `target` is valid, kept its form, and answers calibration inputs with finite numbers."""
    before, after = onnx_facts.facts(path), onnx_facts.check(target)
    kept = (before.input, before.outputs, before.opset, before.ir)
    found = (after.input, after.outputs, after.opset, after.ir)
    if kept != found:
        raise ModelError(
            f"quantization changed the form of `{path}` from {kept} to {found}", hint="report it with the file"
        )
    batch = before.input.shape[0] or 1
    answers = onnx_facts.answers(target, inputs[: batch * max(TRIED // batch, 1)])
    if not np.isfinite(answers).all():
        raise ModelError(
            f"`{target.name}` answers calibration inputs with numbers that are not finite",
            hint="look for weights that are not finite in the FP32 file",
        )
