"""Calibration: the range of every float tensor of a network; one pass over the images serves all schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from edgekd.core.artifact import NOT_IN_KEY, Exported, File
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.onnx import inspect
from edgekd.onnx.exact_sums import exact_entries
from edgekd.onnx.inputs import batches, check_inputs, load_calibration
from edgekd.onnx.inspect import OnnxFacts
from edgekd.onnx.ops import WEIGHTED
from edgekd.onnx.session import open_session
from edgekd.stages.quantize import histogram
from edgekd.stages.quantize.histogram import Histogram
from edgekd.utils import progress
from edgekd.utils.external import external_code

if TYPE_CHECKING:
    import onnx

LOWEST_OPSET = 13  # Q/DQ with a scale per channel
Bounds: TypeAlias = tuple[float, float]
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")  # the same numbers
METHODS = ("minmax", "moving_average", "percentile", "entropy", "mse")  # the first of equals is selected


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """How networks are quantized.

    `method` is how ranges are computed: the extremes (`minmax`); the mean of each batch's extremes (`moving_average`,
    as onnxruntime names it); all but a fraction of the values (`percentile`); the range with the least Kullback-Leibler
    divergence (`entropy`) or the least mean squared error (`mse`) after rounding; or the most accurate of these
    (`auto`).
    """

    method: Literal["minmax", "moving_average", "percentile", "entropy", "mse", "auto"] = "minmax"
    percentile: float = 99.99  # percentage of the values that `percentile` keeps
    keep_float: tuple[str, ...] = ()  # layers that stay float: their names, or `first` and `last`
    # points of validation accuracy that INT8 may lose: layers are left float until it loses no more; null: no limit.
    # Methods that train with a quantization spec ignore it
    max_drop: float | None = field(default=None, metadata=NOT_IN_KEY)
    cross_layer_equalization: bool = False  # scale channels until the weights on both sides have equal ranges
    smoothquant_alpha: float = 0.0  # how much of the activations' outliers moves into the weights; 0: none
    bias_correction: bool = False  # subtract the mean error of rounded weights from the biases
    per_channel: bool | None = None  # a scale for each output channel of a weight, or one; null: the target's

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < 100:
            raise ConfigError(f"max_drop is {self.max_drop}", hint="use points of accuracy, such as 0.5")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}", hint="use a percentage above 50, such as 99.99")
        if not 0 <= self.smoothquant_alpha < 1:
            raise ConfigError(
                f"smoothquant_alpha is {self.smoothquant_alpha}", hint="use a number from 0 to below 1; 0.5 is usual"
            )

    @property
    def rescales(self) -> bool:
        """Whether channels are scaled before the calibration."""
        return self.cross_layer_equalization or self.smoothquant_alpha > 0

    @property
    def changes_weights(self) -> bool:
        """Whether INT8 files hold other numbers than the FP32 file, rounded."""
        return self.rescales or self.bias_correction

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to calibrate by."""
        return METHODS if self.method == "auto" else (self.method,)


@dataclass(frozen=True)
class Ranges:
    """The range of every float tensor of a network, for every INT8 scheme."""

    bounds: dict[str, Bounds]  # by tensor name: lowest, highest
    # largest magnitude for signed symmetric INT8, where it is not that of the bounds: a tensor that is never negative
    # has half the steps there, and is better clipped elsewhere
    limits: dict[str, float] = field(default_factory=dict)
    method: str = field(default="", metadata=NOT_IN_KEY)
    scores: dict[str, float] = field(default_factory=dict, metadata=NOT_IN_KEY)  # by method, where one was selected
    session_config: dict[str, str] = field(default_factory=dict, metadata=NOT_IN_KEY)  # of the onnxruntime that scored

    def bounds_for(self, symmetric: bool) -> dict[str, Bounds]:
        """Return the bounds of every tensor for INT8 with a zero point, or symmetric."""
        if not symmetric:
            return self.bounds
        limits = {name: self.limits.get(name, max(map(abs, pair))) for name, pair in self.bounds.items()}
        return {name: (-limit, limit) for name, limit in limits.items()}


