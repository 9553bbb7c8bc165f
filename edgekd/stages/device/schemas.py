"""The form of a result.json and of a bundle's manifest.json: all that edgekd reads of them, by name and type.

Both may come from a device, or from a person; what else they hold is let through. A runner of another version may add
keys, and leaves out what a device cannot tell.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from edgekd.core.artifact import Floats
from edgekd.core.bench_result import Role

Count = Annotated[int, Field(ge=1)]
Time = Annotated[float, Field(ge=0)]
Times = Annotated[list[Time], Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Listed(TypedDict):
    sha256: Sha256


class Verified(TypedDict):
    name: str
    passes: bool
    reason: str


class Verify(TypedDict):
    engines: list[Verified]


class Warmup(TypedDict):
    steady: NotRequired[bool]


class Model(TypedDict):
    name: str
    sha256: Sha256
    precision: str
    warmup: NotRequired[Warmup]
    load_ms: NotRequired[Time | None]
    compile_ms: NotRequired[Time | None]
    first_ms: NotRequired[Time | None]
    compute_ms: NotRequired[Times | None]
    under_way: NotRequired[Count]


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
    blocks: Count
    calls: Count
    seed: int
    warmup_s: Time
    warmup_calls: int


class Runtime(TypedDict):
    name: Literal["onnxruntime", "openvino", "tensorrt"]
    version: str
    threads: Count


class Point(TypedDict):
    before: dict[str, Any]


class Best(TypedDict):
    name: str | None


class Bench(TypedDict):
    machine: Machine
    runtime: Runtime
    conditions: Conditions
    protocol: Protocol
    models: Annotated[list[Model], Field(min_length=2)]  # the last is the A/A control
    sessions: list[Any]
    locked: bool
    invalid: list[str]
    points: NotRequired[list[Point] | None]
    recommended: NotRequired[Best | None]


class Drawn(TypedDict):
    name: str
    mj: float
    net_mj: float


class Energy(TypedDict):
    engines: NotRequired[list[Drawn]]
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
    differs: NotRequired[list[Difference]]


class Made(TypedDict):
    name: str
    error: NotRequired[str]


class Build(TypedDict):
    engines: NotRequired[list[Made]]


class Result(TypedDict):
    """A result.json. Parts of a run that was cut off are null."""

    bundle: Sha256
    files: dict[str, Listed]
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
    knows: NotRequired[bool]
    floats: NotRequired[Floats]


class Manifest(TypedDict):
    """The manifest.json of a bundle."""

    target: str
    engines: Annotated[list[Engine], Field(min_length=1)]
    files: dict[str, Listed]
    inputs: str
    labels: str | None
    threads: int
