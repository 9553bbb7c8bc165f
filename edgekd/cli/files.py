"""The commands for files of any origin: export, quantize, sensitivity, lint, explain, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.console import Jetpack, Json, Smoke, emit, leave

# of INT8, for several commands
Equalize = Annotated[bool, typer.Option("--equalize", help="Give the layers of a pair equal weights.")]
Smooth = Annotated[float, typer.Option(help="SmoothQuant's alpha for matrix products, such as 0.5.")]
CorrectBias = Annotated[bool, typer.Option("--correct-bias", help="Take off what rounded weights add.")]
PerChannel = Annotated[
    bool | None, typer.Option("--per-channel/--per-tensor", help="How many scales a weight has; else the target's.")
]
Ranges = Annotated[
    str, typer.Option("--method", help="How ranges are found: minmax, moving_average, percentile, entropy, mse, auto.")
]
Floats = Annotated[str, typer.Option(help="Layers that stay float, by commas; first and last are words.")]


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write (batch 1).")],
    model: Annotated[
        str, typer.Option(help="A family with settings, `resnet:depth=8,width=8`, or `package.module:function`.")
    ],
    checkpoint: Annotated[Path, typer.Option(help="Its weights: .safetensors, or a state dict in a .pt file.")],
    images: Annotated[
        Path, typer.Option(help="Real network inputs to compare with, .npz or .npy, (N, C, H, W) float32.")
    ],
    classes: Annotated[int, typer.Option(help="How many classes it answers.")],
    opset: Annotated[int | None, typer.Option(help="Of ai.onnx; 20 if neither this nor a JetPack is given.")] = None,
    jetpack: Jetpack = None,
    trust: Annotated[bool, typer.Option(help="Read a checkpoint that may run code.")] = False,
    json_: Json = False,
) -> None:
    """Write a trained torch network as ONNX, and prove that it answers alike."""
    from edgekd.stages.export.checkpoint import export_checkpoint, opset_for
    from edgekd.stages.export.export import ExportConfig
    from edgekd.stages.quantize.file_api import described, facts

    config = ExportConfig(opset=opset_for(opset, jetpack))
    made = export_checkpoint(out, model, checkpoint, images, classes, config, trust)
    emit(json_, facts(made), described(made))


def quantize(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file.")],
    calib: Annotated[Path, typer.Option(help="Network inputs, .npz or .npy, (N, C, H, W) float32.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The INT8 ONNX file to write, or a calibration cache.")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Whose INT8 dialect; cpu if not given.")] = None,
    dialect: Annotated[
        str | None, typer.Option(help="Or the dialect itself: ort-x86, ort-arm, openvino, tensorrt, dla.")
    ] = None,
    jetpack: Annotated[str | None, typer.Option(help="Of the device; the dialect dla needs it.")] = None,
    method: Ranges = "minmax",
    equalize: Equalize = False,
    smooth: Smooth = 0.0,
    correct_bias: CorrectBias = False,
    per_channel: PerChannel = None,
    floats: Floats = "",
    json_: Json = False,
) -> None:
    """Quantize any ONNX file to INT8. Method auto: the least error against FP32 on inputs held out."""
    from edgekd.onnx.sandbox import probed
    from edgekd.stages.quantize.file_api import described, facts, quantize_by_name

    probed(model)
    asked = {"equalize": equalize, "smooth": smooth, "correct_bias": correct_bias, "per_channel": per_channel}
    made = quantize_by_name(model, calib, out, target, dialect, jetpack, method, floats=listed(floats), **asked)
    emit(json_, facts(made), described(made))


def sensitivity(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file.")],
    calib: Annotated[Path, typer.Option(help="Network inputs to calibrate with, .npz or .npy, (N, C, H, W) float32.")],
    images: Annotated[Path, typer.Option(help="Other network inputs, to judge by; no test images.")],
    labels: Annotated[Path, typer.Option(help="Their classes, .npy.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Whose INT8 dialect and latency.")] = "cpu",
    max_drop: Annotated[float | None, typer.Option(help="Points of accuracy that INT8 may lose.")] = None,
    method: Ranges = "minmax",
    equalize: Equalize = False,
    smooth: Smooth = 0.0,
    correct_bias: CorrectBias = False,
    per_channel: PerChannel = None,
    floats: Floats = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where results go.")] = Path("runs/sensitivity"),
    json_: Json = False,
) -> None:
    """Tell which layers INT8 harms, what it costs to keep them float, and which mix to take."""
    from edgekd.core import serialization
    from edgekd.core.step_cache import Ledger
    from edgekd.onnx.sandbox import probed
    from edgekd.pipelines.sensitivity import survey
    from edgekd.stages.quantize.ranges import QuantizeConfig
    from edgekd.stages.report.mixed_precision import text, verdict

    probed(model)
    asked = {"equalize": equalize, "smooth": smooth, "correct_bias": correct_bias, "per_channel": per_channel}
    said = {"method": method, "floats": listed(floats), "max_drop": max_drop, **asked}
    with Ledger(out).locked():
        found = survey(out, model, calib, images, labels, target, serialization.load(QuantizeConfig, said))
    emit(json_, serialization.dump(found) | {"verdict": verdict(found)}, text(found))
    leave(0 if found.met else 1)


def listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def lint(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any origin.")],
    jetpack: Annotated[str, typer.Option(help="Of the device: 4.6, 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")],
    json_: Json = False,
) -> None:
    """Tell what TensorRT on a Jetson will refuse in an ONNX file, or run slowly, and the fix."""
    from edgekd.onnx.sandbox import probed
    from edgekd.stages.lint import lint as stage

    probed(model)
    verdict = stage.lint(model, jetpack)
    emit(json_, stage.as_json(verdict), stage.described(verdict))
    if verdict.count("error"):
        raise typer.Exit(1)


def explain(
    model: Annotated[Path, typer.Argument(help="An INT8 ONNX file, of edgekd or of another tool.")],
    reference: Annotated[Path | None, typer.Option(help="The FP32 file that it was made from.")] = None,
    images: Annotated[Path | None, typer.Option(help="Network inputs, .npz or .npy; noise if not given.")] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="Where it runs: cpu, openvino or jetson.")] = "cpu",
    jetpack: Annotated[str | None, typer.Option(help="Of the target jetson; 6.2 if not given.")] = None,
    threads: Annotated[int, typer.Option(help="Of the runtime.")] = 1,
    json_: Json = False,
) -> None:
    """Tell why an INT8 file is not faster, or not accurate, and the switch to change."""
    from edgekd.onnx.sandbox import probed
    from edgekd.stages.explain.explain import explain as look
    from edgekd.stages.explain.result import as_json, described

    probed(*filter(None, (model, reference)))
    told = look(model, reference, images, target, jetpack, threads)
    emit(json_, as_json(told), described(told))


def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; the first is what the others are compared with.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Where to run them.")] = "cpu",
    images: Annotated[Path | None, typer.Option(help="Network inputs, .npz or .npy; noise if not given.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their classes, .npy: measures accuracy, too.")] = None,
    threads: Annotated[str, typer.Option(help="Of the runtime; 1,2 measures with one, then with two.")] = "1",
    batch: Annotated[
        str, typer.Option(help="Images of a call; 1,8 for two tables. Above 1, give dynamic files.")
    ] = "1",
    scope: Annotated[
        str, typer.Option(help="What a call holds, a table each: copies, model, preprocessing; cold: starts, memory.")
    ] = "copies",
    rate: Annotated[
        float | None, typer.Option(help="Calls a second that are due; latency from when they were.")
    ] = None,
    throughput: Annotated[bool, typer.Option("--throughput", help="Images a second, too.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where samples and results go.")] = Path("runs/bench"),
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Compare the latency of any ONNX files on one target."""
    from edgekd.core import serialization
    from edgekd.core.step_cache import Ledger
    from edgekd.onnx.sandbox import probed
    from edgekd.stages.bench.compare_files import asked, comparisons, table

    probed(*models)
    config, counts = asked(smoke, threads, batch, scope, rate, throughput)
    with Ledger(out).locked():
        found = comparisons(out, tuple(models), target, counts, images, labels, config)
    told = [serialization.dump(result) for result in found]
    emit(json_, told[0] if len(told) == 1 else told, "\n\n".join(map(table, found)))
