"""Schemas of a result.json and of a bundle's manifest.json: all that edgekd reads of them, by name and type.

Both may come from a device, or from a person; other keys are ignored. A runner of another version may add keys, and
leaves out what a device cannot measure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from edgekd.core.artifact import ComputePrecision
from edgekd.core.bench_result import Role

Count = Annotated[int, Field(ge=1)]
Time = Annotated[float, Field(ge=0)]
Times = Annotated[list[Time], Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileRecord(TypedDict):
    sha256: Sha256


class EngineVerdict(TypedDict):
    name: str
    passes: bool
    reason: str


class Verify(TypedDict):
    engines: list[EngineVerdict]


class Warmup(TypedDict):
    steady: NotRequired[bool]


class Model(TypedDict):
    name: str
    sha256: Sha256
    compute_precision: str
    warmup: NotRequired[Warmup]
    load_ms: NotRequired[Time | None]
    compile_ms: NotRequired[Time | None]
    first_ms: NotRequired[Time | None]
    compute_ms: NotRequired[Times | None]
    calls_in_flight: NotRequired[Count]


class Machine(TypedDict):
    processor: str
    flags: list[str]
    cores: Count
    memory_gib: Time
    system: str
    python: str
    affinity: list[int] | None
    cpu_quota: float | None
    governor: str | None


class Conditions(TypedDict):
    load_before: Times | None
    load_after: Times | None
    others_percent: Time | None  # of several cores, and of counters that do not move at once: above 100 at times
    steal_percent: Time | None
    throttled: int | None


class Protocol(TypedDict):
    rounds: Count
    calls_per_round: Count
    seed: int
    warmup_s: Time
    warmup_calls: int


class Runtime(TypedDict):
    name: Literal["onnxruntime", "openvino", "tensorrt"]
    version: str
    threads: Count


class OperatingPoint(TypedDict):
    before: dict[str, Any]


class Recommendation(TypedDict):
    name: str | None


class Bench(TypedDict):
    machine: Machine
    runtime: Runtime
    conditions: Conditions
    protocol: Protocol
    models: Annotated[list[Model], Field(min_length=2)]  # the last is the A/A control
    processes: list[Any]
    locked: bool
    invalid: list[str]
    operating_points: NotRequired[list[OperatingPoint] | None]
    recommended: NotRequired[Recommendation | None]


class EngineEnergy(TypedDict):
    name: str
    mj: float
    net_mj: float


class Energy(TypedDict):
    engines: NotRequired[list[EngineEnergy]]
    invalid: NotRequired[list[str]]
    reason: NotRequired[str]


class Board(TypedDict):
    model: str | None


class Gpu(TypedDict):
    gpu: NotRequired[str | None]


class Difference(TypedDict):
    what: str


class Doctor(TypedDict):
    board: NotRequired[Board | None]
    device: NotRequired[Gpu | None]
    l4t: NotRequired[str | None]
    differences: NotRequired[list[Difference]]


class BuiltEngine(TypedDict):
    name: str
    error: NotRequired[str]


class Build(TypedDict):
    engines: NotRequired[list[BuiltEngine]]


class Result(TypedDict):
    """A result.json. Parts of a run that was cut off are null."""

    bundle: Sha256
    files: dict[str, FileRecord]
    verify: Verify | None
    bench: Bench | None
    energy: NotRequired[Energy | None]
    doctor: NotRequired[Doctor | None]
    build: NotRequired[Build | None]


class Engine(TypedDict):
    name: str
    role: Role
    method: str
    model: str
    expected: str
    precisions: Annotated[list[Literal["fp32", "fp16", "int8"]], Field(min_length=1)]
    macs: int
    parameters: int
    predicts_labels: NotRequired[bool]
    compute_precision: NotRequired[ComputePrecision]


class Manifest(TypedDict):
    """The manifest.json of a bundle."""

    target: str
    engines: Annotated[list[Engine], Field(min_length=1)]
    files: dict[str, FileRecord]
    inputs: str
    labels: str | None
    task: dict[str, Any]
    threads: int
