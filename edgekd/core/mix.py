"""What INT8 costs a network layer by layer, and the mixes of INT8 and float layers that were tried."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgekd.core.trial import Interval, Machine, Runtime


@dataclass(frozen=True)
class Marks:
    """How well a file answers validation images."""

    accuracy: float  # percent
    drop: Interval  # points of accuracy that FP32 is ahead on the same images
    snr_db: float  # power of FP32's answers to that of the difference


@dataclass(frozen=True)
class Layer:
    """A layer that can stay float. Prices are ratios: of its latency to that of the network all in INT8."""

    name: str
    op: str
    macs: int  # of one image
    alone: Marks  # with only this layer in INT8
    price: Interval | None  # of the network with only this layer in float; None: not measured


@dataclass(frozen=True)
class Mix:
    """An INT8 file with some layers in float."""

    floats: tuple[str, ...]
    marks: Marks
    macs: float  # share of the multiply-accumulates that are in float
    price: Interval | None


@dataclass(frozen=True)
class Frontier:
    """What was tried for one network on one target, and what came of it."""

    network: str
    target: str
    metric: str  # top1, delta1
    max_drop: float | None
    accuracy: float  # of FP32, percent
    images: int  # validation images that mixes were judged on
    ranked: int  # of them, those that single layers were judged on
    layers: tuple[Layer, ...]  # the one to free first is first; none where nothing had to be freed
    mixes: tuple[Mix, ...]  # all in INT8 first, then as they were tried
    chosen: int  # of the mixes
    unpriced: str  # why latency was not measured, so that layers were priced by their MACs; empty if it was
    fp32: Interval | None = None  # price of the float file
    machine: Machine | None = None
    runtime: Runtime | None = None
    aa: Interval | None = None  # ratio of the INT8 file to its own duplicate: should hold 1
    warnings: tuple[str, ...] = ()
    started: str = ""  # of the comparison of the mixes, UTC, ISO 8601
    session_config: dict[str, str] = field(default_factory=dict)  # entries of the onnxruntime sessions that answered

    @property
    def mix(self) -> Mix:
        return self.mixes[self.chosen]

    @property
    def met(self) -> bool:
        return self.max_drop is None or self.mix.marks.drop.mid <= self.max_drop
