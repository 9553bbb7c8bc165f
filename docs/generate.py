"""Write the reference pages that follow from the code: `python docs/generate.py`; with `--check` only compare them."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "reference"
HEADER = "<!-- written by docs/generate.py; do not edit -->\n\n"
KINDS = {  # the plug-ins that a configuration chooses from: the folder, the interface, what one is
    "data": ("Dataset", "a kind of data set"),
    "tasks": ("Task", "what is learned"),
    "models": ("Model", "a family of networks"),
    "methods": ("Method", "a distillation method"),
    "targets": ("Target", "a device family"),
}
YAML = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


def cli() -> str:
    """Return the page of all commands, their arguments and options."""
    import typer

    from edgekd.cli.main import app

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="edgekd")
    page = ["# Command line", clean(group.help), "Exit codes are [here](exit-codes.md)."]
    for name, command in sorted(group.commands.items()):
        child = typer.Context(command, info_name=name, parent=context)
        usage = " ".join(command.get_usage(child).removeprefix("Usage: ").split())
        page += [f"## edgekd {name}", clean(command.help), f"```\n{usage}\n```"]
        rows = [parameter_row(p) for p in command.params if p.name != "help"]
        page += [table(("argument or option", "default", "meaning"), rows)] if rows else []
    return "\n\n".join(page)


def parameter_row(parameter: Any) -> tuple[str, str, str]:
    """Return name, default and meaning of an argument or option."""
    argument = parameter.param_type_name == "argument"
    names = (
        [(parameter.metavar or parameter.name).upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    )
    default = parameter.default
    unset = default is None or callable(default) or default in ((), [], "")
    shown = "required" if parameter.required else "" if unset or default is False else f"`{default}`"
    return ", ".join(f"`{name}`" for name in names), shown, clean(parameter.help)


def config() -> str:
    """Return the page of every key of a configuration, with type, default and meaning."""
    from edgekd.config import BuildConfig
    from edgekd.core import plugins

    page = [
        "# Configuration",
        "Every key of an `edgekd.yaml`. Unknown keys are errors. Any value can be overridden on the command line: "
        "`--set student.epochs=20`. `edgekd init` writes a commented file to start from.",
    ]
    links = {interface: f"#{folder}" for folder, (interface, _) in KINDS.items()}
    sections = settings_below("", BuildConfig, links)
    page += [part for title, kind in sections for part in section(f"## {title or 'Top level'}", kind, links)]
    for folder, (_, what) in KINDS.items():
        page += [f"## {folder}", f"`use: NAME` selects {what}; the other keys are its settings."]
        for name in plugins.names(folder):
            kind = plugins.load(folder, name)
            nested = settings_below(name, kind, links)
            page += [f"### {folder}: {name}", module_summary(kind), *section("", kind, links)[1:]]
            page += [part for title, below in nested[1:] for part in section(f"#### {title}", below, links)]
    return "\n\n".join(page)


def settings_below(path: str, kind: Any, links: dict[str, str]) -> list[tuple[str, Any]]:
    """Return a dataclass and those in its fields, each once with its path; note in `links` where each is described."""
    from edgekd.core.settings import Settings

    sections = [(path, kind)]
    module = vars(sys.modules[kind.__module__])
    for field in fields(kind):
        for name in re.findall(r"\w+", str(field.type)):
            nested = module.get(name)
            if (
                name in links
                or not inspect.isclass(nested)
                or not is_dataclass(nested)
                or not issubclass(nested, Settings)
            ):
                continue
            below = f"{path}.{field.name}" if path else field.name
            links[name] = "#" + below.replace(".", "")
            sections += settings_below(below, nested, links)
    return sections


def module_summary(kind: type) -> str:
    """Return the first sentence of the file of a class, without the name in front."""
    summary = (sys.modules[kind.__module__].__doc__ or "").strip().split("\n", 1)[0]
    return re.sub(r"^[a-z0-9_]+: ", "", summary)


def section(title: str, kind: type, links: dict[str, str]) -> list[str]:
    """Return a heading, the docstring of a dataclass and the table of its fields."""
    described = [clean(kind.__doc__)] if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(") else []
    rows = [(f"`{name}`", type_text(type_, links), *rest) for name, type_, *rest in field_rows(kind)]
    return [title, *described, table(("key", "type", "default", "meaning"), rows) if rows else "No settings."]


def type_text(annotation: str, links: dict[str, str]) -> str:
    """Return a type as readers of YAML say it; settings link to their section."""
    if annotation.startswith("Literal["):
        return " or ".join(f"`{option.strip()}`" for option in annotation[8:-1].replace("'", "").split(","))
    if annotation.endswith(" | None"):
        return f"{type_text(annotation.removesuffix(' | None'), links)} or null"
    if annotation.startswith("tuple[") and annotation.endswith(", ...]"):
        return f"list of {type_text(annotation[6:-6], links)}"
    return f"[{annotation}]({links[annotation]})" if annotation in links else YAML.get(annotation, f"`{annotation}`")


def field_rows(kind: type) -> list[tuple[str, str, str, str]]:
    """Return name, type, default and meaning of the fields of a dataclass, those of its parents first."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    for owner in reversed(kind.__mro__):
        if is_dataclass(owner):
            rows |= own_rows(owner)
    return [rows[field.name] for field in fields(kind)]  # type: ignore[arg-type]


