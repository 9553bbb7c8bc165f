"""What INT8 costs a network layer by layer, and the trade-off of INT8 and float layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgekd.core.bench_result import Interval, Machine, Runtime


@dataclass(frozen=True)
class EvalScores:
    """How well a file does on validation images."""

    accuracy: float
    """Percent."""
    accuracy_drop: Interval
    """Points of accuracy that FP32 is ahead on the same images."""
    snr_db: float
    """Power of FP32's outputs to that of the difference."""


@dataclass(frozen=True)
class LayerSensitivity:
    """A layer that can stay float."""

    name: str
    op: str
    macs: int
    """Of one image."""
    int8_alone: EvalScores
    """With only this layer in INT8."""
    latency_ratio: Interval | None
    """With only this layer in float, to all layers in INT8; null: not measured."""


@dataclass(frozen=True)
class MixedPrecision:
    """An INT8 file with some layers in float."""

    keep_float: tuple[str, ...]
    scores: EvalScores
    float_macs_fraction: float
    """Of the multiply-accumulates."""
    latency_ratio: Interval | None
    """To all layers in INT8; null: not measured."""


@dataclass(frozen=True)
class ParetoFront:
    """The candidates that were evaluated for one network on one target, and the one selected."""

    network: str
    target: str
    metric: str
    """Top1, delta1."""
    max_drop: float | None
    accuracy: float
    """Of FP32, percent."""
    images: int
    """Validation images that candidates were evaluated on."""
    layer_images: int
    """Of them, those that single layers were evaluated on."""
    layers: tuple[LayerSensitivity, ...]
    """The one to keep float first is first; none where nothing has to stay float."""
    candidates: tuple[MixedPrecision, ...]
    """All in INT8 first, then in the order of the search."""
    selected: int
    """Index of a candidate."""
    not_timed_reason: str
    """Why latency was not measured, so that MACs are the cost; empty if it was."""
    fp32_latency_ratio: Interval | None = None
    """Of the float file, to all layers in INT8."""
    machine: Machine | None = None
    runtime: Runtime | None = None
    aa_ratio: Interval | None = None
    """Ratio of the INT8 file to its own duplicate: should hold 1."""
    warnings: tuple[str, ...] = ()
    started: str = ""
    """Of the benchmark of the candidates, UTC, ISO 8601."""
    session_config: dict[str, str] = field(default_factory=dict)
    """Entries of the onnxruntime sessions that answered."""

    @property
    def selection(self) -> MixedPrecision:
        return self.candidates[self.selected]

    @property
    def meets_limit(self) -> bool:
        return self.max_drop is None or self.selection.scores.accuracy_drop.estimate <= self.max_drop
