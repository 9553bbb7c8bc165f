"""Explain: why an INT8 file, of edgekd or of another tool, is not faster or not accurate, and the switch to change."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import version as package
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgekd.core.artifact import TensorSpec
from edgekd.core.bench_result import Interval
from edgekd.core.plugins import unknown_name
from edgekd.core.task import matching_task
from edgekd.errors import ConfigError, ModelError, TargetUnavailable
from edgekd.onnx import inspect
from edgekd.onnx import session as onnx_session
from edgekd.onnx.exact_sums import exact_entries
from edgekd.onnx.graph import GraphView
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench import statistics
from edgekd.stages.bench.compare_files import FileComparison, compare_files
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.explain import speed_causes
from edgekd.stages.explain.accuracy_causes import accuracy_causes
from edgekd.stages.explain.float_regions import FloatRegion, find_float_regions
from edgekd.stages.explain.layer_error import layer_errors, rescaled
from edgekd.stages.explain.layers import QuantizedLayer, form, layers
from edgekd.stages.explain.openvino_profile import floats, kernels
from edgekd.stages.explain.ort_profile import QDQ_OPS, Profile, profile_files
from edgekd.stages.explain.result import Explanation, FloatPlace, LayerTime, QdqCounts, Time
from edgekd.stages.explain.speed_causes import COST, Cause, Diagnosis, percent
from edgekd.stages.lint import lint
from edgekd.targets._jetpack import jetpack
from edgekd.targets.cpu import this_arch
from edgekd.targets.openvino import OpenVino
from edgekd.utils import cpu
from edgekd.utils.arrays import noise

TARGETS = ("cpu", "openvino", "jetson")
JETPACK = "6.2"
ALONE = "compared with nothing"  # the verdict without a reference
PROFILED = "onnxruntime's profiler adds to every operator: compare their times with each other, not with a call"
NOISE = 8  # inputs where no images are given
BLOCKS, BLOCK_S = 20, 0.1  # of the comparison of whole calls: rounds, and about how long a block may take


@dataclass(frozen=True)
class Files:
    """The INT8 file, its FP32 file, and what they are run with."""

    view: GraphView
    path: Path
    reference: Path | None
    inputs: np.ndarray
    threads: int


def explain(
    path: Path,
    reference: Path | None = None,
    images: Path | None = None,
    target: str = "cpu",
    version: str | None = None,
    threads: int = 1,
) -> Explanation:
    """Examine the INT8 file `path`, and compare every layer with its FP32 file.

    `images` are network inputs, .npz or .npy; without them times are taken on noise, and accuracy is not judged.
    `version` is a JetPack. Raises ConfigError if `path` is no quantized ONNX file, or options do not fit together.
    """
    if target not in TARGETS:
        raise unknown_name(f"INT8 on `{target}` cannot be explained", target, list(TARGETS))
    if version is not None and target != "jetson":
        raise ConfigError("a JetPack belongs to the target jetson", hint="leave out --jetpack, or say --target jetson")
    jetpack(version or JETPACK)  # raises for one that is not in the table
    view = GraphView(loaded(path))
    kind = form(view)
    if kind is None:
        raise ConfigError(f"`{path}` is not quantized", hint="give the INT8 file, and its FP32 file with --reference")
    if reference is not None and form(GraphView(loaded(reference))) is not None:
        raise ConfigError(f"the reference `{reference}` is quantized", hint="give the FP32 file that it was made from")
    spec = inspect.single_input(view.model, path)
    # an array out of an .npz may lie askew: numpy would then copy all of it at every call, and empty the caches
    fed = None if images is None else np.require(load_calibration(images, spec), requirements="A")
    exact = [] if reference is None or fed is None else layer_errors(view, path, reference, fed)
    elsewhere = target == "jetson"  # the others are this very processor, with its faults
    start = Explanation(
        model=str(path),
        form=kind,
        producer=" ".join(filter(None, (view.model.producer_name, view.model.producer_version))) or "not said",
        target=target,
        where="",
        pairs=None,
        times=(),
        layers=tuple(LayerTime(layer, None, None, "") for layer in layers(view)),
        places=(),
        losses=tuple(exact),
        agreement=None if fed is None or reference is None else agreement(path, reference, fed, spec, elsewhere),
        session_config=exact_entries() if elsewhere else {},
        latency="",
        notes=unseen(view, reference, images, target),
        causes=(),
        verdicts=(),
    )
    if target == "jetson":
        return concluded(on_jetson(start, path, version or JETPACK))
    files = Files(view, path, reference, noise_inputs(spec) if fed is None else fed, threads)
    if target == "openvino":
        return concluded(on_openvino(start, files))
    latency, call_us, doubts = whole_calls(files, target)
    start = replace(start, latency=latency, notes=(*start.notes, *doubts))
    return concluded(on_cpu(start, files, call_us))


def loaded(path: Path) -> Any:
    """The parsed file. Raises ConfigError, for what is asked for is a file of a certain kind."""
    try:
        return inspect.load(path)
    except ModelError as error:
        raise ConfigError(error.what, hint="give the INT8 file, and its FP32 file with --reference") from error


def agreement(path: Path, reference: Path, inputs: np.ndarray, spec: TensorSpec, exact: bool) -> float | None:
    """Return the percent of inputs on which both have the same top class; None if the network is no classifier.

    Sums are exact, or those of this processor.
    """
    count = len(inputs) // max(spec.shape[0], 1) * max(spec.shape[0], 1)
    int8, fp32 = (onnx_session.run_outputs(p, inputs[:count], threads=1, exact=exact) for p in (path, reference))
    task = matching_task(inspect.facts(reference).outputs)
    if task is None or not task.class_logits or [o.shape for o in int8] != [o.shape for o in fp32]:
        return None
    return task.agreement(int8, fp32)


def noise_inputs(spec: TensorSpec) -> np.ndarray:
    count = NOISE * max(spec.shape[0], 1)
    shape = [size or 1 for size in spec.shape[1:]]
    return noise((count, *shape))


def unseen(view: GraphView, reference: Path | None, images: Path | None, target: str) -> tuple[str, ...]:
    rescaling = rescaled(view)
    notes = [f"channels were rescaled ({rescaling}): what inner layers lose is not compared"] if rescaling else []
    if target == "jetson":
        notes.append("nothing was executed: TensorRT builds its engine on the device")
    if reference is None:
        notes.append("no --reference: INT8 is compared with nothing")
    if images is None:
        times = "" if target == "jetson" else "times are those of noise, and "
        notes.append(f"no --images: {times}what layers lose is not measured")
    return tuple(notes)


def whole_calls(files: Files, target: str) -> tuple[str, float, tuple[str, ...]]:
    """Compare INT8 with FP32 by the runner: return the verdict, the median of an INT8 call in µs, and warnings."""
    models = (files.path,) if files.reference is None else (files.reference, files.path)
    session = onnx_session.open_session(models[0], threads=files.threads, exact=False)
    value, batch = session.get_inputs()[0], max(inspect.facts(models[0]).input.shape[0], 1)
    started = time.perf_counter()
    session.run(None, {value.name: files.inputs[:batch]})
    call_s = time.perf_counter() - started
    config = BenchConfig(BLOCKS, int(np.clip(BLOCK_S / call_s, 4, 35)), warmup_s=0.2, metrics=("p50_ms",))
    with TemporaryDirectory(prefix="edgekd-") as folder:
        np.save(f"{folder}/images.npy", files.inputs)
        comparison = FileComparison(models, target, config, Path(folder, "images.npy"), threads=files.threads)
        result = compare_files(Path(folder), comparison)
    by_name = {m.model.name: m for m in result.measurements}
    int8 = next(m for m in reversed(result.measurements) if m.model.precision == "int8")
    base = "" if files.reference is None else f" (FP32 {next(iter(by_name.values())).metrics['p50_ms']:.3f} ms)"
    verdict = int8.verdict or ALONE
    return f"{int8.metrics['p50_ms']:.3f} ms a call{base}: {verdict}", 1000 * int8.metrics["p50_ms"], result.warnings


def on_cpu(start: Explanation, files: Files, call_us: float) -> Explanation:
    """Return the explanation with what onnxruntime does with the file on this processor."""
    paths = (files.path,) if files.reference is None else (files.path, files.reference)
    int8, *rest = profile_files(paths, files.inputs, files.threads)
    fp32 = rest[0] if rest else None
    regions = find_float_regions(files.view, int8)
    x86, vnni = this_arch() == "x86", bool(cpu.VNNI & set(cpu.flags()))
    quantized = [one.layer for one in start.layers]
    case = Diagnosis(start.form, quantized, int8, regions, fp32, call_us, x86, vnni)
    accuracy = accuracy_causes(quantized, list(start.losses), start.agreement, x86, vnni)
    flags = " ".join(cpu.flags())
    return replace(
        start,
        where=f"onnxruntime {package('onnxruntime')}, threads: {files.threads}, {cpu.name()} ({flags})",
        pairs=QdqCounts(
            sum(node.op_type in QDQ_OPS for node in files.view.nodes),
            sum(o.kind == "pairs" for o in int8.operators),
            sum(one.pairs for one in regions if one.edge),
        ),
        notes=(*start.notes, PROFILED),
        times=tuple(times(int8, fp32)),
        layers=tuple(timed(case, one.layer) for one in start.layers),
        places=tuple(place(int8, one) for one in regions if not one.edge),
        causes=(*speed_causes.speed_causes(case), *sorted(accuracy, key=lambda cause: -cause.share)),
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


def times(int8: Profile, base: Profile | None) -> list[Time]:
    """By kind of operator, what takes longest in INT8 first."""
    sums: dict[str, list[float]] = {}
    for profile, column in ((base, 0), (int8, 1)):
        for one in profile.operators if profile else ():
            row = sums.setdefault(family(one.op, one.kind), [0.0, 0.0, 0.0])
            row[column + (column == 1 and one.kind != "integer")] += one.median_us
    rows = [Time(op, row[0] if base else None, row[1], row[2]) for op, row in sums.items()]
    return sorted(rows, key=lambda one: -(one.integer_us + one.float_us))


def timed(case: Diagnosis, layer: QuantizedLayer) -> LayerTime:
    """What a layer takes, and by what factor that changed; a change within the noise is none."""
    int8, twin, change = case.int8.get(layer.node), case.float_twin(layer.node), case.speedup(layer.node)
    text = ""
    if change and change.low > speed_causes.CHANGED:
        text = statistics.times("faster", change)
    elif change and change.high < 1 / speed_causes.CHANGED:
        text = statistics.times("slower", Interval(1 / change.high, 1 / change.estimate, 1 / change.low))
    elif change:
        text = "as fast"
    return LayerTime(layer, twin.median_us if twin else None, int8.median_us if int8 else None, text)


def place(profile: Profile, one: FloatRegion) -> FloatPlace:
    ops = tuple(f"{o.op} `{o.name}`" if o.name else o.op for o in one.floats)
    sentences = tuple(sentence for _, sentence in one.reasons)
    return FloatPlace(ops, one.between, one.pairs, one.us, profile.share(one.us), sentences)


def on_openvino(start: Explanation, files: Files) -> Explanation:
    """Return the explanation with what OpenVINO does on this processor; only the precision of kernels is known."""
    if reason := OpenVino(threads=files.threads).unavailable_reason():
        raise TargetUnavailable(f"target `openvino`: {reason}", hint="explain it for the target cpu")
    where = f"OpenVINO {package('openvino')}, threads: {files.threads}, {cpu.name()}"
    start = replace(start, where=where)
    try:
        executed = kernels(files.path, files.inputs, files.threads)
    except ModelError as error:
        fix = "edgekd quantize --scheme openvino"
        refused = Cause("refused", error.what, fix, "onnxruntime: quant_format=QuantFormat.QDQ", 1.0)
        return replace(start, causes=(refused,))
    latency, _, doubts = whole_calls(files, "openvino")
    rows: dict[str, list[float]] = {}
    for one in executed:
        rows.setdefault(one.op, [0.0, 0.0])[not one.integer] += one.us
    accuracy = accuracy_causes([n.layer for n in start.layers], list(start.losses), start.agreement, False, True)
    return replace(
        start,
        latency=latency,
        notes=(
            *start.notes,
            *doubts,
            "OpenVINO reports means of all calls, disturbed ones too: read them as fractions",
        ),
        times=tuple(Time(op, None, *us) for op, us in sorted(rows.items(), key=lambda row: -sum(row[1]))),
        causes=(*floats(executed), *accuracy),
    )


def on_jetson(start: Explanation, path: Path, version: str) -> Explanation:
    """Return the explanation with what TensorRT will refuse or run slowly; nothing is executed."""
    verdict = lint.lint(path, version)
    causes = []
    for rule in dict.fromkeys(finding.rule for finding in verdict.findings):
        same = [finding for finding in verdict.findings if finding.rule == rule]
        more = f", and {len(same) - 1} more" if len(same) > 1 else ""
        about: Any = "refused" if same[0].level == "error" else "speed"
        text = f"`{same[0].node}`: {same[0].fact}{more} [{rule}]"
        causes.append(Cause(about, text, same[0].fix, share=1.0 if about == "refused" else 0.0))
    quantized = [one.layer for one in start.layers]
    accuracy = accuracy_causes(quantized, list(start.losses), start.agreement, x86=False, vnni=True)
    where = f"TensorRT {verdict.tensorrt} of JetPack {version}, by its rules"
    return replace(start, where=where, causes=(*causes, *accuracy))


def concluded(explanation: Explanation) -> Explanation:
    """Return it with one line for each cause, or one that says that there is none."""
    lines = tuple(f"{c.about}: {c.verdict}" + (f" -> {c.fix}" if c.fix else "") for c in explanation.causes)
    end = explanation.latency or explanation.where
    slow = explanation.latency and not explanation.latency.endswith(ALONE) and "faster" not in explanation.latency
    fine = f"INT8 is not faster, and no single cause takes {percent(COST)} of its time" if slow else "nothing is wrong"
    fine = f"{'no cause was found' if statistics.NOISY in explanation.latency else fine}: {end}"
    return replace(explanation, verdicts=lines or (fine,))
