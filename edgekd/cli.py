"""The `edgekd` command: parse, call, print; no logic."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from edgekd import __version__
from edgekd.console import emit, leave, run, say
from edgekd.core.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Recipe = Annotated[str, typer.Argument(help="A recipe (`edgekd list recipes`) or a YAML file.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="Device family; repeat for several.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override one value: student.epochs=5.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where results go.")]
Jetpack = Annotated[str | None, typer.Option(help="Of the device: 4.6, 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink everything to seconds; the numbers mean nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """From a trained teacher to a measured INT8 student on an edge device."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)  # other libraries' logs
    logging.getLogger("edgekd").setLevel(logging.ERROR if quiet else logging.INFO)
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def build(
    recipe: Recipe = "digits",
    target: Targets = None,
    set_: Sets = None,
    out: Out = None,
    calib_root: Annotated[Path, typer.Option(help="Where the calibration set is written.")] = Path("calib_data"),
    jetpack: Jetpack = None,
    board: Annotated[str | None, typer.Option(help="Of the Jetson: nano, xavier-nx, orin-nano, thor ...")] = None,
    dla: Annotated[bool | None, typer.Option("--dla", help="Use the Jetson's DLA instead of its GPU.")] = None,
    bundle: Annotated[bool, typer.Option("--bundle", help="Write a folder to send, for every target.")] = False,
    device: Annotated[str | None, typer.Option(help="Measure there: ssh://user@host[:port]/folder.")] = None,
    lock_clocks: Annotated[
        bool, typer.Option("--lock-clocks", help="Hold the clocks of the --device while it measures; as root there.")
    ] = False,
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Distil, export, quantize, verify, measure and report; what did not change is not done again."""
    from edgekd import configuration, pipeline
    from edgekd.stages.bench.gates import exit_code
    from edgekd.stages.device import ssh

    there = ssh.asked(device, lock_clocks)
    config = configuration.configured(recipe, tuple(set_ or ()), tuple(target or ()), smoke)
    config = configuration.on_device(config, jetpack=jetpack, board=board, dla=dla)
    out = out or Path("runs") / config.name
    record = pipeline.build(config, out, calib_root, shlex.join(["edgekd", *sys.argv[1:]]), bundle, there)
    say(f"report: {out / 'report.html'}")
    emit(json_, pipeline.summary(record), pipeline.headline(record))
    leave(exit_code(record.gates))


@app.command()
def distill(
    recipe: Recipe = "digits", set_: Sets = None, out: Out = None, smoke: Smoke = False, json_: Json = False
) -> None:
    """Train the teacher and the students only; prints where their weights are."""
    from edgekd import configuration, pipeline

    config = configuration.configured(recipe, tuple(set_ or ()), (), smoke)
    students = pipeline.distilled(config, out or Path("runs") / config.name)
    rows = [{"name": w.name, "valid_accuracy": w.valid_accuracy, "file": str(w.file.path)} for w in students]
    emit(json_, rows, "\n".join("{name}: validation accuracy {valid_accuracy}, {file}".format(**r) for r in rows))


@app.command()
def compare(
    recipe: Recipe = "digits",
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="A method, or a rival of the recipe; repeat for several.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How often each is taught.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The contender that the others are compared with.")] = None,
    jobs: Annotated[int, typer.Option(help="Lessons at a time; the threads are shared out among them.")] = 1,
    set_: Sets = None,
    out: Out = None,
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Teach one student by several methods and seeds with the same budget, and say which is better."""
    from edgekd import comparison, configuration
    from edgekd.stages.report.standings import summary, text

    config = configuration.configured(recipe, tuple(set_ or ()), (), smoke)
    config = comparison.entered(config, method or (), seeds, baseline)
    out = out or Path("runs") / config.name
    made = comparison.compare(config, out, jobs, command=shlex.join(["edgekd", *sys.argv[1:]]))
    say(f"comparison: {out / 'compare.md'}")
    emit(json_, summary(made), text(made))


@app.command()
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
    from edgekd.stages.export.carry import export_checkpoint, opset_for
    from edgekd.stages.export.export import ExportConfig
    from edgekd.stages.quantize.by_name import described, facts

    config = ExportConfig(opset=opset_for(opset, jetpack))
    made = export_checkpoint(out, model, checkpoint, images, classes, config, trust)
    emit(json_, facts(made), described(made))


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="An FP32 ONNX file.")],
    calib: Annotated[Path, typer.Option(help="Network inputs, .npz or .npy, (N, C, H, W) float32.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The INT8 ONNX file to write, or a calibration cache.")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Whose INT8 dialect; cpu if not given.")] = None,
    dialect: Annotated[
        str | None, typer.Option(help="Or the dialect itself: ort-x86, ort-arm, openvino, tensorrt, dla.")
    ] = None,
    jetpack: Annotated[str | None, typer.Option(help="Of the device; the dialect dla needs it.")] = None,
    method: Annotated[
        str, typer.Option(help="How ranges are found: minmax, moving_average, percentile, entropy, mse, auto.")
    ] = "minmax",
    json_: Json = False,
) -> None:
    """Quantize any ONNX file to INT8. Method auto: the least error against FP32 on inputs held out."""
    from edgekd.stages.quantize.by_name import described, facts, quantize_by_name

    made = quantize_by_name(model, calib, out, target, dialect, jetpack, method)
    emit(json_, facts(made), described(made))


