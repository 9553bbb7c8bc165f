"""Which layers stay float, so that INT8 loses no more than a limit: edgekd's choice beside NNCF's accuracy control.

    python benchmarks/accuracy_control.py student.onnx --calib images.npz --valid valid.npz --valid-labels valid.npy \\
        --inputs inputs.npy --labels labels.npy --max-drop 0.5

Both get the same FP32 file (batch 1), calibration and validation images and limit, in points of top-1; both judge by
the validation images alone. Then plain INT8 and the files that came of it take turns in OpenVINO, with the test images
(`--inputs`), one thread. NNCF works on OpenVINO's form of the file (`quantize_with_accuracy_control`, its defaults but
for the limit and as many calibration images) and judges by OpenVINO's answers, edgekd by ONNX Runtime's. Needs
`pip install nncf` beside the extra `openvino`. Quote ratios of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import serialization
from edgekd.core.artifact import File, Precision
from edgekd.core.bench_result import BenchmarkEntry
from edgekd.onnx import inspect
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark
from edgekd.stages.bench.compare_files import table
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.mixed_precision.search import SearchGoal, search_pareto_front
from edgekd.stages.mixed_precision.sensitivity import EvalSet, QuantizableModel
from edgekd.stages.quantize.float_layers import quantizable_layers
from edgekd.stages.quantize.quantize import Int8Options
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate, load_prepared
from edgekd.stages.report.mixed_precision import text
from edgekd.targets.openvino import OpenVino
from edgekd.tasks.classification import Classification

METRICS = ("top1", "agreement", "p50_ms")
WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="FP32 ONNX file with a batch of 1")
    for name in ("calib", "valid", "valid-labels", "inputs", "labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--per-tensor", action="store_true", help="edgekd: one scale for each weight; harder")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy_control"))
    parser.add_argument("--rounds", type=int, default=90)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    spec = inspect.facts(asked.model).input
    known, valid = load_calibration(asked.calib, spec), load_calibration(asked.valid, spec)
    truth = np.load(asked.valid_labels)
    forms: dict[str, Path] = {"fp32": asked.model}
    kept: dict[str, Any] = {"load": os.getloadavg(), "max_drop": asked.max_drop}
    for name, make in (("edgekd", by_edgekd), ("nncf", by_nncf)):
        start = time.perf_counter()
        files, keep_float, total = make(asked, known, valid, truth)
        forms |= files
        kept[name] = {"seconds": time.perf_counter() - start, "float": keep_float, "layers": total}
        count, names = f"{len(keep_float)} of {total}", ", ".join(keep_float)
        print(f"{name}: {kept[name]['seconds']:.0f} s, {count} layers in float: {names}")
    config, test = BenchConfig(rounds=asked.rounds, metrics=METRICS), (File.of(asked.inputs), File.of(asked.labels))
    who = tuple(contestant(name, path, asked.model) for name, path in forms.items())
    result = benchmark(asked.out / "openvino", BenchmarkRequest(who, "openvino", OpenVino(), *test, "fp32", config))
    print(f"\n{table(result)}", flush=True)
    kept["openvino"] = serialization.to_json(result)
    (asked.out / "accuracy_control.json").write_text(json.dumps(kept, indent=2))


def by_edgekd(
    asked: argparse.Namespace, known: np.ndarray, valid: np.ndarray, truth: np.ndarray
) -> tuple[dict[str, Path], tuple[str, ...], int]:
    """Plain INT8 and the mix for OpenVINO, and the layers that the mix has in float."""
    config = QuantizeConfig(per_channel=False if asked.per_tensor else None)
    target, model = OpenVino(), asked.model
    made = inspect.describe(model, model.stem)
    options = Int8Options.of(target.scheme, config)
    subject = QuantizableModel(model.name, model, model, known, calibrate(model, known, config), options, made.macs)
    exam = EvalSet.of(model, valid, truth, Classification())
    found = search_pareto_front(asked.out / "edgekd", subject, exam, SearchGoal("openvino", target, asked.max_drop))
    print(text(found))
    files = {"edgekd plain int8": (), "edgekd mix int8": found.selection.keep_float}
    paths = {name: asked.out / f"{name.replace(' ', '-')}.onnx" for name in files}
    for name, keep_float in files.items():
        subject.write(model, paths[name], keep_float)
    return paths, found.selection.keep_float, len(quantizable_layers(load_prepared(model).graph))


def by_nncf(
    asked: argparse.Namespace, known: np.ndarray, valid: np.ndarray, truth: np.ndarray
) -> tuple[dict[str, Path], tuple[str, ...], int]:
    """The same with NNCF, on OpenVINO's form of the file."""
    os.environ["NNCF_CI"] = "1"  # NNCF and OpenVINO tell their maker of every use, otherwise
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf
    import openvino

    network = openvino.Core().read_model(asked.model)

    def top1(compiled: Any, judged: Iterable[Any]) -> tuple[float, list[float]]:
        running = compiled.create_infer_request()
        right = [float(running.infer({0: image})[0].argmax() == label) for image, label in judged]
        return float(np.mean(right)), right

    judged = nncf.Dataset([(valid[i : i + 1], truth[i]) for i in range(len(valid))], lambda pair: pair[0])
    calib = nncf.Dataset([known[i : i + 1] for i in range(len(known))])
    made = {
        "nncf plain int8": nncf.quantize(network, calib, subset_size=len(known)),
        "nncf control int8": nncf.quantize_with_accuracy_control(
            network, calib, judged, top1, max_drop=asked.max_drop / 100, subset_size=len(known)
        ),
    }
    paths = {name: asked.out / f"{name.replace(' ', '-')}.xml" for name in made}
    for name, path in paths.items():
        openvino.save_model(made[name], path, compress_to_fp16=False)
    weighted = [op for op in made["nncf control int8"].get_ops() if op.get_type_name() in WEIGHTED]
    return paths, tuple(op.get_friendly_name() for op in weighted if float_weight(op)), len(weighted)


def float_weight(op: Any) -> bool:
    """Whether a weight is a constant as it is, and not what a FakeQuantize or a dequantization makes of one."""
    source = op.input_value(1).get_node()
    while source.get_type_name() in ("Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    return bool(source.get_type_name() == "Constant")


def contestant(name: str, path: Path, model: Path) -> BenchmarkEntry:
    found = inspect.facts(model)
    precision: Precision = "fp32" if path == model else "int8"
    return BenchmarkEntry(name, "student", "", precision, File.of(path), found.macs or 0, found.parameters)


if __name__ == "__main__":
    main()
