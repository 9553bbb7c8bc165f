"""What a network costs on a target: its median latency there, as an INT8 file. For methods with a latency budget."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.quant_scheme import Dialect
from edgekd.core.quant_spec import Blueprint
from edgekd.core.target import Target
from edgekd.metrics._percentile import nearest_rank
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import job, nanoseconds, run
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.calibration_set import CalibrationSet
from edgekd.stages.quantize.preparation import check_learnt, dialect_for
from edgekd.stages.quantize.quant_spec import read
from edgekd.stages.quantize.quantize import in_pairs, quantize, quantize_with, settled
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.utils.arrays import save_array

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
        return draft(out, network, self.target.dialect, self.calib.images, self.export, self.quantize)


def draft(
    out: Path, network: nn.Module, dialect: Dialect, images: File, config: ExportConfig, quantize: QuantizeConfig
) -> Blueprint:
    """What the INT8 file of a network that is still learning would round, and in what ranges; `images` calibrate.

    `out` is used and left empty. Raises as `export` and `quantize` do.
    """
    check_learnt(quantize)
    dialect = in_pairs(dialect_for(dialect, quantize))
    out.mkdir(parents=True, exist_ok=True)
    inputs = load_calibration(images.path, TensorSpec("image", (0, 0, 0, 0)))
    made = export(out, "draft", network, inputs, None, config)
    ranges = settled(made.dynamic.file.path, inputs, dialect, quantize)
    int8 = quantize_with(out, made, images, dialect, ranges, quantize.floats)
    found = read(made.dynamic.file.path, int8.dynamic.file.path, ranges, dialect)
    shutil.rmtree(out)
    return found
