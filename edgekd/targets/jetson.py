"""jetson: TensorRT on an NVIDIA Jetson, which builds its engines itself from a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.quant_scheme import DIALECTS, Dialect
from edgekd.core.target import Delivery, Engine, Target
from edgekd.errors import ConfigError
from edgekd.targets._jetpack import Plan, plan

ENGINES: tuple[Engine, ...] = ("fp32", "fp16", "int8")
WHY = {  # by the route to INT8
    "explicit": "INT8 goes through Q/DQ pairs and the flags INT8 and FP16: what has no pairs runs in FP16",
    "strongly_typed": (
        "precisions stand in the files, Q/DQ pairs and FP16 tensors: TensorRT deprecates its flags since 10.12, "
        "and has none from 11 on"
    ),
    "calibration": (
        "a DLA of this TensorRT takes no Q/DQ pairs: the network stays FP32, its INT8 scales are in a calibration "
        "cache, and what the DLA cannot do falls back to the GPU"
    ),
}


@dataclass(frozen=True)
class Jetson(Target):
    jetpack: str = "6.2"
    board: str = "orin-nano"
    dla: bool = False  # engines run on the first DLA

    def __post_init__(self) -> None:
        if self.threads != 1:
            raise ConfigError(f"threads is {self.threads}, which TensorRT has none of", hint="leave it out")
        self.planned()  # a JetPack that is not there, or not for this board, raises here

    def fingerprint(self) -> str:
        """The table of JetPacks is no code."""
        return repr(self.planned())

    def planned(self) -> Plan:
        return plan(self.jetpack, self.board, self.dla)

    @property
    def dialect(self) -> Dialect:
        return DIALECTS["dla" if self.planned().dla else "tensorrt"]

    @property
    def delivery(self) -> Delivery:
        made = self.planned()
        row = made.jetpack
        why = [f"TensorRT {row.tensorrt} of JetPack {row.version} reads ONNX up to opset {row.opset[1]}"]
        if made.int8:
            why.append(WHY[made.int8])
            why.append("all precisions are built and measured: on small layers, INT8 can be slower than FP16")
        return Delivery(
            engines=tuple(engine for engine in ENGINES if engine in made.engines),
            opset=row.opset[1],
            typed=made.int8 == "strongly_typed",
            dla=0 if made.dla else None,
            jetpack=row.version,
            board=made.board.name,
            tensorrt=row.tensorrt,
            why=tuple(why),
            instead=made.instead,
        )

    @property
    def trait(self) -> str:
        return "-".join((self.board, self.jetpack, *["dla"] * self.dla))

    def missing(self) -> str:
        return f"a {self.planned().board.title} with JetPack {self.jetpack} builds its engines itself"

    @property
    def runtime(self) -> str:
        return "tensorrt"


PLUGIN = Jetson
