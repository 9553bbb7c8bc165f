"""Measure networks on a target while they are trained: the latency of their INT8 file, and how it is quantized."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.quant_scheme import QuantScheme
from edgekd.core.quant_spec import QuantSpec
from edgekd.core.target import Target
from edgekd.metrics.latency import nearest_rank
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import job, nanoseconds, run
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.calibration_set import CalibrationSet
from edgekd.stages.quantize.preparation import check_learned_ranges
from edgekd.stages.quantize.quant_spec import read_quant_spec
from edgekd.stages.quantize.quantize import Int8Options, quantize, select_ranges, write_int8_files
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.utils.arrays import save_array

if TYPE_CHECKING:
    from torch import nn

PROTOCOL = BenchConfig(rounds=10, calls_per_round=50, warmup_s=0.5, metrics=("p50_ms",))  # a median needs no more


@dataclass(frozen=True)
class BuildTargetProbe:
    """Measures networks on one target, exported and quantized as a build would."""

    target: Target
    calibration: CalibrationSet
    export: ExportConfig
    quantize: QuantizeConfig

    def can_measure(self) -> bool:
        """Return whether this machine can run the target."""
        return not self.target.unavailable_reason()

    def latency_ms(self, out: Path, network: nn.Module) -> float:
        """Return the median latency of one call with one image, ms. `out` is used and deleted."""
        out.mkdir(parents=True, exist_ok=True)
        inputs = load_calibration(self.calibration.images.path, TensorSpec("image", (0, 0, 0, 0)))
        exported = export(out, "probe", network, inputs, None, self.export)
        file = quantize(out, exported, self.calibration.images, self.target.scheme, self.quantize).single.file
        save_array(out / "inputs.npy", np.ascontiguousarray(inputs))
        run(
            "bench",
            out,
            job({"probe": file}, self.target, File.of(out / "inputs.npy"), PROTOCOL),
            "probe",
            PROTOCOL.rounds,
        )
        (ns,) = nanoseconds(File.of(out / "samples.npz"), 1, PROTOCOL.rounds)
        shutil.rmtree(out)
        return nearest_rank(ns.ravel(), 50) / 1e6

    def has_int8(self) -> bool:
        """Return whether the target runs INT8 files."""
        return "int8" in self.target.deployment_plan.engines

    def quant_spec(self, out: Path, network: nn.Module) -> QuantSpec:
        """Return what the INT8 file of a network for the target rounds. `out` is used and deleted."""
        return build_quant_spec(out, network, self.target.scheme, self.calibration.images, self.export, self.quantize)


def build_quant_spec(
    out: Path, network: nn.Module, scheme: QuantScheme, images: File, config: ExportConfig, quantize: QuantizeConfig
) -> QuantSpec:
    """Return what the INT8 file of a network in training would round, and in what ranges.

    Args:
        out: a folder, used and deleted.
        images: of the calibration.

    Raises:
        EdgekdError: as `export` and `quantize` do.
    """
    check_learned_ranges(quantize)
    options = Int8Options.of(scheme, quantize).as_onnx()
    out.mkdir(parents=True, exist_ok=True)
    inputs = load_calibration(images.path, TensorSpec("image", (0, 0, 0, 0)))
    exported = export(out, "draft", network, inputs, None, config)
    ranges = select_ranges(exported.dynamic.file.path, inputs, options, quantize)
    int8 = write_int8_files(out, exported, images, ranges, options)
    spec = read_quant_spec(exported.dynamic.file.path, int8.dynamic.file.path, ranges, options.scheme)
    shutil.rmtree(out)
    return spec
