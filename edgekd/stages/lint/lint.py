"""Find what TensorRT will refuse in an ONNX file of any origin, or run slowly, without TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.onnx import graph, inspect
from edgekd.onnx.graph import GraphView
from edgekd.stages.lint import error_rules, warning_rules
from edgekd.targets._jetpack import Jetpack, jetpack

if TYPE_CHECKING:
    import onnx

Level = Literal["error", "warning"]
Check = Callable[[GraphView, Jetpack], "Iterator[tuple[onnx.NodeProto | None, str]]"]
Rules = dict[str, tuple[Check, str]]  # by name: what breaks the rule, and the fix


@dataclass(frozen=True)
class Finding:
    """One node that breaks a rule."""

    level: Level
    rule: str
    node: str  # its name; its operator and first output if it has none
    fact: str
    fix: str


WITH_PAIRS = "quantize the FP32 file with `edgekd quantize --scheme tensorrt`"
FOLD = "fold constants first: `polygraphy surgeon sanitize --fold-constants`"
NO_PAIR = "leave out this Q/DQ pair"
HARD: Rules = {
    "opset": (error_rules.opset, "export it with an opset that this TensorRT reads"),
    "operator": (error_rules.operator, WITH_PAIRS),
    "constant": (error_rules.constant, FOLD),
    "scale-type": (error_rules.scale_type, "write float32 scales; float16 ones need opset 19"),
    "scale-positive": (error_rules.scale_positive, "calibrate again: a tensor that is always 0 gets the scale 1"),
    "zero-point-written": (error_rules.zero_point_written, "write a zero point of int8 zeros"),
    "zero-point-zero": (error_rules.zero_point_zero, "quantize symmetrically, also behind a Softmax: " + WITH_PAIRS),
    "zero-point-size": (error_rules.zero_point_size, "write as many zero points as scales"),
    "integer-type": (error_rules.integer_type, "quantize to int8: " + WITH_PAIRS),
    "per-channel-activation": (error_rules.per_channel_activation, "give the activation one scale"),
    "per-channel-size": (error_rules.per_channel_size, "write one scale for each channel of the weight's axis"),
    "per-channel-opset": (error_rules.per_channel_opset, "export with opset 13 or more, or give the weight one scale"),
    "axis-written": (error_rules.axis_written, "write the axis: 0 for Conv and Gemm with transB, else 1"),
    "axis-place": (
        error_rules.axis_place,
        "give a scale to each output channel: axis 0 for Conv and Gemm with transB, else 1",
    ),
    "folded-weight": (error_rules.folded_weight, "keep the weight float behind a Q/DQ pair: " + WITH_PAIRS),
    "quantized-bias": (error_rules.quantized_bias, "keep the bias float: " + WITH_PAIRS),
}
SOFT: Rules = {
    "ir": (warning_rules.ir, "write a lower IR version; TensorRT itself has no limit"),
    "int64": (warning_rules.int64, "harmless for an end of a Slice; elsewhere use numbers that fit into INT32"),
    "half-quantized": (warning_rules.half_quantized, "quantize both its activation and its weight, or neither"),
    "unfolded-batchnorm": (
        warning_rules.unfolded_batchnorm,
        "fold BatchNorms before you quantize (model.eval() at the export)",
    ),
    "pair-before-activation": (
        warning_rules.pair_before_activation,
        "quantize behind the activation instead, so that both fuse",
    ),
    "residual": (warning_rules.residual, "quantize only the skip: " + WITH_PAIRS),
    "commuting-pair": (warning_rules.commuting_pair, NO_PAIR + ": TensorRT moves the one before it"),
    "idle-pair": (warning_rules.idle_pair, NO_PAIR + ": it costs accuracy and gains no time"),
    "unequal-scales": (warning_rules.unequal_scales, "give them one scale, or share one QuantizeLinear"),
    "pair-behind-pad": (warning_rules.pair_behind_pad, "quantize before the Pad, or let the convolution pad"),
    "old-fusion": (warning_rules.old_fusion, NO_PAIR + " if the engine is slower than FP16"),
    "channels": (warning_rules.channels, f"multiples of {warning_rules.TENSOR_CORE} channels waste nothing"),
}


@dataclass(frozen=True)
class Verdict:
    """The findings in one file."""

    model: str
    jetpack: str
    tensorrt: str
    findings: tuple[Finding, ...]  # errors first

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)


def lint(path: Path, version: str) -> Verdict:
    """Check `path` for JetPack `version`. Raises ModelError if it is not ONNX, ConfigError for an unknown JetPack."""
    row = jetpack(version)
    return Verdict(str(path), version, row.tensorrt, tuple(findings(inspect.load(path), row)))


def findings(model: onnx.ModelProto, row: Jetpack) -> Iterator[Finding]:
    view = GraphView(model)
    levels: dict[Level, Rules] = {"error": HARD, "warning": SOFT}
    for level, rules in levels.items():
        for name, (check, fix) in rules.items():
            for node, fact in check(view, row):
                yield Finding(level, name, graph.node_label(node), fact, fix)


def format_verdict(verdict: Verdict) -> str:
    """Return the findings for a terminal; those of one rule together, with their fix."""
    lines = []
    for rule in dict.fromkeys(finding.rule for finding in verdict.findings):
        same = [finding for finding in verdict.findings if finding.rule == rule]
        lines += [f"{finding.level}: {finding.node}: {finding.fact}" for finding in same]
        lines += [f"  fix: {same[0].fix}  [{rule}]"]
    errors, warnings = verdict.count("error"), verdict.count("warning")
    runtime = f"TensorRT {verdict.tensorrt} of JetPack {verdict.jetpack}"
    if errors:
        return "\n".join([*lines, f"{verdict.model}: {runtime} will refuse it: errors {errors}, warnings {warnings}"])
    return "\n".join([*lines, f"{verdict.model}: nothing that {runtime} is known to refuse; warnings {warnings}"])


def as_json(verdict: Verdict) -> dict[str, Any]:
    from edgekd.core import serialization

    counts = {"errors": verdict.count("error"), "warnings": verdict.count("warning")}
    return {**serialization.to_json(verdict), **counts}
