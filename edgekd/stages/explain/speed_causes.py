"""Causes: why an INT8 file is not faster, or not accurate, each in one line with the switch to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from edgekd.core.bench_result import Interval
from edgekd.stages.bench import statistics
from edgekd.stages.explain.float_regions import INLINED, SIGNED, FloatRegion
from edgekd.stages.explain.layers import Form, QuantizedLayer
from edgekd.stages.explain.ort_profile import Operator, Profile
from edgekd.stages.lint.warning_rules import ACTIVATIONS

COST = 0.1  # of the time of all operators; what takes less is no reason for a verdict
SMALL = 0.25  # of the time, for the conversion of input and output
IDLE = 0.4  # of a call, outside of the operators
CHANGED = 1.05  # by which factor a time must differ beyond its interval
WASTE = 0.75  # of a register's places are used, or more
# vpdpbusd sums four products of bytes into each of the 16 lanes of a 512-bit register
SUMS, LANES = 4, 16


@dataclass(frozen=True)
class Cause:
    about: Literal["refused", "speed", "accuracy"]
    verdict: str
    fix: str  # of edgekd
    other_tools: str = ""  # the option of another tool
    share: float = 0.0  # of the time in INT8; of accuracy, how bad it is from 0 to 1


@dataclass(frozen=True)
class Diagnosis:
    """All that is known of one file on one processor."""

    form: Form
    layers: list[QuantizedLayer]
    profile: Profile
    float_regions: list[FloatRegion]
    base: Profile | None = None  # of the FP32 file
    call_us: float | None = None  # the median of a call in INT8, profiling off
    x86: bool = True
    vnni: bool = True

    @cached_property
    def int8(self) -> dict[str, Operator]:
        return {o.name: o for o in self.profile.operators if o.name}

    def float_twin(self, name: str) -> Operator | None:
        """The operator of the FP32 file that became this one."""
        plain = name.removesuffix("_quant")  # as onnxruntime's quantizer calls it
        return next((o for o in self.base.operators if o.name == plain), None) if self.base else None

    @cached_property
    def signed(self) -> bool:
        """Whether it is a signed file; NNCF's is mixed."""
        return self.x86 and 2 * sum(layer.activation == "int8" for layer in self.layers) > len(self.layers)

    def is_signed(self, one: FloatRegion) -> bool:
        """Whether an island is there because of its int8 activations."""
        kinds = [kind for kind, _ in one.reasons]
        return self.x86 and SIGNED in (kinds if self.signed else kinds[:1])

    @cached_property
    def slower(self) -> list[tuple[Operator, Operator]]:
        """Integer operators that take longer than in FP32, beyond the noise, each with its float twin."""
        slower_pairs = []
        for name, int8 in self.int8.items():
            change, twin = self.speedup(name), self.float_twin(name)
            if int8.kind == "integer" and twin and change and change.high < 1 / CHANGED:
                slower_pairs.append((int8, twin))
        return sorted(slower_pairs, key=lambda pair: pair[1].median_us - pair[0].median_us)

    def speedup(self, name: str) -> Interval | None:
        """How many times faster a layer became."""
        twin, int8 = self.float_twin(name), self.int8.get(name)
        if twin is None or int8 is None or not int8.median_us or not twin.median_us:
            return None
        return statistics.ratio(twin.us[:, None], int8.us[:, None], seed=0)


def speed_causes(case: Diagnosis) -> list[Cause]:
    """Why it is not faster on this processor, what costs most first."""
    causes = [*signed(case), *floats(case), *slower(case), *surroundings(case), *channels(case)]
    return sorted((cause for cause in causes if cause.share >= COST), key=lambda cause: -cause.share)


def signed(case: Diagnosis) -> Iterator[Cause]:
    """Integer kernels for int8 activations are slow on x86: QLinearConv took 494 us against 30 us with uint8 (32
    channels, 32 x 32, onnxruntime 1.31 on a Zen 5 core); with Q/DQ most operators stay in float there."""
    us = sum(one.us for one in case.float_regions if case.is_signed(one))
    if case.signed:
        slow = {int8.name: int8.median_us for int8, _ in case.slower}
        if case.form == "QOperator":
            slow |= {n.node: case.int8[n.node].median_us for n in case.layers if n.node in case.int8}
        us += sum(slow.values())
    if us:
        yield Cause(
            "speed",
            f"activations are signed (int8), which onnxruntime on x86 computes in float or in slow kernels: "
            f"{percent(case.profile.share(us))} of the time",
            "edgekd quantize --scheme ort-x86 (or --target cpu)",
            "onnxruntime: quantize_static(activation_type=QuantType.QUInt8), without ActivationSymmetric",
            case.profile.share(us),
        )


