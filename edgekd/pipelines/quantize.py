"""From the exported networks to their INT8 files for one target, step by step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version

from edgekd.core import plugins
from edgekd.core.artifact import Exported
from edgekd.core.mixed_precision import ParetoFront
from edgekd.core.step_cache import code_key
from edgekd.core.target import Target
from edgekd.pipelines.run import BuildInputs, TargetRun
from edgekd.stages.bench.runner import runner_files
from edgekd.stages.mixed_precision.search import MixedPrecisionRequest, choose_mixed_precision
from edgekd.stages.quantize.auto_method import select_most_accurate
from edgekd.stages.quantize.preparation import check_learned_ranges, prepare_files
from edgekd.stages.quantize.quant_spec import apply_learned_ranges
from edgekd.stages.quantize.quantize import Int8Options, write_int8_files
from edgekd.stages.quantize.ranges import Ranges, calibrate_methods_step
from edgekd.utils import cpu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeResult:
    """The networks for one target in INT8, each by its name."""

    ranges: dict[str, Ranges]
    files: dict[str, Exported]  # where the scheme has INT8 files
    pareto_fronts: dict[str, ParetoFront]  # where the accuracy that INT8 may lose is limited


def quantize_for_target(run: TargetRun, inputs: BuildInputs, exported: dict[str, Exported]) -> QuantizeResult:
    """Return the ranges of every network that the target runs in INT8, and the INT8 files if its scheme has such.

    One pass over the calibration images serves all targets that read the same opset.
    """
    config, target, scheme = run.config.quantize, run.target, run.target.scheme
    if "int8" not in target.deployment_plan.engines:
        return QuantizeResult({}, {}, {})
    images = inputs.calibration.images
    suffix = run.opset_suffix(run.opset(target))
    learned_ranges = {t.weights.name: t.weights.ranges for t in inputs.networks}
    options = Int8Options.of(scheme, config)
    evaluated = run.cache.depends_on({"task": code_key(type(inputs.dataset.task).__module__)})
    result = QuantizeResult({}, {}, {})
    for network, files in exported.items():
        learned = learned_ranges[network]
        if learned:
            check_learned_ranges(config)
        if config.rescales:  # the FP32 file that is measured stays as it was exported
            files = run.cache.step(f"prepare-int8-{network}{suffix}", prepare_files, files, images, config)
        candidates = run.cache.step(f"ranges-{network}{suffix}", calibrate_methods_step, files, images, config)
        name = f"{network}-{run.name}"
        ranges = evaluated.step(
            f"method-{name}", select_most_accurate, files, images, candidates, inputs.dataset, options
        )
        if learned and scheme.symmetric_activation != run.config.targets[0].scheme.symmetric_activation:
            log.info("%s: `%s` learned ranges for another INT8 scheme; calibrated ranges are used", run.name, network)
        elif learned:
            ranges = run.cache.step(f"learned-{name}", apply_learned_ranges, files, ranges, learned)
        result.ranges[network], keep_float = ranges, config.keep_float
        if config.max_drop is not None:
            request = MixedPrecisionRequest(files, images, ranges, inputs.dataset, options, config.max_drop)
            front = evaluated.depends_on([evaluated.dependencies, latency_key(target)]).step(
                f"mix-{name}", choose_mixed_precision, request, run.name, replace(target, budget_ms=None)
            )
            result.pareto_fronts[network] = front
            keep_float = (*keep_float, *front.selection.keep_float)
        if scheme.format != "calibration_cache":
            float_options = replace(options, keep_float=keep_float)
            result.files[network] = run.cache.step(
                f"quantize-{name}", write_int8_files, files, images, ranges, float_options
            )
    return result


def latency_key(target: Target) -> dict[str, object]:
    """Return what the latency of a layer depends on beside the arguments of its step."""
    return {
        "processor": cpu.name(),
        "runner": runner_files(),
        "runtime": "" if target.unavailable_reason() else version(target.runtime),
        "metrics": code_key(plugins.modules("metrics")["p50_ms"]),
    }
