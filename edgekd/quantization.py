"""The INT8 half of a delivery: from the exported networks to their INT8 files for one target, step by step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from edgekd.configuration import BuildConfig
from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.ledger import Ledger, code
from edgekd.core.onnx_facts import Exported
from edgekd.core.target import Target
from edgekd.core.task import Task
from edgekd.stages.quantize.blueprint import learnt_ranges
from edgekd.stages.quantize.calibrate import CalibrationSet
from edgekd.stages.quantize.choice import JUDGES, most_accurate
from edgekd.stages.quantize.quantize import quantize_with
from edgekd.stages.quantize.ranges import Ranges, candidates_of
from edgekd.stages.training.distill import Trained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What all targets are delivered from."""

    task: Task
    calib: CalibrationSet
    inputs: File  # test images as a network takes them
    networks: tuple[Trained, ...]  # the teacher first


def readable(config: BuildConfig, target: Target) -> int:
    """The opset of the files for a target: as configured, or the highest that its runtime reads."""
    return min(config.export.opset, target.delivery.opset or config.export.opset)


def suffix(config: BuildConfig, opset: int) -> str:
    """Of the steps that make files of another opset than the configured one."""
    return "" if opset == config.export.opset else f"-opset{opset}"


def quantized(
    ledger: Ledger,
    config: BuildConfig,
    name: str,
    target: Target,
    material: Material,
    exported: dict[str, Exported],
) -> tuple[dict[str, Ranges], dict[str, Exported]]:
    """The ranges of every student that the target runs in INT8, and its INT8 files where the dialect has such.

    One pass over the calibration images serves all targets that read the same opset.
    """
    if "int8" not in target.delivery.engines:
        return {}, {}
    end = suffix(config, readable(config, target))
    learnt = {t.weights.name: t.weights.ranges for t in material.networks}
    ranges, int8s = {}, {}
    for n, made in exported.items():
        found = ledger.step(
            f"ranges-{n}{end}", dict[str, Ranges], candidates_of, made, material.calib.images, config.quantize
        )
        judged = ledger.given({m: code(plugins.places("metrics")[m]) for m in JUDGES})
        ranges[n] = judged.step(
            f"method-{n}-{name}",
            Ranges,
            most_accurate,
            made,
            material.calib.images,
            target.dialect,
            found,
            material.task,
        )
        first = config.targets[0].dialect
        if learnt[n] and target.dialect.symmetric_activation != first.symmetric_activation:
            log.info("%s: ranges of %s were learnt for another kind of INT8, so calibrated ones are used", name, n)
        elif learnt[n]:
            ranges[n] = ledger.step(f"learnt-{n}-{name}", Ranges, learnt_ranges, made, ranges[n], learnt[n])
        if target.dialect.form != "cache":
            int8s[n] = ledger.step(
                f"quantize-{n}-{name}", Exported, quantize_with, made, material.calib.images, target.dialect, ranges[n]
            )
    return ranges, int8s
