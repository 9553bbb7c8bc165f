"""Choose which layers of an INT8 file stay float, so that it loses no more than allowed at the least latency."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgekd.core.artifact import Exported, File
from edgekd.core.bench_result import BenchResult, Interval
from edgekd.core.dataset import PreparedDataset
from edgekd.core.mixed_precision import EvalScores, LayerSensitivity, MixedPrecision, ParetoFront
from edgekd.core.target import Target
from edgekd.errors import ModelError
from edgekd.onnx.exact_sums import exact_entries
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench import statistics
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.mixed_precision.sensitivity import (
    LAYER_IMAGES,
    SINGLES_BENCH,
    EvalSet,
    QuantizableModel,
    measure_latency_ratios,
    measure_layers,
)
from edgekd.stages.quantize.quantize import Int8Options
from edgekd.stages.quantize.ranges import Ranges

log = logging.getLogger(__name__)
CANDIDATES_BENCH = BenchConfig(warmup_s=0.3, metrics=("p50_ms",))
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # how many layers the candidates keep float
TIMED_LAYERS = 32  # layers that are timed, the noisiest; the cost of the others is their fraction of the MACs
DROP_ATTEMPTS = 8  # attempts to quantize a float layer again
MIN_COST = statistics.PROCESSES_DIFFER  # of a layer: smaller differences in latency cannot be told apart


@dataclass(frozen=True)
class MixedPrecisionRequest:
    """A network whose INT8 file may lose only so much accuracy."""

    model: Exported
    images: File  # calibration images
    ranges: Ranges
    dataset: PreparedDataset  # its validation images are used
    options: Int8Options  # its `keep_float` stay float in any case
    max_drop: float  # points of accuracy


@dataclass(frozen=True)
class SearchGoal:
    """The target of a search, and when it ends."""

    target_name: str
    target: Target
    max_drop: float | None  # points of accuracy; None: candidates up to FP32
    all_layers: bool = False  # measure all layers also where nothing has to stay float

    @property
    def not_timed_reason(self) -> str:
        """Why latency cannot be measured here; empty if it can."""
        engines = "TensorRT builds its engines from a bundle" if self.target.runtime == "tensorrt" else ""
        return self.target.unavailable_reason() or engines


@dataclass
class Search:
    """The candidates of one network that were evaluated so far."""

    model: QuantizableModel
    eval_set: EvalSet
    max_drop: float | None
    evaluated: dict[tuple[str, ...], EvalScores] = field(default_factory=dict)  # by the layers that stay float

    def evaluate(self, keep_float: tuple[str, ...]) -> EvalScores:
        """Return the scores of an INT8 file with these float layers."""
        if keep_float not in self.evaluated:
            with TemporaryDirectory(prefix="edgekd-") as folder:
                int8 = self.model.write(self.model.path, Path(folder, "mix.onnx"), keep_float)
                self.evaluated[keep_float] = self.eval_set.evaluate(int8.file.path)
        return self.evaluated[keep_float]

    def meets_limit(self, keep_float: tuple[str, ...]) -> bool:
        return self.max_drop is not None and self.evaluate(keep_float).accuracy_drop.estimate <= self.max_drop

    def first_within_limit(self) -> tuple[str, ...] | None:
        return next((keep_float for keep_float in self.evaluated if self.meets_limit(keep_float)), None)

    def add_layers(self, names: list[str], num_free: int) -> None:
        """Keep the first of `names` float: the first `num_free` always, more until a candidate meets the limit."""
        sizes = {num_free, *(step for step in (*STEPS, len(names) - 1) if num_free < step < len(names))} - {0}
        for count in sorted(sizes):
            if count > num_free and self.first_within_limit() is not None:
                return
            self.evaluate(tuple(names[:count]))

    def drop_layers(self, num_free: int) -> None:
        """Quantize layers again, the least valuable first, while the candidate still meets the limit."""
        best = self.first_within_limit() or ()
        for name in list(reversed(best[num_free:]))[:DROP_ATTEMPTS]:
            fewer = tuple(other for other in best if other != name)
            if self.meets_limit(fewer):
                best = fewer


def choose_mixed_precision(out: Path, request: MixedPrecisionRequest, target_name: str, target: Target) -> ParetoFront:
    """Find the cheapest candidate for a target that loses at most `max_drop` points on all validation images.

    As a step of the cache: `out` keeps the samples. Raises ModelError if no candidate loses so little.
    """
    model, valid = request.model, request.dataset.valid.load()
    network = QuantizableModel(
        name=model.single.name,
        path=model.dynamic.file.path,
        timed_path=model.single.file.path,
        calibration=load_calibration(request.images.path, model.single.input),
        ranges=request.ranges,
        options=request.options,
        macs=model.single.macs,
    )
    inputs = request.dataset.inputs(np.asarray(valid.images))
    eval_set = EvalSet.of(network.path, inputs, valid.labels, request.dataset.task)
    front = search_pareto_front(out, network, eval_set, SearchGoal(target_name, target, request.max_drop))
    if not front.meets_limit:
        raise limit_missed(front)
    return front


def limit_missed(front: ParetoFront) -> ModelError:
    """Return the error that no candidate meets the limit."""
    plain, best, count = front.candidates[0].scores, front.selection, len(front.candidates) - 1
    best_drop = f"{best.scores.accuracy_drop.estimate:.2f}"
    text = f"the best of {count} mixes, with {len(best.keep_float)} layers in float, loses {best_drop}"
    return ModelError(
        f"`{front.network}` loses {plain.accuracy_drop.estimate:.2f} points of validation accuracy in INT8 on "
        f"{front.target}, where {front.max_drop:g} are allowed; {text if count else 'no layer can stay float there'}",
        hint="train it with the method quant_aware, give more calibration images (calibration.images), or allow more "
        "(quantize.max_drop)",
    )


def search_pareto_front(out: Path, model: QuantizableModel, eval_set: EvalSet, goal: SearchGoal) -> ParetoFront:
    """Evaluate candidates with more and more float layers, in the order of gain per cost, until one meets the limit.

    A layer gains the noise that INT8 adds in it alone, and costs the latency that it adds in float, or its
    multiply-accumulates where latency cannot be measured here. Layers that are surely faster in float stay float in any
    case: where nothing else has to, only the first and the last are measured for that, unless `all_layers`. `out` keeps
    the samples of both benchmarks.
    """
    search = Search(model, eval_set, goal.max_drop)
    search.evaluate(())
    layers: list[LayerSensitivity] = []
    needed = goal.all_layers or not search.meets_limit(())
    if needed or not goal.not_timed_reason:
        layers = rank_layers(out / "layers", search, goal, ends_only=not needed)
    candidates = [
        MixedPrecision(keep_float, scores, float_macs_fraction(keep_float, layers, model), None)
        for keep_float, scores in search.evaluated.items()
    ]
    front = ParetoFront(
        network=model.name,
        target=goal.target_name,
        metric=eval_set.task.primary_metric,
        max_drop=goal.max_drop,
        accuracy=eval_set.fp32_accuracy(),
        images=len(eval_set.inputs),
        layer_images=min(LAYER_IMAGES, len(eval_set.inputs)),
        layers=tuple(layers),
        candidates=tuple(candidates),
        selected=select_candidate(candidates, goal.max_drop, None),
        not_timed_reason=goal.not_timed_reason,
        session_config=exact_entries(),
    )
    if not goal.not_timed_reason:
        front = timed(out / "mixes", front, model, goal)
    log.info("%s", format_selection(front))
    return front


def timed(out: Path, front: ParetoFront, model: QuantizableModel, goal: SearchGoal) -> ParetoFront:
    """Measure the latency of all candidates, and select again."""
    float_sets = [candidate.keep_float for candidate in front.candidates]
    result, ratios, fp32 = measure_latency_ratios(
        out, model, float_sets, goal.target_name, goal.target, CANDIDATES_BENCH
    )
    candidates = [replace(c, latency_ratio=ratio) for c, ratio in zip(front.candidates, ratios, strict=True)]
    return replace(
        front,
        candidates=tuple(candidates),
        selected=select_candidate(candidates, goal.max_drop, result),
        fp32_latency_ratio=fp32,
        machine=result.machine,
        runtime=result.runtime,
        aa_ratio=result.aa_ratio,
        warnings=result.warnings,
        started=result.started,
    )


def rank_layers(out: Path, search: Search, goal: SearchGoal, ends_only: bool) -> list[LayerSensitivity]:
    """Return the layers, the one to keep float first is first, and evaluate the candidates that follow."""
    layers = measure_layers(search.model, search.eval_set.part(LAYER_IMAGES), ends_only)
    free: set[str] = set()
    if not goal.not_timed_reason:
        first = layers[:TIMED_LAYERS]
        singles = [(), *((layer.name,) for layer in first)]
        result, (_, *ratios), _ = measure_latency_ratios(
            out, search.model, singles, goal.target_name, goal.target, SINGLES_BENCH
        )
        some = [replace(layer, latency_ratio=ratio) for layer, ratio in zip(first, ratios, strict=True)]
        layers = [*some, *layers[TIMED_LAYERS:]]
        free = free_layers(some, result)
    layers.sort(key=lambda layer: (layer.name not in free, -gain_per_cost(layer, search.model.macs)))
    if search.model.options.scheme.format != "calibration_cache":
        num_free = min(len(free), len(layers) - (not ends_only))  # one has to stay in INT8
        search.add_layers([layer.name for layer in layers], num_free)
        search.drop_layers(num_free)
    return layers


def free_layers(layers: Sequence[LayerSensitivity], result: BenchResult) -> set[str]:
    """Return the names of the layers that are surely faster in float."""
    return {layer.name for layer in layers if surely_faster(layer.latency_ratio, result)}


def surely_faster(ratio: Interval | None, result: BenchResult) -> bool:
    """Whether a latency ratio is below 1 beyond the noise of the benchmark."""
    if ratio is None or result.aa_ratio is None:
        return False
    return "faster" in statistics.verdict(Interval(1 / ratio.high, 1 / ratio.estimate, 1 / ratio.low), result.aa_ratio)


def gain_per_cost(layer: LayerSensitivity, macs: int) -> float:
    """Return the noise that INT8 adds in a layer alone, as a fraction of the outputs' power, per cost."""
    cost = layer.macs / max(macs, 1) if layer.latency_ratio is None else layer.latency_ratio.estimate - 1
    return float(10 ** (-layer.int8_alone.snr_db / 10)) / max(cost, MIN_COST)