def own_rows(kind: type) -> dict[str, tuple[str, str, str, str]]:
    """Read the fields that a class itself declares from its source: comments and docstrings are their meanings."""
    source = inspect.cleandoc("\n" + inspect.getsource(kind))
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:"):
            comments[token.start[0]] = token.string.lstrip("# ")
    rows = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        if annotation.startswith("ClassVar"):
            continue
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        meaning = " ".join(comments[line] for line in lines if line in comments)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            meaning = after.value.value
        rows[node.target.id] = (
            node.target.id,
            annotation,
            default_of(node.value),
            re.sub(r"\bNone\b", "null", clean(meaning)),
        )
    return rows


def default_of(value: ast.expr | None) -> str:
    """Return the default of a field as a configuration would write it."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call):
        return "see below"
    text = ast.unparse(value)
    return (
        "`"
        + {"None": "null", "True": "true", "False": "false", "()": "[]", "''": '""'}.get(text, text.strip("'"))
        + "`"
    )


def lint_rules() -> str:
    """Return the page of the rules of `edgekd lint`."""
    from edgekd.stages.lint import lint

    page = [
        "# Lint rules",
        "`edgekd lint model.onnx --jetpack 6.2` checks an ONNX file against the documented rules of TensorRT's parser.",
    ]
    for title, rules in (
        ("Errors: TensorRT refuses the file", lint.HARD),
        ("Warnings: slow, or not as intended", lint.SOFT),
    ):
        page += [f"## {title}", table(("rule", "fix"), [(f"`{name}`", clean(fix)) for name, (_, fix) in rules.items()])]
    return "\n\n".join(page)


def metrics() -> str:
    """Return the page of the metrics, and of what else a gate can limit."""
    from edgekd.core.gate import Gate
    from edgekd.stages.catalogue import catalogue

    rows = [
        (f"`{name}`", clean(text.removeprefix(f"{name}: "))) for name, text in catalogue("metrics")["metrics"].items()
    ]
    gate = own_rows(Gate)["metric"][3]
    return "\n\n".join(["# Metrics", table(("metric", "meaning"), rows), "## In a gate", gate])


def api() -> str:
    """Return the page of the functions that `import edgekd` offers."""
    module = importlib.import_module("edgekd.api")
    page = ["# Python API", "`import edgekd`. Everything else in the package is private."]
    functions = [f for name, f in vars(module).items() if inspect.isfunction(f) and not name.startswith("_")]
    for function in functions:
        if function.__module__ != "edgekd.api":
            continue
        source = inspect.getsource(function)
        node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
        parameters = signature_text(node)
        page += [f"## {function.__name__}", f"```python\n{parameters}\n```", *docstring_parts(function)]
    return "\n\n".join(page)


def signature_text(node: ast.FunctionDef) -> str:
    """Return a signature, one parameter per line if it is long."""
    parts = [ast.unparse(a) for a in [*node.args.posonlyargs, *node.args.args]]
    positional = len(parts)
    defaults: list[ast.expr | None] = [None] * (positional - len(node.args.defaults))
    defaults += node.args.defaults
    parts = [part + (f" = {ast.unparse(d)}" if d else "") for part, d in zip(parts, defaults, strict=True)]
    if node.args.kwonlyargs:
        parts.append("*")
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            parts.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else ""))
    if node.args.kwarg:
        parts.append("**" + ast.unparse(node.args.kwarg))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    short = f"{node.name}({', '.join(parts)}){returns}"
    return short if len(short) < 90 else f"{node.name}(\n" + "".join(f"    {p},\n" for p in parts) + f"){returns}"


def docstring_parts(function: Any) -> list[str]:
    """Return a docstring as Markdown: paragraphs, and Args, Returns, Raises as lists."""
    parts = []
    for block in inspect.cleandoc(function.__doc__ or "").split("\n\n"):
        title, _, rest = block.partition("\n")
        if title in ("Args:", "Returns:", "Raises:", "Yields:"):
            items = re.split(r"\n(?=    \S)", "\n" + rest)[1:] if rest.startswith("    ") else [rest]
            lines = [re.sub(r"^\*?\*?(\w+):", r"`\1`:", clean(item)) for item in items]
            parts += [f"**{title.rstrip(':')}**", "\n".join(f"- {line}" for line in lines)]
        else:
            parts.append(clean(block))
    return parts


def clean(text: str | None) -> str:
    """Return a text as one line."""
    return " ".join((text or "").replace("\b", "").split())


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES = {"cli": cli, "config": config, "lint-rules": lint_rules, "metrics": metrics, "api": api}


def stale() -> list[str]:
    """Return the pages that are not what the code says now."""
    return [name for name, page in PAGES.items() if current(name) != HEADER + page().rstrip() + "\n"]


def current(name: str) -> str:
    path = FOLDER / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(f"not current: {', '.join(stale())}; run `python docs/generate.py`" if stale() else 0)
    for name, page in PAGES.items():
        (FOLDER / f"{name}.md").write_text(HEADER + page().rstrip() + "\n", encoding="utf-8")
