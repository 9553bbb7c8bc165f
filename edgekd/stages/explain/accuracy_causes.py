"""Imprecision: why an INT8 file is not accurate, as causes with the switch to change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgekd.stages.explain.layer_error import LayerError
from edgekd.stages.explain.layers import QuantizedLayer
from edgekd.stages.explain.speed_causes import Cause, percent

FEW_STEPS = 16  # of 127, for the largest weight of a channel: less than 5 bits with the sign
OWN_DB = 20.0  # a tensor's own error is a tenth of its values
CLIPPED = 0.01
USED = 0.25  # of a range: the rest is there for a few outliers
AGREEMENT = 99.0  # percent
MARGIN_DB = 1.0  # of a loss that is told as the worst


def accuracy_causes(
    layers: list[QuantizedLayer], losses: list[LayerError], agreement: float | None, x86: bool, vnni: bool
) -> Iterator[Cause]:
    """What costs accuracy, as far as it can be seen."""
    wide = [layer for layer in layers if layer.full_range and layer.activation in ("uint8", "dynamic")]
    if x86 and not vnni and wide:
        yield Cause(
            "accuracy",
            f"this processor has no VNNI: sums of products of uint8 and full-range int8 saturate in {len(wide)} layers",
            "edgekd quantize --target cpu, on this machine: 7-bit weights",
            "onnxruntime: reduce_range=True",
            0.9,
        )
    weak = sorted((n for n in layers if not n.per_channel and 0 < n.weakest < FEW_STEPS), key=lambda n: n.weakest)
    if weak:
        worst = weak[0]
        yield Cause(
            "accuracy",
            f"{len(weak)} layers have one weight scale for all channels: channel {worst.channel} of `{worst.node}` "
            f"is left with {worst.weakest} of 127 steps",
            "edgekd quantize --per-channel; where the runtime takes one scale only: --cross-layer-equalization",
            "onnxruntime: per_channel=True",
            1 - worst.weakest / 127,
        )
    yield from range_causes(losses)
    if agreement is not None and agreement < AGREEMENT:
        worst_loss = min(losses, key=lambda one: one.whole_db, default=None)
        where = f"; least exact is `{worst_loss.tensor}` ({worst_loss.whole_db:.0f} dB)" if worst_loss else ""
        yield Cause(
            "accuracy",
            f"INT8 and FP32 agree on {agreement:.1f} % of the images{where}",
            "another `quantize.method` (percentile, entropy), or a student taught for INT8 (method quant_aware)",
            "onnxruntime: calibrate_method=CalibrationMethod.Entropy",
            1 - agreement / 100,
        )


def range_causes(losses: list[LayerError]) -> Iterator[Cause]:
    """Activations whose range is too tight, too wide, or that 8 bits cannot hold."""
    poor = sorted((one for one in losses if one.own_db < OWN_DB), key=lambda one: one.own_db)
    tight = [one for one in poor if one.clipped >= CLIPPED]
    spread = [one for one in poor if one.clipped < CLIPPED and one.used < USED]
    rest = [one for one in poor if one not in tight and one not in spread]
    if tight:
        one = tight[0]
        text = f"{percent(one.clipped)} of the values of `{one.tensor}` lie beyond its range ({one.own_db:.0f} dB)"
        yield Cause(
            "accuracy",
            named(text, tight),
            "`quantize.method: minmax`, and calibration images like those it meets",
            "onnxruntime: CalibrationMethod.MinMax, or a higher CalibPercentile",
            badness(one),
        )
    if spread:
        one = spread[0]
        text = f"a few outliers of `{one.tensor}` leave {percent(one.used)} of its steps to 99.9 % of its values"
        yield Cause(
            "accuracy",
            named(f"{text} ({one.own_db:.0f} dB)", spread),
            "`quantize.method: percentile` (or entropy)",
            "onnxruntime: CalibrationMethod.Percentile, extra_options CalibPercentile",
            badness(one),
        )
    if rest:
        one = rest[0]
        yield Cause(
            "accuracy",
            named(f"8 bits are too few for `{one.tensor}` ({one.own_db:.0f} dB)", rest),
            "keep what reads it float, or a student taught for INT8 (method quant_aware)",
            "onnxruntime: nodes_to_exclude",
            badness(one),
        )


def named(text: str, losses: list[LayerError]) -> str:
    return text if len(losses) == 1 else f"{text}, and {len(losses) - 1} more tensors"


def badness(one: LayerError) -> float:
    """From 0 for OWN_DB and more to 1 for an error as large as the values."""
    return float(np.clip(1 - one.own_db / OWN_DB, 0.0, 1.0))