def float_macs_fraction(
    keep_float: Collection[str], layers: Sequence[LayerSensitivity], model: QuantizableModel
) -> float:
    """Return the fraction of multiply-accumulates in float; layers that are float in every candidate do not count."""
    return sum(layer.macs for layer in layers if layer.name in keep_float) / max(model.macs, 1)


def select_candidate(candidates: Sequence[MixedPrecision], max_drop: float | None, result: BenchResult | None) -> int:
    """Return the index of the cheapest candidate within the limit; of none, the most accurate.

    Where INT8 alone is within the limit, others must be surely faster and no less close to FP32.
    """
    drops = [candidate.scores.accuracy_drop.estimate for candidate in candidates]
    within = [i for i, drop in enumerate(drops) if max_drop is None or drop <= max_drop]

    def cost(index: int) -> float:
        ratio = candidates[index].latency_ratio
        return candidates[index].float_macs_fraction if ratio is None else ratio.estimate

    if not within:
        return min(range(len(candidates)), key=lambda index: (drops[index], cost(index)))
    if 0 in within:
        faster = [i for i in within[1:] if result and surely_faster(candidates[i].latency_ratio, result)]
        within = [i for i in faster if candidates[i].scores.snr_db >= candidates[0].scores.snr_db] or [0]
    return min(within, key=cost)


def format_selection(front: ParetoFront) -> str:
    """Return the selection in one line."""
    selection, all_int8 = front.selection, front.candidates[0].scores.accuracy_drop.estimate
    layers = f"{', '.join(selection.keep_float)} in float" if selection.keep_float else "all layers in INT8"
    latency = f", {selection.latency_ratio.estimate:.3f} of its latency" if selection.latency_ratio else ""
    points = f"{selection.scores.accuracy_drop.estimate:.2f} points of validation accuracy lost"
    return f"{front.network} on {front.target}: {layers}, {points} (all in INT8: {all_int8:.2f}{latency})"