@dataclass
class TensorStats:
    """Statistics of a tensor over the images so far; of a fixed size, however many they are."""

    lowest: float = np.inf
    highest: float = -np.inf
    low_sum: float = 0.0  # of the lowest values of all batches
    high_sum: float = 0.0
    batches: int = 0
    histogram: Histogram | None = None

    def add(self, values: np.ndarray) -> bool:
        """Add the values of one batch. Return False, and change nothing, if some are not finite."""
        lowest, highest = float(values.min()), float(values.max())
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            return False
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        self.low_sum, self.high_sum, self.batches = self.low_sum + lowest, self.high_sum + highest, self.batches + 1
        if self.histogram:
            self.histogram.add(values.astype(np.float32, copy=False), max(-lowest, highest))
        return True


def calibrate_step(out: Path, model: Exported, images: File, config: QuantizeConfig) -> Ranges:
    """Calibrate a network by the one method of `config`, as a step of the cache. Raises as `calibrate`."""
    return only_candidate(calibrate_methods_step(out, model, images, config))


def calibrate_methods_step(out: Path, model: Exported, images: File, config: QuantizeConfig) -> dict[str, Ranges]:
    """Calibrate a network by every method of `config`, as a step of the cache: nothing is written into `out`."""
    inputs = load_calibration(images.path, model.single.input)
    return calibrate_methods(model.dynamic.file.path, inputs, config)  # the other file has some tensors as constants


def calibrate(path: Path, inputs: np.ndarray, config: QuantizeConfig) -> Ranges:
    """Return the ranges of all float tensors of the prepared model on `inputs`, (N, ...), by the method of `config`.

    Raises:
        ModelError: the file cannot be quantized.
        DataError: the inputs do not fit.
        ConfigError: the method is `auto`.
    """
    return only_candidate(calibrate_methods(path, inputs, config))


def only_candidate(candidates: dict[str, Ranges]) -> Ranges:
    """Return the only ranges. Raises ConfigError if there are several."""
    if len(candidates) > 1:
        raise ConfigError(
            f"the method `auto` leaves {len(candidates)} to select from, but there is nothing to compare them by",
            hint=f"set one: {', '.join(METHODS)}",
        )
    return next(iter(candidates.values()))


