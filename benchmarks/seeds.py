"""What a method is worth, over several seeds: builds a recipe once for each and gives mean and standard deviation.

    python benchmarks/seeds.py cifar10 --set data.root=PATH [--seeds 3] [--out runs/cifar10]

The teacher is trained once: all builds share a step cache. Accuracies are of the exported files, on the test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], help="as for edgekd build")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    out = asked.out or Path("runs") / asked.recipe
    top1: dict[str, list[float]] = {}
    for seed in range(asked.seeds):
        words = ["build", asked.recipe, "--out", str(out), *(w for s in asked.set for w in ("--set", s))]
        subprocess.run([sys.executable, "-m", "edgekd", *words, "--set", f"student.seed={seed}"], check=True)
        record = json.loads((out / "report.json").read_text())
        (out / f"report-seed{seed}.json").write_text(json.dumps(record))
        for measurement in record["benches"][0]["measurements"]:
            top1.setdefault(measurement["model"]["name"], []).append(measurement["metrics"]["top1"])
    lines = [
        f"{asked.recipe}, {asked.seeds} seeds, {time.strftime('%Y-%m-%d')}",
        "",
        "| model | top-1, mean | sd | each seed |",
    ]
    lines.append("| --- | --- | --- | --- |")
    for name, values in top1.items():
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{v:.2f}" for v in values)
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {sd:.2f} | {each} |")
    (out / "seeds.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
