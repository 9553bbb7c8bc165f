"""README.md and run.sh of a bundle."""

from __future__ import annotations

from typing import Any

from edgekd.targets._jetpack import board

PREPARATION_COMMANDS, MEASURING_COMMANDS = ("doctor", "build", "verify"), ("bench", "energy")  # in this order
COMMANDS = (*PREPARATION_COMMANDS, *MEASURING_COMMANDS, "collect")
RUN_SCRIPT = f"""\
#!/bin/sh
# Build, verify and measure everything in this folder; after an interruption, type the same to continue.
# Options go to the measurements: sh run.sh --lock-clocks. Another Python: PYTHON=... sh run.sh
set -eu
cd "$(dirname "$0")"
python=${{PYTHON:-python3}}
for command in {" ".join(PREPARATION_COMMANDS)}; do
    "$python" runner.pyz "$command" --bundle .
done
for command in {" ".join(MEASURING_COMMANDS)}; do
    "$python" runner.pyz "$command" --bundle . "$@"
done
"$python" runner.pyz collect --bundle .
echo "measured: copy the folder results back, then: edgekd import-result results/result.json"
"""


HEAD = """\
# {name}: bundle for {target}

Not measured on device: this folder was written on another machine. To measure it, type on the device, in this folder:

    sh run.sh

{needs}

An interrupted run continues when you type the same again. {clocks}Then copy the folder `results` back to the machine
with edgekd, and type there:

    edgekd import-result results/result.json

## Engines
"""
CLOCKS = """\
Clocks are not changed; `sh run.sh --lock-clocks`
holds them at the maximum of the power mode while it measures (it needs root), and restores them.

"""
FILES = """\
`inputs.npy` holds {images} test images. The outputs of onnxruntime, with its graph optimisation off, for the first
{verify_images} of them are in `expected`. `manifest.json` has the sha256 of every file."""


def format_readme(manifest: dict[str, Any], images: int, reasons: tuple[str, ...], remarks: tuple[str, ...]) -> str:
    """Return README.md of a bundle: what to type, what it was planned for and why, and what was never measured."""
    verify_images = manifest["verify_images"]
    lines = [HEAD.format(needs=format_requirements(manifest), clocks=CLOCKS if manifest["jetpack"] else "", **manifest)]
    lines += ["| engine | from | precisions | must agree with the host |", "|---|---|---|---|"]
    lines += [format_engine(engine, verify_images) for engine in manifest["engines"]]
    lines += ["", FILES.format(images=images, verify_images=verify_images)]
    if reasons:
        lines += ["", "## Reasons", "", *(f"- {sentence[0].upper()}{sentence[1:]}." for sentence in reasons)]
    if remarks:
        lines += ["", "## What TensorRT may do differently", "", *(f"- `{remark}`" for remark in remarks)]
    lines += ["", "## What was never measured", "", format_unmeasured(manifest)]
    return "\n".join(lines) + "\n"


def format_requirements(manifest: dict[str, Any]) -> str:
    if manifest["jetpack"]:
        return (
            f"It needs a {board(manifest['board']).title} with JetPack {manifest['jetpack']} "
            f"(TensorRT {manifest['tensorrt']}), no root and no pip.\nUse the system's "
            "python3; a virtual environment does not see its TensorRT."
        )
    return f"It needs Python 3.6 or newer with numpy and {manifest['runtime']}."


def format_engine(engine: dict[str, Any], verify_images: int) -> str:
    source = f"`{engine['model']}`" + (f" with `{engine['cache']}`" if engine["cache"] else "")
    place = "" if engine["dla"] is None else f" on DLA {engine['dla']}"
    precisions = "+".join(engine["precisions"]) + (", as the file says" if engine["typed"] else "") + place
    share = f"{engine['agreement']:g} % of {verify_images} top classes" if engine["agreement"] else "–"
    return f"| {engine['name']} | {source} | {precisions} | {share} |"


def format_unmeasured(manifest: dict[str, Any]) -> str:
    if manifest["runtime"] == "tensorrt":
        return (
            "That an engine builds, its accuracy, its speed and its power: no TensorRT ran where this folder was\n"
            "written. The files were checked there with onnxruntime and against the rules of TensorRT's parser."
        )
    return "Its speed on this device: numbers from another machine are not given here."