FIXES = {  # by the kind of reason: edgekd's switch, another tool's option
    "dynamic": (
        "edgekd quantize --scheme ort-x86: static ranges from calibration images",
        "onnxruntime: quantize_static instead of quantize_dynamic, for convolutions",
    ),
    "channels": (
        "edgekd quantize: an activation has one scale in all schemes",
        "NNCF: activations_quantization_params=QuantizationParameters(per_channel=False), an advanced parameter",
    ),
    "relu": (
        "edgekd quantize --scheme ort-x86: asymmetric ranges begin at 0 behind a Relu",
        "onnxruntime: without ActivationSymmetric",
    ),
    "weight": ("edgekd quantize: quantizes every weight that has integer kernels", "onnxruntime: nodes_to_exclude"),
    "input": (
        "edgekd quantize --scheme ort-x86: a pair around every operator",
        "onnxruntime: quantize_static instead of NNCF's or TensorRT's placement",
    ),
    "output": (
        "edgekd quantize --scheme ort-x86: a pair around every operator",
        "onnxruntime: OpTypesToExcludeOutputQuantization",
    ),
    "scales": ("edgekd quantize --scheme ort-x86: one scale before and behind operators that only move", ""),
    "unknown": ("edgekd quantize --scheme ort-x86, from the FP32 file", ""),
}


def floats(case: Diagnosis) -> Iterator[Cause]:
    """Islands of float with the same reason together."""
    groups: dict[str, list[FloatRegion]] = {}
    for one in case.float_regions:
        if one.reasons and not case.is_signed(one):
            kind, sentence = one.reasons[0]
            groups.setdefault(sentence if kind == "kernel" else kind, []).append(one)
    for group in groups.values():
        kind, sentence = group[0].reasons[0]
        lost = sum(int8.median_us - twin.median_us for int8, twin in case.slower) if kind == "dynamic" else 0.0
        share = case.profile.share(sum(one.us for one in group) + lost)
        pairs = sum(one.pairs for one in group)
        ops = sum(len(one.floats) for one in group)
        switch, elsewhere = FIXES.get(kind, ("", ""))
        if kind == "kernel":
            switch, elsewhere = instead_of(sentence.rpartition(" ")[2])
        places = f" ({len(group)} places)" if len(group) > 1 else ""
        yield Cause(
            "speed",
            f"{sentence}{places}: {ops} operators in float with {pairs} Q/DQ left take {percent(share)} of the time",
            switch,
            elsewhere,
            share,
        )


def instead_of(op: str) -> tuple[str, str]:
    """What to do about an operator without an integer kernel: edgekd's switch, another tool's option."""
    if op in (*ACTIVATIONS, *INLINED):
        return (
            f"a student without {op} (`student.model`: resnet and mobilenet_v2 have ReLU only)",
            f"ReLU in the place of {op}, before training",
        )
    if op == "ReduceMean":
        return "export the mean over height and width as GlobalAveragePool, which has an integer kernel", ""
    return f"a student without {op}", "onnxruntime: nodes_to_exclude for what is around it: fewer Q/DQ"


def slower(case: Diagnosis) -> Iterator[Cause]:
    """Integer operators that take longer than their float twins, beyond the noise."""
    depthwise = {layer.node for layer in case.layers if layer.depthwise}
    lost: dict[bool, list[tuple[Operator, Operator]]] = {True: [], False: []}
    for int8, twin in () if case.signed or case.form == "dynamic" else case.slower:
        lost[int8.name in depthwise].append((int8, twin))
    for deep, group in lost.items():
        us, before = (sum(pair[i].median_us for pair in group) for i in (0, 1))
        names = ", ".join(f"`{int8.name}`" for int8, _ in group[:3])
        what = "depthwise convolutions" if deep else "operators"
        yield Cause(
            "speed",
            f"{len(group)} {what} are slower in INT8 ({us:.0f} µs, {before:.0f} µs in FP32): {names}",
            "a student with full convolutions (`student.model`: resnet)" if deep else "keep them float",
            "onnxruntime: nodes_to_exclude",
            case.profile.share(us - before),
        )


def surroundings(case: Diagnosis) -> Iterator[Cause]:
    """What a small network pays beside its operators."""
    edges = sum(one.us for one in case.float_regions if one.edge) + case.profile.us("layout")
    share = case.profile.share(edges)
    if share >= SMALL:
        yield Cause(
            "speed",
            f"the network is so small that converting its input, output and layouts takes {percent(share)} of the time",
            "several images a call, or FP32; quantization has little to gain here",
            share=share,
        )
    if case.call_us:
        idle = 1 - case.profile.total_us / case.call_us
        if idle >= IDLE:
            yield Cause(
                "speed",
                f"{percent(idle)} of a call ({case.call_us:.0f} µs) lies outside of the operators: starting them costs "
                "the same in FP32",
                "fewer, larger layers (`student.model`), or several images a call",
                share=idle,
            )


def channels(case: Diagnosis) -> Iterator[Cause]:
    if not case.x86:
        return
    narrow = [n for n in case.layers if not n.depthwise and n.filled(SUMS, LANES) < WASTE and n.node in case.int8]
    us = sum(case.int8[n.node].median_us for n in narrow)
    names = ", ".join(f"`{n.node}` ({n.leaving} channels)" for n in narrow[:3])
    yield Cause(
        "speed",
        f"{len(narrow)} layers fill less than {percent(WASTE)} of the vector registers: {names}",
        f"`student.model` with widths that are multiples of {LANES}",
        share=case.profile.share(us),
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"