def calibrate_methods(
    path: Path, inputs: np.ndarray, config: QuantizeConfig, use_batch: Callable[[int], bool] = lambda number: True
) -> dict[str, Ranges]:
    """Return the ranges by every method of `config`, in the order of METHODS, from one pass over the inputs.

    Only the activations of one batch are in memory. `use_batch` says which batches count. Raises as `calibrate`.
    """
    facts = check_quantizable(path)
    size = check_batches(path, facts, inputs)
    count = size * sum(map(use_batch, range(len(inputs) // size)))
    needs_histogram = not {"minmax", "moving_average"}.issuperset(config.methods)
    stats: dict[str, TensorStats] = {}
    with TemporaryDirectory(prefix="edgekd-") as folder:
        exposed = Path(folder, "exposed.onnx")
        names = write_exposed(load_prepared(path), facts.input.name, exposed)
        session = open_session(exposed)
        with progress.progress_bar("calibration images", count) as advance:
            for number, part in enumerate(batches(inputs, size)):
                if not use_batch(number):
                    continue
                batch = np.asarray(part)
                outputs = session.run(names, {facts.input.name: batch})
                # an input that is also an output would be given back as what the next run overwrites
                for name, values in {facts.input.name: batch, **dict(zip(names, outputs, strict=True))}.items():
                    tensor = stats.setdefault(name, TensorStats(histogram=Histogram() if needs_histogram else None))
                    if values.size and not tensor.add(values):
                        raise not_finite(path, name)
                advance(size)
    image = stats[facts.input.name]
    if image.lowest == image.highest:
        raise DataError(
            f"the calibration set holds nothing but the number {image.lowest:g}",
            hint="give real inputs, scaled as in training; ranges of constant ones are useless",
        )
    return {method: ranges_by(method, stats, config.percentile) for method in config.methods}


def check_batches(path: Path, facts: OnnxFacts, inputs: np.ndarray) -> int:
    """Return the batch size of the model. Raises DataError or ModelError if the inputs do not fit it."""
    check_inputs(inputs, facts.input, "the calibration set")
    batch = facts.input.shape[0] or 1
    if len(inputs) % batch:
        raise ModelError(
            f"`{path}` takes {batch} inputs at once, and {len(inputs)} calibration inputs are no multiple of it",
            hint=f"give {len(inputs) // batch * batch or batch} inputs, or export with batch 1",
        )
    return batch


def write_exposed(model: onnx.ModelProto, input_name: str, target: Path) -> list[str]:
    """Write the model with every float tensor as an output; return their names, without that of the input."""
    import onnx

    graph = model.graph
    float_types = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    inner = used - {tensor.name for tensor in graph.initializer} - {value.name for value in graph.output}
    graph.output.extend([value for value in graph.value_info if value.name in inner])
    names = [value.name for value in graph.output if value.type.tensor_type.elem_type in float_types]
    onnx.save(model, target)
    return [name for name in names if name != input_name]


def ranges_by(method: str, stats: Mapping[str, TensorStats], percentile: float) -> Ranges:
    """Return the ranges of all tensors by one method, never wider than their values."""
    bounds, limits = {}, {}
    for name, tensor in sorted(stats.items()):
        if not tensor.batches:  # a tensor without elements
            continue
        pair, limit = tensor_range(method, tensor, percentile)
        lowest, highest = np.clip(pair, tensor.lowest, tensor.highest).tolist()
        bounds[name] = lowest, highest
        reach = max(-tensor.lowest, tensor.highest)
        if limit is not None:
            limits[name] = min(limit, reach)
    return Ranges(bounds, limits, method)


def tensor_range(method: str, tensor: TensorStats, percentile: float) -> tuple[Bounds, float | None]:
    """Return the bounds of one tensor, and its magnitude for symmetric INT8, where that is not the larger of them."""
    if method == "moving_average":
        return (tensor.low_sum / tensor.batches, tensor.high_sum / tensor.batches), None
    if method == "minmax" or tensor.histogram is None or tensor.lowest == tensor.highest:
        return (tensor.lowest, tensor.highest), None
    if method == "percentile":
        bounds = histogram.percentile(tensor.histogram, percentile)
        return bounds, histogram.magnitude_percentile(tensor.histogram, percentile)
    if method == "mse":
        limit = histogram.least_symmetric_error(tensor.histogram, max(-tensor.lowest, tensor.highest))
        return histogram.least_error(tensor.histogram, tensor.lowest, tensor.highest), limit
    signed = histogram.entropy(tensor.histogram, histogram.SIGNED_STEPS + 1)
    one_sided = tensor.lowest >= 0 or tensor.highest <= 0  # unsigned numbers have all their steps for one side
    limit = histogram.entropy(tensor.histogram, histogram.STEPS + 1) if one_sided else signed
    return (-limit, limit), signed


def not_finite(path: Path, name: str) -> ModelError:
    return ModelError(
        f"`{path}` computes numbers that are not finite on the calibration inputs, in the tensor `{name}`",
        hint="look for weights that are not finite, or a training that diverged",
    )


def best_ranges(candidates: Mapping[str, Ranges], score: Callable[[Ranges], float]) -> Ranges:
    """Return the ranges with the highest score, the first of equals, with the scores of all methods."""
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    scores = {method: score(ranges) for method, ranges in candidates.items()}
    best = candidates[max(scores, key=lambda method: scores[method])]
    return replace(best, scores=scores, session_config=exact_entries())


def propagate_bounds(bounds: Mapping[str, Bounds], graph: onnx.GraphProto) -> dict[str, Bounds]:
    """Add bounds for tensors that hold the numbers of another: a fixed batch has some that a dynamic one lacks."""
    complete = dict(bounds)
    for node in (*graph.node, *reversed(graph.node)):
        if node.op_type in RESHAPES:
            for source, other in (node.input[0], node.output[0]), (node.output[0], node.input[0]):
                if source in complete:
                    complete.setdefault(other, complete[source])
    return complete


def check_quantizable(path: Path) -> OnnxFacts:
    """Return the facts of a file. Raises ModelError if it cannot be quantized."""
    facts = inspect.facts(path)
    if facts.precision == "int8":
        raise ModelError(f"`{path}` is quantized already", hint="give the FP32 file that it comes from")
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


def load_prepared(path: Path) -> onnx.ModelProto:
    """Load a model with constants and BatchNorms folded and shapes inferred; files of other exporters often need it."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    open_session(path)  # what onnxruntime cannot load raises here, with its reason
    with TemporaryDirectory(prefix="edgekd-") as folder:
        with external_code(
            f"onnxruntime cannot prepare `{path}`", "export it again, with constants folded", ModelError
        ):
            quant_pre_process(path, f"{folder}/folded.onnx", skip_symbolic_shape=True)
        return onnx.load(f"{folder}/folded.onnx")
