"""The commands for files of any origin: export, quantize, sensitivity, lint, explain, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd import api
from edgekd.cli.console import Jetpack, Json, Smoke, emit, exit_with

# options of INT8, for several commands
CrossLayerEqualization = Annotated[bool, typer.Option("--cross-layer-equalization", help="Cross-layer equalization.")]
SmoothquantAlpha = Annotated[float, typer.Option(help="SmoothQuant's alpha for matrix products, such as 0.5.")]
BiasCorrection = Annotated[bool, typer.Option("--bias-correction", help="Bias correction.")]
PerChannel = Annotated[
    bool | None, typer.Option("--per-channel/--per-tensor", help="How many scales a weight has; else the target's.")
]
Ranges = Annotated[
    str,
    typer.Option("--method", help="How ranges are computed: minmax, moving_average, percentile, entropy, mse or auto."),
]
KeepFloat = Annotated[str, typer.Option(help="Layers that stay float, separated by commas; also first and last.")]


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write (batch 1).")],
    model: Annotated[
        str, typer.Option(help="A family with settings, `resnet:depth=8,width=8`, or `package.module:function`.")
    ],
    checkpoint: Annotated[Path, typer.Option(help="Its weights: .safetensors, or a state dict in a .pt file.")],
    images: Annotated[
        Path, typer.Option(help="Real network inputs to compare with, .npz or .npy, (N, C, H, W) float32.")
    ],
    classes: Annotated[int, typer.Option(help="Number of classes.")],
    opset: Annotated[int | None, typer.Option(help="Of ai.onnx; 20 if neither this nor a JetPack is given.")] = None,
    jetpack: Jetpack = None,
    allow_pickle: Annotated[bool, typer.Option(help="Read a checkpoint that may run code.")] = False,
    json_: Json = False,
) -> None:
    """Write a trained torch network as ONNX, and verify that it answers alike."""
    from edgekd.stages.export.checkpoint import export_checkpoint, opset_for
    from edgekd.stages.export.export import ExportConfig
    from edgekd.stages.quantize.file_api import format_result, to_json

    config = ExportConfig(opset=opset_for(opset, jetpack))
    made = export_checkpoint(out, model, checkpoint, images, classes, config, allow_pickle)
    emit(json_, to_json(made), format_result(made))


def quantize(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file.")],
    calib: Annotated[Path, typer.Option(help="Network inputs, .npz or .npy, (N, C, H, W) float32.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The INT8 ONNX file to write, or a calibration cache.")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Whose INT8 scheme; cpu if not given.")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Or the scheme itself: ort-x86, ort-arm, openvino, tensorrt, dla.")
    ] = None,
    jetpack: Annotated[str | None, typer.Option(help="Of the device; the scheme dla needs it.")] = None,
    method: Ranges = "minmax",
    cross_layer_equalization: CrossLayerEqualization = False,
    smoothquant_alpha: SmoothquantAlpha = 0.0,
    bias_correction: BiasCorrection = False,
    per_channel: PerChannel = None,
    keep_float: KeepFloat = "",
    json_: Json = False,
) -> None:
    """Quantize any ONNX file to INT8. Method auto: the least error against FP32 on inputs held out."""
    settings = {
        "method": method,
        "cross_layer_equalization": cross_layer_equalization,
        "smoothquant_alpha": smoothquant_alpha,
        "bias_correction": bias_correction,
        "per_channel": per_channel,
        "keep_float": split_names(keep_float),
    }
    result = api.quantize(model, out, calibration=calib, target=target, scheme=scheme, jetpack=jetpack, **settings)
    emit(json_, result.to_dict(), str(result))


def sensitivity(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file.")],
    calib: Annotated[Path, typer.Option(help="Network inputs to calibrate with, .npz or .npy, (N, C, H, W) float32.")],
    images: Annotated[Path, typer.Option(help="Other network inputs, to evaluate with; not the test images.")],
    labels: Annotated[Path, typer.Option(help="Their classes, .npy.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Whose INT8 scheme and latency.")] = "cpu",
    max_drop: Annotated[float | None, typer.Option(help="Points of accuracy that INT8 may lose.")] = None,
    method: Ranges = "minmax",
    cross_layer_equalization: CrossLayerEqualization = False,
    smoothquant_alpha: SmoothquantAlpha = 0.0,
    bias_correction: BiasCorrection = False,
    per_channel: PerChannel = None,
    keep_float: KeepFloat = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where results go.")] = Path("runs/sensitivity"),
    json_: Json = False,
) -> None:
    """Measure which layers INT8 harms, what keeping them float costs, and which mix is best."""
    from edgekd.core import serialization
    from edgekd.core.step_cache import StepCache
    from edgekd.onnx.sandbox import probe_files
    from edgekd.pipelines.sensitivity import SensitivityRequest, analyze_sensitivity
    from edgekd.stages.quantize.ranges import QuantizeConfig
    from edgekd.stages.report.mixed_precision import text, verdict

    probe_files(model)
    settings = {
        "method": method,
        "cross_layer_equalization": cross_layer_equalization,
        "smoothquant_alpha": smoothquant_alpha,
        "bias_correction": bias_correction,
        "per_channel": per_channel,
        "keep_float": split_names(keep_float),
        "max_drop": max_drop,
    }
    config = serialization.from_json(QuantizeConfig, settings)
    request = SensitivityRequest(model, calib, images, labels, target, config)
    with StepCache(out).locked():
        front = analyze_sensitivity(out, request)
    emit(json_, serialization.to_json(front) | {"verdict": verdict(front)}, text(front))
    exit_with(0 if front.meets_limit else 1)


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def lint(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any origin.")],
    jetpack: Annotated[str, typer.Option(help="Of the device: 4.6, 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")],
    json_: Json = False,
) -> None:
    """Find what TensorRT on a Jetson will refuse in an ONNX file, or run slowly, and the fix."""
    result = api.lint(model, jetpack)
    emit(json_, result.to_dict(), str(result))
    exit_with(1 if result.value.count("error") else 0)


def explain(
    model: Annotated[Path, typer.Argument(help="An INT8 ONNX file, of edgekd or of another tool.")],
    reference: Annotated[Path | None, typer.Option(help="The FP32 file that it was made from.")] = None,
    images: Annotated[Path | None, typer.Option(help="Network inputs, .npz or .npy; noise if not given.")] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="Where it runs: cpu, openvino or jetson.")] = "cpu",
    jetpack: Annotated[str | None, typer.Option(help="Of the target jetson; 6.2 if not given.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    json_: Json = False,
) -> None:
    """Explain why an INT8 file is not faster, or not accurate, and name the setting to change."""
    result = api.explain(model, reference, images=images, target=target, jetpack=jetpack, threads=threads)
    emit(json_, result.to_dict(), str(result))


def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; the first is what the others are compared with.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Where to run them.")] = "cpu",
    images: Annotated[Path | None, typer.Option(help="Network inputs, .npz or .npy; noise if not given.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their classes, .npy: measures accuracy, too.")] = None,
    threads: Annotated[str, typer.Option(help="Threads of the runtime; 1,2 measures with one, then with two.")] = "1",
    batch: Annotated[
        str, typer.Option(help="Images of a call; 1,8 for two tables. Above 1, give dynamic files.")
    ] = "1",
    scope: Annotated[
        str, typer.Option(help="end_to_end, inference_only, with_preprocessing or cold_start; a table each, by commas.")
    ] = "end_to_end",
    rate: Annotated[
        float | None, typer.Option(help="Calls a second that are due; latency from when they were.")
    ] = None,
    throughput: Annotated[bool, typer.Option("--throughput", help="Images a second, too.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where samples and results go.")] = Path("runs/bench"),
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Compare the latency of any ONNX files on one target."""
    from edgekd.stages.bench.compare_files import parse_lists

    batches, scopes, counts = parse_lists(batch, scope, threads)
    settings = {"batches": batches, "scopes": scopes, "rate": rate, "throughput": throughput}
    result = api.benchmark(
        models, target=target, images=images, labels=labels, threads=counts, out=out, smoke=smoke, **settings
    )
    emit(json_, result.to_dict(), str(result))
