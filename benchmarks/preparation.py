"""What each switch of preparation does for one network in INT8: top-1 and the error of its answers, in each scheme.

    python benchmarks/preparation.py student.onnx --calib images.npz --inputs inputs.npy --labels labels.npy

Of a build: `steps/export-NAME-*/NAME-dynamic.onnx`, `steps/calibration-*/images.npz`; `inputs.npy` has network inputs,
(N, C, H, W) float32, of validation images where switches are chosen by the table. `lost` are points of top-1 between
FP32 and INT8 on the same images, with their 95 % interval; dB, the power of the FP32 answers to that of the difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.quant_scheme import QUANT_SCHEMES, get_scheme
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.inspect import facts
from edgekd.onnx.session import run_model
from edgekd.stages.bench.intervals import accuracy_lost
from edgekd.stages.quantize.quantize import quantize_file, snr_db
from edgekd.stages.quantize.ranges import METHODS, QuantizeConfig

SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "cross_layer_equalization": {"cross_layer_equalization": True},
    "smoothquant_alpha 0.5": {"smoothquant_alpha": 0.5},
    "bias_correction": {"bias_correction": True},
    "cross_layer_equalization, bias_correction": {"cross_layer_equalization": True, "bias_correction": True},
    "all": {"cross_layer_equalization": True, "smoothquant_alpha": 0.5, "bias_correction": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="FP32 ONNX file")
    for name in ("calib", "inputs", "labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/preparation"))
    parser.add_argument("--scheme", action="append", help=f"of {', '.join(QUANT_SCHEMES)}; repeat for several")
    parser.add_argument("--method", choices=METHODS, default="minmax", help="how ranges are found")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    known = load_calibration(asked.calib, facts(asked.model).input)
    inputs, labels = np.load(asked.inputs, mmap_mode="r"), np.load(asked.labels)
    want = run_model(asked.model, inputs)
    correct = want.argmax(1) == labels
    kept: list[dict[str, Any]] = []
    print(f"{asked.model.name}, {len(known)} calibration inputs, ranges by {asked.method}; {len(labels)} inputs judged")
    print(f"FP32: top-1 {100 * correct.mean():.2f} %", flush=True)
    for name in asked.scheme or ("ort-x86", "tensorrt"):
        for per_channel in (False, True):
            print(f"{name}, a scale for {'each channel' if per_channel else 'all'} of a weight", flush=True)
            for words, switches in SWITCHES.items():
                config = QuantizeConfig(asked.method, per_channel=per_channel, **switches)
                target = asked.out / "int8.onnx"
                quantize_file(asked.model, target, known, get_scheme(name), config)
                got = run_model(target, inputs)
                points, noise = accuracy_lost(correct, got.argmax(1) == labels), snr_db(want, got)
                top1 = 100 * float((got.argmax(1) == labels).mean())
                interval = f"{points.estimate:5.2f} lost ({points.low:.2f} to {points.high:.2f})"
                print(f"  {words:<24}{top1:6.2f} %  {interval:<28}{noise:5.1f} dB", flush=True)
                row = {"scheme": name, "per_channel": per_channel, "switches": switches, "top1": top1}
                kept.append({**row, "lost": vars(points), "snr_db": noise})
    (asked.out / "preparation.json").write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    main()
