"""Raw observations of one benchmark, and the numbers derived from them. Every number carries its machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgekd.core.artifact import File, Floats, Precision

if TYPE_CHECKING:
    import numpy as np

Role = Literal["teacher", "student", "baseline"]


@dataclass(frozen=True)
class Contestant:
    """One model file of a comparison."""

    name: str  # unique within the comparison: "teacher fp32"
    role: Role
    method: str  # what taught it; "" if unknown
    precision: Precision
    file: File
    macs: int
    parameters: int
    knows: bool = True  # it answers for the classes of the labels; a teacher of another task does not
    floats: Floats = "fp32"  # what the runtime is asked to compute its float operations in


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval and the point estimate inside it."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Machine:
    """Where numbers come from. Two results compare only if these are equal."""

    processor: str
    flags: tuple[str, ...]  # the instruction sets that decide INT8 and bf16 speed
    cores: int
    memory_gib: float
    system: str
    python: str


@dataclass(frozen=True)
class Runtime:
    """What ran the models, as read back from it."""

    name: str
    version: str
    threads: int


@dataclass(frozen=True)
class Trial:
    """Everything that was seen of one contestant. Metrics read it; none of them runs anything."""

    ns: np.ndarray  # (calls,) int64, every timed call, in order
    block: np.ndarray  # (calls,) the block that each call belongs to
    logits: np.ndarray  # (images, classes), from the model file in its runtime; of a dense task (images, K, H, W)
    reference: np.ndarray  # of the same shape, the float student's on the same images
    labels: np.ndarray  # (images,); of a dense task (images, K, H, W), NaN where unknown


class Metric(Protocol):
    """A number derived from a trial. A pure function: it runs nothing."""

    unit: str
    better: Literal["higher", "lower"]
    needs: int  # timed calls below which the number would mean nothing
    reads: tuple[str, ...]  # the fields of a trial that it needs; it is left out where one of them is empty
    maps: bool | None  # whether it judges maps (True) or class logits (False); None: no answers at all

    def __call__(self, trial: Trial) -> float: ...


@dataclass(frozen=True)
class Measurement:
    """One contestant on one target."""

    contestant: Contestant
    readings: dict[str, float]  # metric name -> value: top1, agreement (percent), p50_ms, p90_ms, p99_ms ...
    speedup: Interval | None  # teacher's median latency over this one's; None for the teacher
    verdict: str  # in words: "4.1 times faster (4.0-4.2)", "no measurable difference"
    floats: str = ""  # the precision of its float operations, as read back: fp32, bf16; empty: unknown
    astray: str = ""  # how its answers on a device differ from the host's, so that it must not ship
    # of the readings, and of `drop` and `teacher_drop`: points of top-1 lost against the float original and the teacher
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchResult:
    """One comparison on one target, with what is needed to judge it."""

    target: str
    not_measured: str  # why there are no measurements; empty when there are
    machine: Machine | None
    runtime: Runtime | None
    protocol: dict[str, Any]  # batch, what a call holds, blocks, calls per block, warm-up, scope, seed
    aa: Interval | None  # ratio of the baseline to its own duplicate: should hold 1
    warnings: tuple[str, ...]  # what a sceptic should know: load, drift, an A/A that moved
    measurements: tuple[Measurement, ...]
    samples: File | None  # .npz with ns, block and model of every timed call
    started: str  # UTC, ISO 8601
    seconds: float
    ships: str = ""  # the contestant for this target: of several students, the most accurate within its latency budget
    scenario: str = ""  # how it differs from the main table of its target: "batch 8", "model only"; empty: it is that

    @property
    def title(self) -> str:
        """cpu; cpu, batch 8"""
        return ", ".join(filter(None, (self.target, self.scenario)))
