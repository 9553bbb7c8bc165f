"""The `edgekd` command: parse, call, print; no logic."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgekd import __version__
from edgekd.core.errors import ConfigError, EdgekdError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Recipe = Annotated[str, typer.Argument(help="A recipe (`edgekd list recipes`) or a YAML file.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="Device family; repeat for several.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override one value: student.epochs=5.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where results go.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink everything to seconds; the numbers mean nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """From a trained teacher to a measured INT8 student on an edge device."""
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
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
    smoke: Smoke = False,
    json_: Json = False,
) -> None:
    """Distil, export, quantize, verify, measure and report; what did not change is not done again."""
    from edgekd import pipeline

    config = pipeline.configured(recipe, tuple(set_ or ()), tuple(target or ()), smoke)
    out = out or Path("runs") / config.name
    record = pipeline.build(config, out, calib_root, command=shlex.join(["edgekd", *sys.argv[1:]]))
    say(f"report: {out / 'report.html'}")
    emit(json_, pipeline.summary(record), pipeline.headline(record))


@app.command()
def distill(recipe: Recipe = "digits", set_: Sets = None, out: Out = None, smoke: Smoke = False, json_: Json = False) -> None:
    """Train the teacher and the students only; prints where their weights are."""
    from edgekd import pipeline

    config = pipeline.configured(recipe, tuple(set_ or ()), (), smoke)
    students = pipeline.distilled(config, out or Path("runs") / config.name)
    rows = [
        {"name": w.name, "method": w.method, "valid_accuracy": w.valid_accuracy, "file": str(w.file.path)} for w in students
    ]
    emit(json_, rows, "\n".join("{name}: {valid_accuracy:.2%} of validation images, {file}".format(**row) for row in rows))


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
    from edgekd.core import plugins
    from edgekd.core.config import recipes, text

    kinds = (*plugins.FOLDERS, "recipes")
    if kind is not None and kind not in kinds:
        raise plugins.unknown(f"there is no kind `{kind}`", kind, list(kinds))
    found = {folder: {n: plugins.summary(folder, n) for n in plugins.names(folder)} for folder in plugins.FOLDERS}
    found["recipes"] = {name: text(name).partition("\n")[0].lstrip("# ") for name in recipes()}
    chosen = {k: v for k, v in found.items() if kind in (None, k)}
    lines = [f"{k}\n" + "\n".join(f"  {name:<12} {line}" for name, line in v.items()) for k, v in chosen.items()]
    emit(json_, chosen, "\n".join(lines))


def say(text: str) -> None:
    """For people: on stderr."""
    logging.getLogger(__name__).info(text)


def emit(as_json: bool, data: Any, text: str) -> None:
    """For machines or pipes: on stdout."""
    typer.echo(json.dumps(data) if as_json else text)


def main() -> NoReturn:
    """Run, and turn what went wrong into a sentence and an exit code."""
    try:
        app(standalone_mode=False)
        code = 0
    except EdgekdError as error:
        code = failed(str(error), error.exit_code)
    except typer.Exit as stop:
        code = stop.exit_code
    except OSError as error:
        code = failed(*os_failure(error))
    except KeyboardInterrupt:
        code = failed("interrupted\n\nhint: run the same command again to go on where it stopped", 130)
    sys.exit(code)
