"""The `edgekd` command: parse, call, print; no logic."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from edgekd import __version__, api
from edgekd.cli import files
from edgekd.cli.console import (
    STOPPED,
    EscapingFormatter,
    Jetpack,
    Json,
    Out,
    Recipe,
    Sets,
    Smoke,
    Targets,
    emit,
    exit_with,
    log_info,
    run,
)
from edgekd.core.config_file import ConfigSource
from edgekd.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """From a trained teacher to a measured INT8 student on an edge device."""
    told = logging.StreamHandler()
    told.setFormatter(EscapingFormatter())
    logging.basicConfig(level=logging.ERROR, handlers=[told])  # other libraries' logs
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
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete steps that this build does not need, and trainings of `compare`.")
    ] = False,
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Distil, export, quantize, verify, measure and report; only what changed is rerun."""
    options = {"targets": tuple(target or ()), "smoke": smoke, "jetpack": jetpack, "board": board, "dla": dla}
    result = api.build(
        ConfigSource.of(recipe, set_ or (), **options),
        out=out,
        calib_root=calib_root,
        bundles=bundle,
        device=device,
        lock_clocks=lock_clocks,
        prune=prune,
    )
    log_info(f"report: {result.report}")
    emit(json_, result.to_dict(), str(result))
    exit_with(result.exit_code)


@app.command()
def distill(
    recipe: Recipe = "digits", set_: Sets = None, out: Out = None, smoke: Smoke = False, json_: Json = False
) -> None:
    """Train the teacher and the students only; print where their weights are."""
    from edgekd.pipelines.build import distill_only

    config = api.load_config(recipe, set_ or (), smoke=smoke)
    students = distill_only(config, out or Path("runs") / config.name)
    rows = [{"name": w.name, "valid_accuracy": w.valid_accuracy, "file": str(w.file.path)} for w in students]
    emit(json_, rows, "\n".join("{name}: validation accuracy {valid_accuracy}, {file}".format(**r) for r in rows))


@app.command()
def compare(
    recipe: Recipe = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A method, or a variant of the recipe; repeat for several."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds per method.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="What the others are compared with; kd, or the first, if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time; they share the threads.")] = 1,
    set_: Sets = None,
    out: Out = None,
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Train one student by several methods and seeds with the same budget, and say which is better."""
    source = ConfigSource.of(recipe, set_ or (), smoke=smoke)
    result = api.compare(source, methods=method or (), seeds=seeds, baseline=baseline, jobs=jobs, out=out)
    log_info(f"comparison: {result.path}")
    emit(json_, result.to_dict(), str(result))


FILES = (
    *(files.export, files.quantize, files.sensitivity),
    *(files.lint, files.explain, files.bench),
)
for command in FILES:
    app.command()(command)


@app.command("import-result")
def import_result(
    result: Annotated[Path, typer.Argument(help="The result.json of a device, its arrays beside it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Of the build; looked for in runs/.")] = None,
    json_: Json = False,
) -> None:
    """Put what a device measured into the report of the build that made its bundle."""
    from edgekd.pipelines import import_result as import_result_module
    from edgekd.pipelines.build_result import build_result

    record, folder = import_result_module.import_result(result, out)
    build = build_result(record, folder)
    log_info(f"report: {build.report}")
    emit(json_, build.to_dict(), str(build))
    exit_with(build.exit_code)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of a build; to compare, also its report.json.")],
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="OLD", help="An older build to find regressions against.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Percent by which latency, memory and file may grow before it is a regression.")
    ] = 5.0,
    max_drop: Annotated[
        float, typer.Option(help="Points of accuracy and of agreement that may be lost before it is a regression.")
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where regressions.md and regressions.json are written.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write a build's report again from its report.json; or, with --compare OLD, find what became worse since OLD.

    --compare: builds are folders, or their report.json. The latency of the selected file of each target is compared by
    its ratio to the teacher's, which was measured in the same rounds; its median must not contradict that where
    machines, runtimes and protocols are equal. Exit code 3: something became worse by more than the tolerance, with its
    whole 95 % interval; 4: that cannot be decided (too noisy, other machines, no longer measured); 0: no regression.
    """
    from edgekd.stages.report import regressions
    from edgekd.stages.report.change import Tolerance
    from edgekd.stages.report.provenance import update_manifest
    from edgekd.stages.report.report import read
    from edgekd.stages.report.report import report as write

    if compare is None and (out or json_):
        raise ConfigError("--out and --json are for comparing", hint="give --compare and an older build")
    if compare is None:
        log_info(f"report: {write(read(folder / 'report.json'), folder)}")
        update_manifest(folder, ("report.html", "report.md"))
        return
    found = regressions.compare_builds(compare, folder, Tolerance(tolerance, max_drop))
    if out:
        log_info(f"regressions: {regressions.publish(found, out)}")
    emit(json_, regressions.summary(found), regressions.text(found))
    exit_with(regressions.exit_code(found))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="The --out folder of a build.")], json_: Json = False) -> None:
    """Find any file of a build that is not as the build left it."""
    from dataclasses import asdict

    from edgekd.stages.report import verify as stage

    checked = stage.verify(folder)
    emit(json_, asdict(checked) | {"folder": str(folder)}, stage.format_verification(checked))
    exit_with(1 if checked.findings else 0)


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="The recipe to start from.")] = "digits",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("edgekd.yaml"),
) -> None:
    """Write a commented configuration file to start from."""
    from edgekd.core.config_file import config_text

    if out.exists():
        raise ConfigError(f"`{out}` exists", hint="remove it, or name another file with --out")
    out.write_text(config_text(recipe))
    log_info(f"wrote {out}; next: edgekd build {out}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="methods, models, data, targets, metrics or recipes.")] = None,
    json_: Json = False,
) -> None:
    """What there is to choose from."""
    from edgekd.stages.catalogue import catalogue, format_catalogue

    found = catalogue(kind)
    emit(json_, found, format_catalogue(found))


@app.command()
def doctor(json_: Json = False) -> None:
    """What this machine has, what each target needs, what is missing, and how to get it."""
    from dataclasses import asdict

    from edgekd.stages.doctor import check_machine, format_checks

    found = check_machine(Path.cwd())
    emit(json_, [asdict(f) for f in found], format_checks(found))
    if not all(f.fine or not f.needed for f in found):
        raise typer.Exit(1)


def main() -> NoReturn:
    code = run(app)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the command is done; only the interpreter has to end
    if code in STOPPED:
        with suppress(OSError):  # who listened may have been stopped, too
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # with torch in it the interpreter takes a second to end, five on a busy machine
    sys.exit(code)
