"""The INT8 half of a delivery: from the exported networks to their INT8 files for one target, step by step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version

from edgekd.config import BuildConfig
from edgekd.core import plugins
from edgekd.core.artifact import Exported, File
from edgekd.core.dataset import Task
from edgekd.core.mixed_precision import Frontier
from edgekd.core.step_cache import Ledger, code
from edgekd.core.target import Target
from edgekd.stages.bench.runner import runner_path
from edgekd.stages.mixed_precision.search import mixed
from edgekd.stages.quantize.auto_method import JUDGES, most_accurate
from edgekd.stages.quantize.calibration_set import CalibrationSet
from edgekd.stages.quantize.preparation import check_learnt, dialect_for, prepare
from edgekd.stages.quantize.quant_spec import learnt_ranges
from edgekd.stages.quantize.quantize import quantize_with
from edgekd.stages.quantize.ranges import Ranges, candidates_of
from edgekd.training.trained_model import Trained
from edgekd.utils import cpu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What all targets are delivered from."""

    task: Task
    calib: CalibrationSet
    inputs: File  # test images as a network takes them
    networks: tuple[Trained, ...]  # the teacher first


@dataclass(frozen=True)
class Quantized:
    """What came of the networks for one target, by their names."""

    ranges: dict[str, Ranges]
    files: dict[str, Exported]  # where the dialect has INT8 files
    frontiers: dict[str, Frontier]  # where there is a limit to what INT8 may lose


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
) -> Quantized:
    """The ranges of every student that the target runs in INT8, and its INT8 files where the dialect has such.

    One pass over the calibration images serves all targets that read the same opset.
    """
    if "int8" not in target.delivery.engines:
        return Quantized({}, {}, {})
    end = suffix(config, readable(config, target))
    learnt = {t.weights.name: t.weights.ranges for t in material.networks}
    dialect = dialect_for(target.dialect, config.quantize)
    judged = ledger.given({m: code(plugins.places("metrics")[m]) for m in JUDGES})
    made_of = Quantized({}, {}, {})
    for n, made in exported.items():
        if learnt[n]:
            check_learnt(config.quantize)
        if config.quantize.rescales:  # the FP32 file that is measured stays as it was exported
            made = ledger.step(
                f"prepare-int8-{n}{end}", Exported, prepare, made, material.calib.images, config.quantize
            )
        found = ledger.step(
            f"ranges-{n}{end}", dict[str, Ranges], candidates_of, made, material.calib.images, config.quantize
        )
        ranges = judged.step(
            f"method-{n}-{name}",
            Ranges,
            most_accurate,
            made,
            material.calib.images,
            dialect,
            found,
            material.task,
            config.quantize.floats,
            config.quantize.correct_bias,
        )
        first = config.targets[0].dialect
        if learnt[n] and target.dialect.symmetric_activation != first.symmetric_activation:
            log.info("%s: ranges of %s were learnt for another kind of INT8, so calibrated ones are used", name, n)
        elif learnt[n]:
            ranges = ledger.step(f"learnt-{n}-{name}", Ranges, learnt_ranges, made, ranges, learnt[n])
        made_of.ranges[n], floats = ranges, config.quantize.floats
        if config.quantize.max_drop is not None:
            made_of.frontiers[n] = within(judged, config, n, name, target, material, made, ranges)
            floats = (*floats, *made_of.frontiers[n].mix.floats)
        if target.dialect.form != "cache":
            asked = (material.calib.images, dialect, ranges, floats, config.quantize.correct_bias)
            made_of.files[n] = ledger.step(f"quantize-{n}-{name}", Exported, quantize_with, made, *asked)
    return made_of


def within(
    judged: Ledger,
    config: BuildConfig,
    network: str,
    name: str,
    target: Target,
    material: Material,
    made: Exported,
    ranges: Ranges,
) -> Frontier:
    """Which layers stay float, so that a network loses no more than `max_drop` on a target. Raises as `mixed` does."""
    limit = config.quantize.max_drop or 0.0
    known = judged.given([judged.circumstances, here(target)])
    bare = replace(target, budget_ms=None)
    asked = (made, material.calib.images, ranges, material.task, name, bare, config.quantize, limit)
    return known.step(f"mix-{network}-{name}", Frontier, mixed, *asked)


def here(target: Target) -> dict[str, object]:
    """What the price of a layer depends on beside its arguments."""
    runtime = "" if target.missing() else version(target.runtime)
    medians = code(plugins.places("metrics")["p50_ms"])
    return {"processor": cpu.name(), "runner": File.of(runner_path()), "runtime": runtime, "metrics": medians}
