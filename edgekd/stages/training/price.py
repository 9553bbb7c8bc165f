"""What a network costs on a target: its median latency there, as an INT8 file. For methods with a latency budget."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.files import save_array
from edgekd.core.method import Blueprint
from edgekd.core.target import Target
from edgekd.metrics._percentile import nearest_rank
from edgekd.stages.bench.benchmark import BenchConfig
from edgekd.stages.bench.runner import job, nanoseconds, run
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize import blueprint
from edgekd.stages.quantize.calibrate import CalibrationSet, load_calibration
from edgekd.stages.quantize.quantize import quantize
from edgekd.stages.quantize.ranges import QuantizeConfig

if TYPE_CHECKING:
    from torch import nn

PROTOCOL = BenchConfig(blocks=10, calls=50, warmup_s=0.5, metrics=("p50_ms",))  # a median needs no more


@dataclass(frozen=True)
class Priced:
    """Measures networks on one target, exported and quantized as a build would."""

    target: Target
    calib: CalibrationSet
    export: ExportConfig
    quantize: QuantizeConfig

    def possible(self) -> bool:
        return not self.target.missing()

    def price_ms(self, out: Path, network: nn.Module) -> float:
        """The median latency of one call with one image, ms. `out` is used and left empty."""
        out.mkdir(parents=True, exist_ok=True)
        inputs = load_calibration(self.calib.images.path, TensorSpec("image", (0, 0, 0, 0)))
        made = export(out, "priced", network, inputs, None, self.export)
        file = quantize(out, made, self.calib.images, self.target.dialect, self.quantize).single.file
        save_array(out / "inputs.npy", np.ascontiguousarray(inputs))
        run(
            "bench",
            out,
            job({"priced": file}, self.target, File.of(out / "inputs.npy"), PROTOCOL),
            "price",
            PROTOCOL.blocks,
        )
        (ns,) = nanoseconds(File.of(out / "samples.npz"), 1, PROTOCOL.blocks)
        shutil.rmtree(out)
        return nearest_rank(ns.ravel(), 50) / 1e6

    def drafts(self) -> bool:
        return "int8" in self.target.delivery.engines

    def blueprint(self, out: Path, network: nn.Module) -> Blueprint:
        """What the INT8 file of a network for the target rounds. `out` is used and left empty."""
        return blueprint.draft(out, network, self.target.dialect, self.calib.images, self.export, self.quantize)
