"""One whole build, as the report tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgekd.core.artifact import OnnxModel, Weights
from edgekd.core.bench_result import BenchResult
from edgekd.core.gate import Decision
from edgekd.core.mixed_precision import Frontier

SCHEMA = 1  # of report.json; raise it when an old file can no longer be read


@dataclass(frozen=True)
class DataFacts:
    source: str  # "digits", "folder"
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    train: int  # images, as all below
    valid: int
    test: int
    student_train: int  # labelled images that the students learnt from
    calibration: int


@dataclass(frozen=True)
class RangesFound:
    """How the ranges of a student's INT8 form for a target were found."""

    network: str
    target: str
    method: str
    tried: dict[str, float]  # accuracy on validation images by method, percent, where one was chosen


@dataclass(frozen=True)
class Origins:
    """What a build was made from, by sha256."""

    data: dict[str, str]  # arrays of the splits, by file name
    calibration: dict[str, str]
    code: dict[str, str]  # of the modules of edgekd that each step ran through
    systems: tuple[str, ...]  # that steps ran on


@dataclass(frozen=True)
class Record:
    name: str
    edgekd: str  # version
    created: str  # UTC, ISO 8601
    command: str  # how to make this again
    config: dict[str, Any]
    data: DataFacts
    teacher: Weights
    students: tuple[Weights, ...]  # the chosen method's first, then the baselines
    models: tuple[OnnxModel, ...]
    benches: tuple[BenchResult, ...]
    versions: dict[str, str]  # of the packages in use
    step_seconds: dict[str, float]
    gates: tuple[Decision, ...] = ()
    frontiers: tuple[Frontier, ...] = ()  # of students for targets, where there is a limit to what INT8 may lose
    ranges: tuple[RangesFound, ...] = ()
    origins: Origins | None = None
