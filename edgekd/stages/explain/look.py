"""Explain: why an INT8 file, of edgekd or of another tool, is not faster or not accurate, and the switch to change."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version as package
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgekd.core import onnx_facts, processor
from edgekd.core.artifact import TensorSpec
from edgekd.core.errors import ConfigError, ModelError, TargetUnavailable
from edgekd.core.exactness import exact_entries
from edgekd.core.plugins import unknown
from edgekd.core.trial import Interval
from edgekd.stages.bench import statistics
from edgekd.stages.bench.benchmark import BenchConfig
from edgekd.stages.bench.compare import compare_files
from edgekd.stages.explain import causes
from edgekd.stages.explain.causes import COST, Case, Cause, percent
from edgekd.stages.explain.explanation import Explanation, LayerTime, Pairs, Place, Time
from edgekd.stages.explain.fidelity import losses, rescaled
from edgekd.stages.explain.imprecision import accuracy
from edgekd.stages.explain.islands import Island, islands
from edgekd.stages.explain.kernels import floats, kernels
from edgekd.stages.explain.layers import Layer, form, layers
from edgekd.stages.explain.profile import PAIRS, Profile, profiled
from edgekd.stages.lint import lint
from edgekd.stages.lint.graph import View
from edgekd.stages.quantize.calibrate import load_calibration
from edgekd.targets._jetpack import jetpack
from edgekd.targets.cpu import here
from edgekd.targets.openvino import OpenVino

TARGETS = ("cpu", "openvino", "jetson")
JETPACK = "6.2"
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}
ALONE = "compared with nothing"  # the verdict without a reference
PROFILED = "onnxruntime's profiler adds to every operator: compare their times with each other, not with a call"
NOISE = 8  # inputs where no images are given
BLOCKS, BLOCK_S = 20, 0.1  # of the comparison of whole calls: rounds, and about how long a block may take


def explain(
    path: Path,
    reference: Path | None = None,
    images: Path | None = None,
    target: str = "cpu",
    version: str | None = None,
    threads: int = 1,
) -> Explanation:
    """Look at the INT8 file `path`, and with its FP32 file at what became of every layer.

    `images` are network inputs, .npz or .npy; without them times are taken on noise, and accuracy is not judged.
    `version` is a JetPack. Raises ConfigError if `path` is no quantized ONNX file, or options do not fit together.
    """
    if target not in TARGETS:
        raise unknown(f"INT8 on `{target}` cannot be explained", target, list(TARGETS))
    if version is not None and target != "jetson":
        raise ConfigError("a JetPack belongs to the target jetson", hint="leave out --jetpack, or say --target jetson")
    view = View(loaded(path), jetpack(version or JETPACK))
    kind = form(view)
    if kind is None:
        raise ConfigError(f"`{path}` is not quantized", hint="give the INT8 file, and its FP32 file with --reference")
    if reference is not None and form(View(loaded(reference), view.jetpack)) is not None:
        raise ConfigError(f"the reference `{reference}` is quantized", hint="give the FP32 file that it was made from")
    spec = onnx_facts.single_input(view.model, path)
    # an array out of an .npz may lie askew: numpy would then copy all of it at every call, and empty the caches
    fed = None if images is None else np.require(load_calibration(images, spec), requirements="A")
    exact = [] if reference is None or fed is None else losses(view, path, reference, fed)
    elsewhere = target == "jetson"  # the others are this very processor, with its faults
    start = Explanation(
        model=str(path),
        form=kind,
        maker=" ".join(filter(None, (view.model.producer_name, view.model.producer_version))) or "not said",
        target=target,
        where="",
        pairs=None,
        times=(),
        layers=tuple(LayerTime(layer, None, None, "") for layer in layers(view)),
        places=(),
        losses=tuple(exact),
        agreement=None if fed is None or reference is None else agreement(path, reference, fed, spec, elsewhere),
        latency="",
        notes=unseen(view, reference, images, target),
        causes=(),
        verdicts=(),
        session_config=exact_entries() if elsewhere else {},
    )
    if target == "jetson":
        return concluded(on_jetson(start, path, version or JETPACK))
    inputs = noise(spec) if fed is None else fed
    if target == "openvino":
        return concluded(on_openvino(start, path, reference, inputs, threads))
    latency, call_us, doubts = whole_calls(path, reference, target, inputs, threads)
    start = replace(start, latency=latency, notes=(*start.notes, *doubts))
    return concluded(on_cpu(start, view, path, reference, inputs, threads, call_us))


def loaded(path: Path) -> Any:
    """The parsed file. Raises ConfigError, for what is asked for is a file of a certain kind."""
    try:
        return onnx_facts.load(path)
    except ModelError as error:
        raise ConfigError(error.what, hint="give the INT8 file, and its FP32 file with --reference") from error


def agreement(path: Path, reference: Path, inputs: np.ndarray, spec: TensorSpec, exact: bool) -> float | None:
    """Percent of the inputs on which both have the same top class; None if the network is no classifier.

    In exact sums, or in those of this processor.
    """
    count = len(inputs) // max(spec.shape[0], 1) * max(spec.shape[0], 1)
    ours, theirs = (onnx_facts.answers(p, inputs[:count], threads=1, exact=exact) for p in (path, reference))
    if ours.ndim != 2 or ours.shape != theirs.shape:
        return None
    return float(100 * (ours.argmax(1) == theirs.argmax(1)).mean())


def noise(spec: TensorSpec) -> np.ndarray:
    count = NOISE * max(spec.shape[0], 1)
    shape = [size or 1 for size in spec.shape[1:]]
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)


def unseen(view: View, reference: Path | None, images: Path | None, target: str) -> tuple[str, ...]:
    done = rescaled(view)
    found = [f"channels were rescaled ({done}): what inner layers lose is not compared"] if done else []
    if target == "jetson":
        found.append("nothing was executed: TensorRT builds its engine on the device")
    if reference is None:
        found.append("no --reference: INT8 is compared with nothing")
    if images is None:
        times = "" if target == "jetson" else "times are those of noise, and "
        found.append(f"no --images: {times}what layers lose is not measured")
    return tuple(found)


def whole_calls(
    path: Path, reference: Path | None, target: str, inputs: np.ndarray, threads: int
) -> tuple[str, float | None, tuple[str, ...]]:
    """INT8 against FP32 by the runner: the verdict, the median of an INT8 call in µs, and doubts."""
    models = (path,) if reference is None else (reference, path)
    session = onnx_facts.session(models[0], threads=threads, exact=False)
    value, batch = session.get_inputs()[0], max(onnx_facts.facts(models[0]).input.shape[0], 1)
    started = time.perf_counter()
    session.run(None, {value.name: inputs[:batch]})
    call_s = time.perf_counter() - started
    config = BenchConfig(BLOCKS, int(np.clip(BLOCK_S / call_s, 4, 35)), warmup_s=0.2, metrics=("p50_ms",))
    with TemporaryDirectory(prefix="edgekd-") as folder:
        np.save(f"{folder}/images.npy", inputs)
        result = compare_files(Path(folder), models, target, threads, Path(folder, "images.npy"), None, config)
    found = {m.contestant.name: m for m in result.measurements}
    own = next(m for m in reversed(result.measurements) if m.contestant.precision == "int8")
    base = "" if reference is None else f" (FP32 {next(iter(found.values())).readings['p50_ms']:.3f} ms)"
    told = own.verdict or ALONE
    return f"{own.readings['p50_ms']:.3f} ms a call{base}: {told}", 1000 * own.readings["p50_ms"], result.warnings


def on_cpu(
    start: Explanation,
    view: View,
    path: Path,
    reference: Path | None,
    inputs: np.ndarray,
    threads: int,
    call_us: float | None,
) -> Explanation:
    """What onnxruntime on this processor makes of it."""
    paths = (path,) if reference is None else (path, reference)
    own, *rest = profiled(paths, inputs, threads)
    base = rest[0] if rest else None
    found = islands(view, own)
    chips = set(processor.flags())
    x86, vnni = here() == "x86", bool(VNNI & chips)
    known = [one.layer for one in start.layers]
    case = Case(start.form, known, own, found, base, call_us, x86, vnni)
    accurate = accuracy(known, list(start.losses), start.agreement, x86, vnni)
    flags = " ".join(flag for flag in processor.flags())
    return replace(
        start,
        where=f"onnxruntime {package('onnxruntime')}, threads: {threads}, {processor.name()} ({flags})",
        pairs=Pairs(
            sum(node.op_type in PAIRS for node in view.nodes),
            sum(o.kind == "pairs" for o in own.operators),
            sum(one.pairs for one in found if one.edge),
        ),
        notes=(*start.notes, PROFILED),
        times=tuple(times(own, base)),
        layers=tuple(timed(case, one.layer) for one in start.layers),
        places=tuple(place(own, one) for one in found if not one.edge),
        causes=(*causes.speed(case), *sorted(accurate, key=lambda cause: -cause.share)),
    )


FAMILY = {  # of names for one operator
    "Gemm": "Gemm, MatMul",
    "MatMul": "Gemm, MatMul",
    "FusedGemm": "Gemm, MatMul",
    "FusedMatMul": "Gemm, MatMul",
    "MatMulInteger": "Gemm, MatMul",
    "MatMulIntegerToFloat": "Gemm, MatMul",
    "DynamicQuantizeMatMul": "Gemm, MatMul",
    "ConvInteger": "Conv",
    "FusedConv": "Conv",
}


def family(op: str, kind: str) -> str:
    if kind in ("pairs", "layout"):
        return {"pairs": "Q/DQ", "layout": "layout"}[kind]
    plain = op.removeprefix("QLinear").removeprefix("Nhwc")
    plain = plain.removeprefix("Q") if plain == "QGemm" else plain
    return FAMILY.get(plain, plain)


def times(own: Profile, base: Profile | None) -> list[Time]:
    """By kind of operator, what takes longest in INT8 first."""
    sums: dict[str, list[float]] = {}
    for profile, column in ((base, 0), (own, 1)):
        for one in profile.operators if profile else ():
            row = sums.setdefault(family(one.op, one.kind), [0.0, 0.0, 0.0])
            row[column + (column == 1 and one.kind != "integer")] += one.median_us
    found = [Time(op, row[0] if base else None, row[1], row[2]) for op, row in sums.items()]
    return sorted(found, key=lambda one: -(one.integer_us + one.float_us))


def timed(case: Case, layer: Layer) -> LayerTime:
    """What a layer takes, and by what factor that changed; a change within the noise is none."""
    own, twin, change = case.int8.get(layer.node), case.float_twin(layer.node), case.speedup(layer.node)
    said = ""
    if change and change.low > causes.CHANGED:
        said = statistics.times("faster", change)
    elif change and change.high < 1 / causes.CHANGED:
        said = statistics.times("slower", Interval(1 / change.high, 1 / change.mid, 1 / change.low))
    elif change:
        said = "as fast"
    return LayerTime(layer, twin.median_us if twin else None, own.median_us if own else None, said)


def place(profile: Profile, one: Island) -> Place:
    ops = tuple(f"{o.op} `{o.name}`" if o.name else o.op for o in one.floats)
    sentences = tuple(sentence for _, sentence in one.reasons)
    return Place(ops, one.between, one.pairs, one.us, profile.share(one.us), sentences)


def on_openvino(
    start: Explanation, path: Path, reference: Path | None, inputs: np.ndarray, threads: int
) -> Explanation:
    """What OpenVINO on this processor makes of it; its kernels are told apart by their precision only."""
    if reason := OpenVino(threads=threads).missing():
        raise TargetUnavailable(f"target `openvino`: {reason}", hint="explain it for the target cpu")
    where = f"OpenVINO {package('openvino')}, threads: {threads}, {processor.name()}"
    start = replace(start, where=where)
    try:
        found = kernels(path, inputs, threads)
    except ModelError as error:
        switch = "edgekd quantize --dialect openvino"
        refused = Cause("refused", error.what, switch, "onnxruntime: quant_format=QuantFormat.QDQ", 1.0)
        return replace(start, causes=(refused,))
    latency, _, doubts = whole_calls(path, reference, "openvino", inputs, threads)
    rows: dict[str, list[float]] = {}
    for one in found:
        rows.setdefault(one.op, [0.0, 0.0])[not one.integer] += one.us
    accurate = accuracy([n.layer for n in start.layers], list(start.losses), start.agreement, False, True)
    return replace(
        start,
        latency=latency,
        notes=(*start.notes, *doubts, "OpenVINO tells means of all calls, disturbed ones too: read them as shares"),
        times=tuple(Time(op, None, *us) for op, us in sorted(rows.items(), key=lambda row: -sum(row[1]))),
        causes=(*floats(found), *accurate),
    )


def on_jetson(start: Explanation, path: Path, version: str) -> Explanation:
    """What TensorRT will say: nothing is executed."""
    verdict = lint.lint(path, version)
    found = []
    for rule in dict.fromkeys(finding.rule for finding in verdict.findings):
        same = [finding for finding in verdict.findings if finding.rule == rule]
        more = f", and {len(same) - 1} more" if len(same) > 1 else ""
        about: Any = "refused" if same[0].level == "error" else "speed"
        text = f"`{same[0].node}`: {same[0].fact}{more} [{rule}]"
        found.append(Cause(about, text, same[0].fix, share=1.0 if about == "refused" else 0.0))
    known = [one.layer for one in start.layers]
    accurate = accuracy(known, list(start.losses), start.agreement, x86=False, vnni=True)
    where = f"TensorRT {verdict.tensorrt} of JetPack {version}, by its rules"
    return replace(start, where=where, causes=(*found, *accurate))


def concluded(told: Explanation) -> Explanation:
    """With one line for each cause, or one that says that there is none."""
    lines = tuple(f"{c.about}: {c.verdict}" + (f" -> {c.switch}" if c.switch else "") for c in told.causes)
    end = told.latency or told.where
    slow = told.latency and not told.latency.endswith(ALONE) and "faster" not in told.latency
    fine = f"INT8 is not faster, and no single cause takes {percent(COST)} of its time" if slow else "nothing is wrong"
    fine = f"{'no cause was found' if statistics.NOISY in told.latency else fine}: {end}"
    return replace(told, verdicts=lines or (fine,))
