"""jetson: TensorRT on an NVIDIA Jetson, which builds its engines itself from a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.quant_scheme import QUANT_SCHEMES, QuantScheme
from edgekd.core.target import DeploymentPlan, Engine, Target
from edgekd.errors import ConfigError
from edgekd.targets._jetpack import EnginePlan, plan_engines

ENGINES: tuple[Engine, ...] = ("fp32", "fp16", "int8")
WHY = {  # by the route to INT8
    "explicit": "INT8 goes through Q/DQ pairs and the flags INT8 and FP16: what has no pairs runs in FP16",
    "strongly_typed": (
        "precisions are in the files, Q/DQ pairs and FP16 tensors: TensorRT deprecates its flags since 10.12, "
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
        self.engine_plan()  # a JetPack that is not there, or not for this board, raises here

    def fingerprint(self) -> str:
        """Return what the table of JetPacks says, which is no code."""
        return repr(self.engine_plan())

    def engine_plan(self) -> EnginePlan:
        return plan_engines(self.jetpack, self.board, self.dla)

    @property
    def scheme(self) -> QuantScheme:
        return QUANT_SCHEMES["dla" if self.engine_plan().dla else "tensorrt"]

    @property
    def deployment_plan(self) -> DeploymentPlan:
        plan = self.engine_plan()
        row = plan.jetpack
        why = [f"TensorRT {row.tensorrt} of JetPack {row.version} reads ONNX up to opset {row.opset[1]}"]
        if plan.int8:
            why.append(WHY[plan.int8])
            why.append("all precisions are built and measured: on small layers, INT8 can be slower than FP16")
        return DeploymentPlan(
            engines=tuple(engine for engine in ENGINES if engine in plan.engines),
            opset=row.opset[1],
            typed=plan.int8 == "strongly_typed",
            dla=0 if plan.dla else None,
            jetpack=row.version,
            board=plan.board.name,
            tensorrt=row.tensorrt,
            why=tuple(why),
            instead=plan.instead,
        )

    @property
    def label(self) -> str:
        return "-".join((self.board, self.jetpack, *["dla"] * self.dla))

    def unavailable_reason(self) -> str:
        return f"a {self.engine_plan().board.title} with JetPack {self.jetpack} builds its engines itself"

    @property
    def runtime(self) -> str:
        return "tensorrt"


PLUGIN = Jetson