@app.command()
def lint(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any origin.")],
    jetpack: Annotated[str, typer.Option(help="Of the device: 4.6, 5.1, 6.0, 6.1, 6.2, 7.0, 7.1 or 7.2.")],
    json_: Json = False,
) -> None:
    """Tell what TensorRT on a Jetson will refuse in an ONNX file, or run slowly, and the fix."""
    from edgekd.stages.lint import lint as stage

    verdict = stage.lint(model, jetpack)
    emit(json_, stage.as_json(verdict), stage.described(verdict))
    if verdict.count("error"):
        raise typer.Exit(1)


@app.command()
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
    from edgekd.stages.explain.explanation import as_json, described
    from edgekd.stages.explain.look import explain as look

    told = look(model, reference, images, target, jetpack, threads)
    emit(json_, as_json(told), described(told))


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; the first is what the others are compared with.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Where to run them.")] = "cpu",
    images: Annotated[Path | None, typer.Option(help="Network inputs, .npz or .npy; noise if not given.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their classes, .npy: measures accuracy, too.")] = None,
    threads: Annotated[int, typer.Option(help="Of the runtime.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where samples and results go.")] = Path("runs/bench"),
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Compare the latency of any ONNX files on one target."""
    from edgekd.core import plain
    from edgekd.core.ledger import Ledger
    from edgekd.stages.bench.benchmark import BenchConfig
    from edgekd.stages.bench.compare import compare_files, table

    config = BenchConfig(blocks=4, calls=16, warmup_s=0.05, metrics=("top1", "p50_ms")) if smoke else BenchConfig()
    with Ledger(out).locked():
        result = compare_files(out, tuple(models), target, threads, images, labels, config)
    emit(json_, plain.dump(result), table(result))


@app.command("import-result")
def import_result(
    result: Annotated[Path, typer.Argument(help="The result.json of a device, its arrays beside it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Of the build; looked for in runs/.")] = None,
    json_: Json = False,
) -> None:
    """Put what a device measured into the report of the build that made its bundle."""
    from edgekd import arrival, pipeline
    from edgekd.stages.bench.gates import exit_code

    record, folder = arrival.import_result(result, out)
    say(f"report: {folder / 'report.html'}")
    emit(json_, pipeline.summary(record), pipeline.headline(record))
    leave(exit_code(record.gates))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The --out folder of a build.")]) -> None:
    """Write a build's report again from its report.json."""
    from edgekd.stages.report.report import read
    from edgekd.stages.report.report import report as write

    say(f"report: {write(read(folder / 'report.json'), folder)}")


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="The recipe to start from.")] = "digits",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("edgekd.yaml"),
) -> None:
    """Write a commented configuration file to start from."""
    from edgekd.core.config import text

    if out.exists():
        raise ConfigError(f"`{out}` exists", hint="remove it, or name another file with --out")
    out.write_text(text(recipe))
    say(f"wrote {out}; next: edgekd build {out}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="methods, models, data, targets, metrics or recipes.")] = None,
    json_: Json = False,
) -> None:
    """What there is to choose from."""
    from edgekd.stages.catalogue import catalogue, described

    found = catalogue(kind)
    emit(json_, found, described(found))


@app.command()
def doctor(json_: Json = False) -> None:
    """What this machine has, what each target needs, what is missing, and how to get it."""
    from dataclasses import asdict

    from edgekd.stages.doctor import examine, text

    found = examine(Path.cwd())
    emit(json_, [asdict(f) for f in found], text(found))
    if not all(f.fine or not f.needed for f in found):
        raise typer.Exit(1)


def main() -> NoReturn:
    sys.exit(run(app))
