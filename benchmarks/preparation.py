"""What each switch of preparation does for one network in INT8: top-1 and the error of its answers, in each dialect.

    python benchmarks/preparation.py student.onnx --calib images.npz --inputs inputs.npy --labels labels.npy

Of a build: `steps/export-NAME-*/NAME-dynamic.onnx` and `steps/calib-*/images.npz`; `inputs.npy` holds network inputs,
(N, C, H, W) float32, of validation images where switches are chosen by the table. `lost` are points of top-1 between
FP32 and INT8 on the same images, with their 95 % interval; dB, the power of the FP32 answers to that of the difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.quant_scheme import DIALECTS, named
from edgekd.onnx.inputs import load_calibration
from edgekd.onnx.inspect import facts
from edgekd.onnx.session import answers
from edgekd.stages.bench.intervals import lost, right
from edgekd.stages.quantize.quantize import quantize_file, ratio_db
from edgekd.stages.quantize.ranges import METHODS, QuantizeConfig

SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "equalize": {"equalize": True},
    "smooth 0.5": {"smooth": 0.5},
    "correct_bias": {"correct_bias": True},
    "equalize, correct_bias": {"equalize": True, "correct_bias": True},
    "all": {"equalize": True, "smooth": 0.5, "correct_bias": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="FP32 ONNX file")
    for name in ("calib", "inputs", "labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/preparation"))
    parser.add_argument("--dialect", action="append", help=f"of {', '.join(DIALECTS)}; repeat for several")
    parser.add_argument("--method", choices=METHODS, default="minmax", help="how ranges are found")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    known = load_calibration(asked.calib, facts(asked.model).input)
    inputs, labels = np.load(asked.inputs, mmap_mode="r"), np.load(asked.labels)
    want = answers(asked.model, inputs)
    kept: list[dict[str, Any]] = []
    print(f"{asked.model.name}, {len(known)} calibration inputs, ranges by {asked.method}; {len(labels)} inputs judged")
    print(f"FP32: top-1 {100 * right(want, labels).mean():.2f} %", flush=True)
    for name in asked.dialect or ("ort-x86", "tensorrt"):
        for per_channel in (False, True):
            print(f"{name}, a scale for {'each channel' if per_channel else 'all'} of a weight", flush=True)
            for words, switches in SWITCHES.items():
                config = QuantizeConfig(asked.method, per_channel=per_channel, **switches)
                target = asked.out / "int8.onnx"
                quantize_file(asked.model, target, known, named(name), config)
                got = answers(target, inputs)
                points, snr_db = lost(right(want, labels), right(got, labels)), ratio_db(want, got)
                top1 = 100 * float(right(got, labels).mean())
                interval = f"{points.mid:5.2f} lost ({points.low:.2f} to {points.high:.2f})"
                print(f"  {words:<24}{top1:6.2f} %  {interval:<28}{snr_db:5.1f} dB", flush=True)
                row = {"dialect": name, "per_channel": per_channel, "switches": switches, "top1": top1}
                kept.append({**row, "lost": vars(points), "snr_db": snr_db})
    (asked.out / "preparation.json").write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    main()
