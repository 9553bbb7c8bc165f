"""Raw observations of one benchmark, and the numbers derived from them. Every number carries its machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from edgekd.core.artifact import ComputePrecision, File, Precision

if TYPE_CHECKING:
    import numpy as np

Role = Literal["teacher", "student", "baseline"]


@dataclass(frozen=True)
class BenchmarkEntry:
    """One model file of a comparison."""

    name: str
    """Unique within the comparison: `teacher fp32`."""
    role: Role
    method: str
    """The distillation method that trained it; empty if unknown."""
    precision: Precision
    file: File
    macs: int
    parameters: int
    predicts_labels: bool = True
    """Whether its outputs are the classes of the labels; those of a teacher of another task are not."""
    compute_precision: ComputePrecision = "fp32"
    """What the runtime is asked to compute float operators in; `native`: its own choice."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval and the point estimate inside it."""

    low: float
    estimate: float
    high: float


@dataclass(frozen=True)
class Machine:
    """Where numbers come from. Two results compare only if these are equal."""

    processor: str
    flags: tuple[str, ...]
    """The instruction sets that decide the speed of INT8 and bf16."""
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
class Samples:
    """Everything that was observed of one entry. Metrics read it; none of them runs anything."""

    ns: np.ndarray
    """(calls,) int64: nanoseconds of every timed call, in order."""
    round: np.ndarray
    """(calls,) the round that each call belongs to."""
    outputs: tuple[np.ndarray, ...]
    """Of the model file in its runtime, each (images, ...), in the order of the task; empty: none were observed."""
    reference: tuple[np.ndarray, ...]
    """Of the same shapes: outputs of the FP32 file on the same images."""
    labels: np.ndarray
    """(images, ...), the targets as the task has them."""

    def has(self, field: str) -> bool:
        """Whether a field holds anything."""
        value = getattr(self, field)
        return bool(value) and all(part.size for part in value) if isinstance(value, tuple) else bool(value.size)

    def subset(self, images: np.ndarray) -> Samples:
        """Return the samples of some of the images only."""
        outputs, reference = (tuple(part[images] for part in parts) for parts in (self.outputs, self.reference))
        labels = self.labels[images] if self.labels.size else self.labels
        return replace(self, outputs=outputs, reference=reference, labels=labels)


@dataclass(frozen=True)
class Measurement:
    """One entry on one target."""

    model: BenchmarkEntry
    metrics: dict[str, float]
    """By name: top1, agreement (percent), p50_ms, p90_ms, p99_ms ..."""
    speedup: Interval | None
    """The teacher's median latency divided by this one's; null for the teacher."""
    verdict: str
    """As a phrase: `4.1 times faster (4.0-4.2)`, `no measurable difference`."""
    compute_precision: str = ""
    """What the runtime reports to compute float operators in: fp32, bf16; empty: unknown."""
    mismatch: str = ""
    """How its outputs on a device differ from the host's, so that it must not be selected; empty: they do not."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Of the metrics, and of `accuracy_drop` and `accuracy_drop_vs_teacher`: points of top-1 lost against the FP32
    file and the teacher."""


@dataclass(frozen=True)
class BenchResult:
    """One comparison on one target, with what is needed to judge it."""

    target: str
    not_measured: str
    """Why there are no measurements; empty if there are."""
    machine: Machine | None
    runtime: Runtime | None
    protocol: dict[str, Any]
    """Batch, what a call includes, rounds, calls per round, warm-up, seed."""
    aa_ratio: Interval | None
    """Ratio of the baseline to its own duplicate (A/A control): should include 1."""
    warnings: tuple[str, ...]
    """Reasons to doubt the numbers: load, drift, an A/A control that moved."""
    measurements: tuple[Measurement, ...]
    samples: File | None
    """.npz with nanoseconds, round and model of every timed call."""
    started: str
    """UTC, ISO 8601."""
    seconds: float
    selected: str = ""
    """The entry to deploy on this target: of several students, the most accurate within the latency budget."""
    scenario: str = ""
    """How it differs from the main table of its target: `batch 8`, `inference only`; empty: it is the main table."""

    @property
    def title(self) -> str:
        """cpu; cpu, batch 8"""
        return ", ".join(filter(None, (self.target, self.scenario)))
