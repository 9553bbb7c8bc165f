"""JetPacks and Jetson boards: what each can do, and what is done instead where a board or its JetPack cannot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from edgekd.core import config_file, serialization
from edgekd.core.plugins import unknown_name
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError

Route = Literal["calibration", "explicit", "strongly_typed"]
Precision = Literal["fp32", "fp16", "int8", "fp8", "fp4"]


@dataclass(frozen=True)
class Board(Settings):
    """One kind of module."""

    name: str
    title: str
    modules: tuple[str, ...]  # part numbers, as in /proc/device-tree/compatible
    sm: str  # compute capability of the GPU
    precisions: tuple[Precision, ...]  # that TensorRT runs on its GPU
    dla_cores: int
    memory_gb: tuple[int, ...]  # as sold, shared by CPU and GPU


@dataclass(frozen=True)
class Jetpack(Settings):
    """One line of JetPack releases, in its newest form; all versions are texts."""

    version: str
    releases: str
    l4t: str
    ubuntu: str
    python: str
    cuda: str
    tensorrt: str
    opset: tuple[int, int]  # lowest and highest of ai.onnx that the parser accepts
    ir: int  # highest IR version that onnxruntime on the board loads; the parser has no limit of its own
    onnxruntime: str  # the newest CPU wheel for its Python
    int8: tuple[Route, ...]  # all routes to INT8 on the GPU, the one to take first
    dla: Literal["calibration", "none"]  # the route to INT8 on a DLA
    boards: tuple[str, ...]

    @property
    def tensorrt_version(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = self.tensorrt.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class Table(Settings):
    jetpacks: tuple[Jetpack, ...]
    boards: tuple[Board, ...]


@dataclass(frozen=True)
class EnginePlan:
    """The engines to build for one board under one JetPack."""

    jetpack: Jetpack
    board: Board
    engines: tuple[Precision, ...]  # to build on the device and to compare
    int8: Route | None  # None: no INT8 there
    dla: bool  # whether its engine runs on a DLA
    instead: tuple[str, ...]  # a sentence for everything that the configuration names and the device lacks


@cache
def table() -> Table:
    text = files("edgekd.targets").joinpath("jetpacks.yaml").read_text(encoding="utf-8")
    return serialization.from_json(Table, config_file.parse_yaml(text, "jetpacks.yaml"))


def jetpack(version: str) -> Jetpack:
    """Return a JetPack of the table. Raises ConfigError if there is none of that version."""
    rows = {row.version: row for row in table().jetpacks}
    if version not in rows:
        raise unknown_name(f"there is no JetPack `{version}` in edgekd's table", version, list(rows))
    return rows[version]


def board(name: str) -> Board:
    """Return a board of the table. Raises ConfigError if there is none of that name."""
    rows = {row.name: row for row in table().boards}
    if name not in rows:
        raise unknown_name(f"there is no board `{name}` in edgekd's table", name, list(rows))
    return rows[name]


def plan_engines(version: str, name: str, dla: bool = False) -> EnginePlan:
    """Return what to build for the board `name` under JetPack `version`; with `dla`, for its DLA.

    Raises ConfigError if one of them is unknown or that JetPack does not run on the board.
    """
    row, kind = jetpack(version), board(name)
    if kind.name not in row.boards:
        fitting = ", ".join(other.version for other in table().jetpacks if kind.name in other.boards)
        raise ConfigError(
            f"JetPack {version} does not run on {kind.title}", hint=f"{kind.title} runs JetPack {fitting}"
        )
    instead = []
    has_int8 = "int8" in kind.precisions
    if not has_int8:
        instead.append(
            f"INT8 is not available on SM {kind.sm} ({kind.title}): the student is built in FP16 and FP32 there"
        )
    if dla and (reason := no_dla(row, kind)):
        instead.append(f"{reason}: the engine runs on the GPU")
    on_dla = dla and not no_dla(row, kind)
    route: Route | None = "calibration" if on_dla else row.int8[0]
    engines: tuple[Precision, ...] = ("fp32", "fp16", "int8") if has_int8 else ("fp32", "fp16")
    if on_dla:
        engines = ("fp16", "int8")  # a DLA computes in nothing else
    return EnginePlan(row, kind, engines, route if has_int8 else None, on_dla, tuple(instead))


def no_dla(row: Jetpack, kind: Board) -> str:
    """Return why the DLA cannot be used; empty if it can."""
    if not kind.dla_cores:
        return f"{kind.title} has no DLA"
    return "" if row.dla == "calibration" else f"TensorRT {row.tensorrt} of JetPack {row.version} supports no DLA"


def cache_release(version: str | None) -> str:
    """Return the TensorRT whose calibration cache a DLA under JetPack `version` reads.

    Raises ConfigError without a version, and where no DLA reads a cache.
    """
    fitting = ", ".join(row.version for row in table().jetpacks if row.dla == "calibration")
    if version is None:
        raise ConfigError("a calibration cache is for one TensorRT", hint=f"give --jetpack, one of {fitting}")
    row = jetpack(version)
    if row.dla == "none":
        raise ConfigError(
            f"TensorRT {row.tensorrt} of JetPack {version} supports no DLA, so that nothing reads a calibration cache",
            hint=f"use the scheme `tensorrt` for the GPU, or JetPack {fitting} for a DLA",
        )
    return row.tensorrt
