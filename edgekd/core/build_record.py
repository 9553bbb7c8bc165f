"""The record of one whole build: what report.json holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgekd.core.artifact import OnnxModel, Weights
from edgekd.core.bench_result import BenchResult
from edgekd.core.gate import Decision
from edgekd.core.mixed_precision import ParetoFront

SCHEMA = 2  # of report.json; raise it when an old file can no longer be read


@dataclass(frozen=True)
class DataFacts:
    """The images of a build: their source, shape, and how many there are of each split."""

    source: str
    """Name of the data plug-in: digits, folder."""
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Channels, height, width."""
    train: int
    valid: int
    test: int
    student_train: int
    """Labelled images that the students were trained on."""
    calibration: int


@dataclass(frozen=True)
class SelectedRanges:
    """How the activation ranges of a student's INT8 file for a target were chosen."""

    network: str
    target: str
    method: str
    tried: dict[str, float]
    """Accuracy on validation images by method, percent, where one was chosen by it."""


@dataclass(frozen=True)
class Provenance:
    """What a build was made from, by sha256."""

    data: dict[str, str]
    """Arrays of the splits, by file name."""
    calibration: dict[str, str]
    code: dict[str, str]
    """Of the modules of edgekd that each step ran through."""
    systems: tuple[str, ...]
    """The machines that steps ran on."""


@dataclass(frozen=True)
class BuildRecord:
    """One build: configuration, networks, measurements and decisions."""

    name: str
    edgekd: str
    """Version."""
    created: str
    """UTC, ISO 8601."""
    command: str
    """The command that reproduces the build."""
    config: dict[str, Any]
    data: DataFacts
    teacher: Weights
    students: tuple[Weights, ...]
    """Those of the chosen method first, then the baselines."""
    models: tuple[OnnxModel, ...]
    benches: tuple[BenchResult, ...]
    versions: dict[str, str]
    """Of the packages in use."""
    step_seconds: dict[str, float]
    gates: tuple[Decision, ...] = ()
    pareto_fronts: tuple[ParetoFront, ...] = ()
    """Of students on targets, where the accuracy that INT8 may lose is limited."""
    ranges: tuple[SelectedRanges, ...] = ()
    provenance: Provenance | None = None
