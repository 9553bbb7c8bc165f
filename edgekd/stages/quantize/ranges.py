"""Ranges: between which bounds every float tensor of a network is quantized; one pass over images serves all forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from edgekd.core import onnx_facts, progress
from edgekd.core.artifact import STORY, File
from edgekd.core.errors import ConfigError, DataError, ModelError
from edgekd.core.exactness import exact_entries
from edgekd.core.foreign import foreign
from edgekd.core.onnx_facts import Exported, OnnxFacts
from edgekd.core.settings import Settings
from edgekd.stages.quantize import histogram
from edgekd.stages.quantize.calibrate import check_inputs, load_calibration, portions
from edgekd.stages.quantize.explicit import WEIGHTED
from edgekd.stages.quantize.histogram import Histogram

if TYPE_CHECKING:
    import onnx

LOWEST_OPSET = 13  # Q/DQ with a scale per channel
Bounds: TypeAlias = tuple[float, float]
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")  # the same numbers
METHODS = ("minmax", "moving_average", "percentile", "entropy", "mse")  # the first of equals is chosen


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """How ranges are found: the extremes seen; the mean of each input's extremes (`moving_average`, as onnxruntime
    calls it); all but a share of the values; those with the least Kullback-Leibler divergence after rounding; those
    with the least mean squared error after it; or (`auto`) as the most accurate of these."""

    method: Literal["minmax", "moving_average", "percentile", "entropy", "mse", "auto"] = "minmax"
    percentile: float = 99.99  # share of the values that `percentile` keeps
    floats: tuple[str, ...] = ()  # layers that stay float: their names, or `first` and `last`
    # what INT8 may lose on validation images, in points of accuracy: layers are left float until it loses no more;
    # null: no limit. A lesson that asks about INT8 files takes no notice of it
    max_drop: float | None = field(default=None, metadata=STORY)
    equalize: bool = False  # scale channels between layers until the weights on both sides have equal ranges
    smooth: float = 0.0  # SmoothQuant's alpha, how much of the activations' outliers weights take over; 0: none
    correct_bias: bool = False  # take the mean error of rounded weights off the biases
    per_channel: bool | None = None  # a scale for each output channel of a weight, or one for all; null: as the target

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < 100:
            raise ConfigError(f"max_drop is {self.max_drop}", hint="use points of accuracy, such as 0.5")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}", hint="use a percentage above 50, such as 99.99")
        if not 0 <= self.smooth < 1:
            raise ConfigError(f"smooth is {self.smooth}", hint="use a share from 0 to below 1; 0.5 is usual")

    @property
    def rescales(self) -> bool:
        """Whether channels are scaled before ranges are found."""
        return self.equalize or self.smooth > 0

    @property
    def changes(self) -> bool:
        """Whether INT8 files are made of other numbers than those of the FP32 file."""
        return self.rescales or self.correct_bias

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS if self.method == "auto" else (self.method,)


@dataclass(frozen=True)
class Ranges:
    """The range of every float tensor of a network, for every form of INT8."""

    bounds: dict[str, Bounds]  # by tensor name: lowest, highest
    # largest magnitude for signed symmetric INT8, where it is not that of the bounds: a tensor that is never negative
    # has half the steps there, and is better clipped elsewhere
    limits: dict[str, float] = field(default_factory=dict)
    method: str = field(default="", metadata=STORY)
    tried: dict[str, float] = field(default_factory=dict, metadata=STORY)  # grade of each method, where one was chosen
    session_config: dict[str, str] = field(default_factory=dict, metadata=STORY)  # of the onnxruntime that graded them

    def serving(self, symmetric: bool) -> dict[str, Bounds]:
        """The bounds of every tensor for INT8 with a zero point, or symmetric."""
        if not symmetric:
            return self.bounds
        limits = {name: self.limits.get(name, max(map(abs, pair))) for name, pair in self.bounds.items()}
        return {name: (-limit, limit) for name, limit in limits.items()}


@dataclass
class Seen:
    """What is known of a tensor after the images so far; of a fixed size, however many they are."""

    lowest: float = np.inf
    highest: float = -np.inf
    lows: float = 0.0  # sum of the lowest values of all batches
    highs: float = 0.0
    batches: int = 0
    histogram: Histogram | None = None

    def add(self, values: np.ndarray) -> bool:
        """Take up the values of one batch; False, and no more known than before, if some are not finite."""
        lowest, highest = float(values.min()), float(values.max())
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            return False
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        self.lows, self.highs, self.batches = self.lows + lowest, self.highs + highest, self.batches + 1
        if self.histogram:
            self.histogram.add(values.astype(np.float32, copy=False), max(-lowest, highest))
        return True


def ranges_of(out: Path, model: Exported, images: File, config: QuantizeConfig) -> Ranges:
    """The ranges of one network for all dialects, from one pass over the calibration images; not for `auto`.

    Writes nothing into `out`: as a step of the ledger, it is kept there. Raises as `calibrate` does.
    """
    return only(candidates_of(out, model, images, config))


def candidates_of(out: Path, model: Exported, images: File, config: QuantizeConfig) -> dict[str, Ranges]:
    """`ranges_of` by every method that is asked for, from the same pass."""
    inputs = load_calibration(images.path, model.single.input)
    return candidates(model.dynamic.file.path, inputs, config)  # some of its tensors are constants in the other


def calibrate(path: Path, inputs: np.ndarray, config: QuantizeConfig) -> Ranges:
    """The ranges of all float tensors of the prepared model on `inputs`, (N, ...), by the only method asked for.

    Raises ModelError if the file cannot be quantized, DataError if the inputs do not fit, ConfigError for `auto`.
    """
    return only(candidates(path, inputs, config))


def only(found: dict[str, Ranges]) -> Ranges:
    if len(found) > 1:
        raise ConfigError(
            f"the method `auto` leaves {len(found)} to choose from, but there is nothing to judge them by",
            hint=f"set one: {', '.join(METHODS)}",
        )
    return next(iter(found.values()))


def candidates(
    path: Path, inputs: np.ndarray, config: QuantizeConfig, batches: Callable[[int], bool] = lambda number: True
) -> dict[str, Ranges]:
    """The ranges by every method that is asked for, in the order of METHODS, from one pass over the inputs.

    Only the activations of one batch are in memory. `batches` says which batches are looked at. Raises as `calibrate`.
    """
    facts = quantizable(path)
    step = check_batches(path, facts, inputs)
    count = step * sum(map(batches, range(len(inputs) // step)))
    binned = not {"minmax", "moving_average"}.issuperset(config.methods)
    seen: dict[str, Seen] = {}
    with TemporaryDirectory(prefix="edgekd-") as folder:
        names = watch(prepared(path), facts.input.name, Path(folder, "watched.onnx"))
        running = onnx_facts.session(Path(folder, "watched.onnx"))
        with progress.bar("calibration images", count) as advance:
            for number, part in enumerate(portions(inputs, step)):
                if not batches(number):
                    continue
                batch = np.asarray(part)
                answers = running.run(names, {facts.input.name: batch})
                # an input that is also an output would be given back as what the next run overwrites
                for name, values in {facts.input.name: batch, **dict(zip(names, answers, strict=True))}.items():
                    known = seen.setdefault(name, Seen(histogram=Histogram() if binned else None))
                    if values.size and not known.add(values):
                        raise not_finite(path, name)
                advance(step)
    entering = seen[facts.input.name]
    if entering.lowest == entering.highest:
        raise DataError(
            f"the calibration set holds nothing but the number {entering.lowest:g}",
            hint="give real inputs, scaled as in training; ranges of constant ones say nothing",
        )
    return {method: summed_up(seen, method, config.percentile) for method in config.methods}


def check_batches(path: Path, facts: OnnxFacts, inputs: np.ndarray) -> int:
    """How many inputs the model takes at once. Raises DataError or ModelError if they do not fit it."""
    check_inputs(inputs, facts.input, "the calibration set")
    batch = facts.input.shape[0] or 1
    if len(inputs) % batch:
        raise ModelError(
            f"`{path}` takes {batch} inputs at once, and {len(inputs)} calibration inputs are no multiple of it",
            hint=f"give {len(inputs) // batch * batch or batch} inputs, or export with batch 1",
        )
    return batch


def watch(model: onnx.ModelProto, entering: str, target: Path) -> list[str]:
    """Write the model with every float tensor as an output; their names, without that of the input."""
    import onnx

    graph = model.graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    hidden = used - {tensor.name for tensor in graph.initializer} - {value.name for value in graph.output}
    graph.output.extend([value for value in graph.value_info if value.name in hidden])
    names = [value.name for value in graph.output if value.type.tensor_type.elem_type in floats]
    onnx.save(model, target)
    return [name for name in names if name != entering]


def summed_up(seen: Mapping[str, Seen], method: str, percentile: float) -> Ranges:
    """The ranges of all tensors by one method, never wider than what was seen."""
    bounds, limits = {}, {}
    for name, known in sorted(seen.items()):
        if not known.batches:  # a tensor without elements
            continue
        pair, limit = found_by(method, known, percentile)
        lowest, highest = np.clip(pair, known.lowest, known.highest).tolist()
        bounds[name] = lowest, highest
        reach = max(-known.lowest, known.highest)
        if limit is not None:
            limits[name] = min(limit, reach)
    return Ranges(bounds, limits, method)


def found_by(method: str, known: Seen, percentile: float) -> tuple[Bounds, float | None]:
    """The bounds of one tensor, and its magnitude for symmetric INT8, where that is not the larger of them."""
    if method == "moving_average":
        return (known.lows / known.batches, known.highs / known.batches), None
    if method == "minmax" or known.histogram is None or known.lowest == known.highest:
        return (known.lowest, known.highest), None
    if method == "percentile":
        cut = histogram.percentile(known.histogram, percentile)
        return cut, histogram.magnitude_percentile(known.histogram, percentile)
    if method == "mse":
        limit = histogram.least_symmetric_error(known.histogram, max(-known.lowest, known.highest))
        return histogram.least_error(known.histogram, known.lowest, known.highest), limit
    signed = histogram.entropy(known.histogram, histogram.SIGNED_STEPS + 1)
    one_sided = known.lowest >= 0 or known.highest <= 0  # unsigned numbers have all their steps for one side
    limit = histogram.entropy(known.histogram, histogram.STEPS + 1) if one_sided else signed
    return (-limit, limit), signed


def not_finite(path: Path, name: str) -> ModelError:
    return ModelError(
        f"`{path}` computes numbers that are not finite on the calibration inputs, in the tensor `{name}`",
        hint="look for weights that are not finite, or a training that diverged",
    )


def best(found: Mapping[str, Ranges], grade: Callable[[Ranges], float]) -> Ranges:
    """The ranges with the highest grade, the first of equals; they keep what each method achieved."""
    if len(found) == 1:
        return next(iter(found.values()))
    grades = {method: grade(ranges) for method, ranges in found.items()}
    chosen = found[max(grades, key=lambda method: grades[method])]
    return replace(chosen, tried=grades, session_config=exact_entries())


def completed(bounds: Mapping[str, Bounds], graph: onnx.GraphProto) -> dict[str, Bounds]:
    """With bounds for the tensors that hold the numbers of another: a fixed batch has some that a dynamic one lacks."""
    found = dict(bounds)
    for node in (*graph.node, *reversed(graph.node)):
        if node.op_type in RESHAPES:
            for known, other in (node.input[0], node.output[0]), (node.output[0], node.input[0]):
                if known in found:
                    found.setdefault(other, found[known])
    return found


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
        with foreign(f"onnxruntime cannot prepare `{path}`", "export it anew, with constants folded", ModelError):
            quant_pre_process(path, f"{folder}/folded.onnx", skip_symbolic_shape=True)
        return onnx.load(f"{folder}/folded.onnx")
