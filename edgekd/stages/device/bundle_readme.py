"""What a bundle says to the person and the shell that run it."""

from __future__ import annotations

from typing import Any

from edgekd.targets._jetpack import board

BEFORE, TIMED = ("doctor", "build", "verify"), ("bench", "energy")  # commands of the runner, in this order
COMMANDS = (*BEFORE, *TIMED, "collect")
RUN = f"""\
#!/bin/sh
# Build, verify and measure everything in this folder; type the same again to go on after an interruption.
# Words behind the command go on to the measurements: sh run.sh --lock-clocks. Another Python: PYTHON=... sh run.sh
set -eu
cd "$(dirname "$0")"
python=${{PYTHON:-python3}}
for command in {" ".join(BEFORE)}; do
    "$python" edgekd_runner.py "$command" --bundle .
done
for command in {" ".join(TIMED)}; do
    "$python" edgekd_runner.py "$command" --bundle . "$@"
done
"$python" edgekd_runner.py collect --bundle .
echo "measured: bring the folder results back, then: edgekd import-result results/result.json"
"""


HEAD = """\
# {name}: bundle for {target}

Not measured on device: this folder was made on another machine. To measure it, type on the device, in this folder:

    sh run.sh

{needs}

An interrupted run goes on when the same is typed again. {clocks}Then bring the folder `results` back to the machine
with edgekd, and type there:

    edgekd import-result results/result.json

## What is built
"""
CLOCKS = """\
Clocks stay as they are found; `sh run.sh --lock-clocks`
holds them at the maximum of the power mode while it measures (it asks for root), and puts them back.

"""
FILES = """\
`inputs.npy` holds {images} test images. The answers of onnxruntime, with its graph optimisation off, to the first
{checked} of them are in `expected`. `manifest.json` has the sha256 of every file."""


def readme(manifest: dict[str, Any], images: int, why: tuple[str, ...], remarks: tuple[str, ...]) -> str:
    """README.md of a bundle: what to type, what it was planned for and why, and what nobody has measured."""
    checked = manifest["checked"]
    lines = [HEAD.format(needs=needs(manifest), clocks=CLOCKS if manifest["jetpack"] else "", **manifest)]
    lines += ["| engine | from | precisions | must agree with the host |", "|---|---|---|---|"]
    lines += [row(engine, checked) for engine in manifest["engines"]]
    lines += ["", FILES.format(images=images, checked=checked)]
    if why:
        lines += ["", "## Why so", "", *(f"- {sentence[0].upper()}{sentence[1:]}." for sentence in why)]
    if remarks:
        lines += ["", "## What TensorRT may do otherwise than meant", "", *(f"- `{remark}`" for remark in remarks)]
    lines += ["", "## What was never measured", "", never(manifest)]
    return "\n".join(lines) + "\n"


def needs(manifest: dict[str, Any]) -> str:
    if manifest["jetpack"]:
        return (
            f"It needs a {board(manifest['board']).title} with JetPack {manifest['jetpack']} "
            f"(TensorRT {manifest['tensorrt']}), no root and no pip.\nUse the system's "
            "python3; a virtual environment does not see its TensorRT."
        )
    return f"It needs Python 3.6 or newer with numpy and {manifest['runtime']}."


def row(engine: dict[str, Any], checked: int) -> str:
    source = f"`{engine['model']}`" + (f" with `{engine['cache']}`" if engine["cache"] else "")
    place = "" if engine["dla"] is None else f" on DLA {engine['dla']}"
    kinds = "+".join(engine["precisions"]) + (", as the file says" if engine["typed"] else "") + place
    share = f"{engine['agreement']:g} % of {checked} top classes" if engine["agreement"] else "–"
    return f"| {engine['name']} | {source} | {kinds} | {share} |"


def never(manifest: dict[str, Any]) -> str:
    if manifest["runtime"] == "tensorrt":
        return (
            "That an engine builds, its accuracy, its speed and its power: no TensorRT ran where this folder was\n"
            "made. The files were checked there with onnxruntime and against the rules of TensorRT's parser."
        )
    return "Its speed on this device: numbers from another machine are not given here."
