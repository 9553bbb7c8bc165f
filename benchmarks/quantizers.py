"""One network quantized by edgekd, onnxruntime and NNCF with the same images: top-1 and latency in each runtime.

    python benchmarks/quantizers.py student.onnx --calib images.npz --inputs inputs.npy --labels labels.npy

Of a build: `steps/export-NAME-*/NAME.onnx`, `steps/calibration-*/images.npz`, `steps/test-inputs-*/inputs.npy` and
`steps/data-*/test-labels.npy`. onnxruntime's quantizer runs with its defaults, and as its documentation advises for x86
(unsigned activations, a scale per channel, preprocessed) with each of its calibration methods; NNCF with its defaults,
on ONNX and on OpenVINO's IR, and with its preset `mixed`. The runner interleaves all forms, a process for each runtime;
one thread. Needs `pip install nncf` beside the extra `openvino`. Quote ratios of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import serialization
from edgekd.core.artifact import File, Precision
from edgekd.core.bench_result import BenchmarkEntry
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.inspect import facts
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark
from edgekd.stages.bench.compare_files import table
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.quantize.quantize import quantize_file
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.targets.cpu import Cpu
from edgekd.targets.openvino import OpenVino

METRICS = ("top1", "agreement", "p50_ms", "p90_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="FP32 ONNX file with a batch of 1")
    for name in ("calib", "inputs", "labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quantizers"))
    parser.add_argument("--rounds", type=int, default=90)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    images = load_calibration(asked.calib, facts(asked.model).input)
    ours, theirs, nncf = (by(asked.model, asked.out, images) for by in (by_edgekd, by_onnxruntime, by_nncf))
    onnx_files = {"fp32": asked.model, **ours, **theirs, **{n: p for n, p in nncf.items() if p.suffix == ".onnx"}}
    config, kept = BenchConfig(rounds=asked.rounds, metrics=METRICS), {"load": os.getloadavg()}
    for target, forms in ((Cpu(), onnx_files), (OpenVino(), {"fp32": asked.model, **ours, **nncf})):
        who = tuple(contestant(name, path, asked.model) for name, path in forms.items())
        files = File.of(asked.inputs), File.of(asked.labels)
        result = benchmark(
            asked.out / target.runtime, BenchmarkRequest(who, target.runtime, target, *files, "fp32", config)
        )
        print(f"\n{table(result)}", flush=True)
        kept[target.runtime] = serialization.to_json(result)
    (asked.out / "quantizers.json").write_text(json.dumps(kept, indent=2))


def by_edgekd(model: Path, out: Path, images: np.ndarray) -> dict[str, Path]:
    """In the scheme of x86, which is OpenVINO's, too."""
    forms = {}
    for method in ("minmax", "auto"):
        forms[f"edgekd {method}"] = out / f"edgekd-{method}.onnx"
        quantize_file(model, forms[f"edgekd {method}"], images, QUANT_SCHEMES["ort-x86"], QuantizeConfig(method))
    return forms


def by_onnxruntime(model: Path, out: Path, images: np.ndarray) -> dict[str, Path]:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            name = facts(model).input.name
            self.rest = iter({name: images[i : i + 1]} for i in range(len(images)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    folded = out / "folded.onnx"
    quant_pre_process(model, folded)
    forms = {"onnxruntime default": out / "onnxruntime-default.onnx"}
    quantize_static(model, forms["onnxruntime default"], Reader())
    for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile):
        name = f"onnxruntime u8s8 {method.name.lower()}"
        forms[name] = out / f"{name.replace(' ', '-')}.onnx"
        quantize_static(
            folded,
            forms[name],
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
    return forms


def by_nncf(model: Path, out: Path, images: np.ndarray) -> dict[str, Path]:
    os.environ["NNCF_CI"] = "1"  # NNCF and OpenVINO tell their maker of every use, otherwise
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf
    import onnx
    import openvino

    loaded, core, forms = onnx.load(model), openvino.Core(), {}
    feeds = [{loaded.graph.input[0].name: images[i : i + 1]} for i in range(len(images))]
    for name, preset in (("default", None), ("mixed", nncf.QuantizationPreset.MIXED)):
        settings: dict[str, Any] = {"preset": preset, "subset_size": len(images)}
        onnx.save(nncf.quantize(loaded, nncf.Dataset(feeds), **settings), out / f"nncf-{name}.onnx")
        network = nncf.quantize(core.read_model(model), nncf.Dataset(feeds), **settings)
        openvino.save_model(network, out / f"nncf-{name}.xml", compress_to_fp16=False)
        forms |= {f"nncf {name}, onnx": out / f"nncf-{name}.onnx", f"nncf {name}, ir": out / f"nncf-{name}.xml"}
    return forms


def contestant(name: str, path: Path, model: Path) -> BenchmarkEntry:
    found = facts(model)
    precision: Precision = "fp32" if path == model else "int8"
    return BenchmarkEntry(name, "student", "", precision, File.of(path), found.macs or 0, found.parameters)


if __name__ == "__main__":
    main()
