"""Read a configuration: a recipe's name or a YAML file, with single values overridden."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekd.core.errors import ConfigError
from edgekd.core.plugins import unknown


def recipes() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in files("edgekd.recipes").iterdir() if p.name.endswith(".yaml"))


def text(source: str) -> str:
    """The YAML of a recipe or a file."""
    if Path(source).is_file():
        try:
            return Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"`{source}` is not a text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
                hint="save it as UTF-8",
            ) from None
    if source in recipes():
        return files("edgekd.recipes").joinpath(f"{source}.yaml").read_text()
    if source.endswith((".yaml", ".yml")) or "/" in source:
        raise ConfigError(f"there is no file `{source}`", hint="`edgekd init` writes one")
    raise unknown(f"there is no recipe and no file `{source}`", source, recipes())


def read(source: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain data of a configuration. `overrides` are like `distill.epochs=5`, values in YAML."""
    data = parse(text(source), source)
    if not isinstance(data, dict):
        raise ConfigError(f"`{source}` is not a table of keys and values", hint="`edgekd init` writes an example")
    for override in overrides:
        path, sign, value = override.partition("=")
        if not sign or not path:
            raise ConfigError(f"--set {override} names no value", hint="write --set distill.epochs=5")
        put(data, path.split("."), parse(value, f"--set {override}"), override)
    return data


def put(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    here: Any = data
    for part in path[:-1]:
        here = here.setdefault(part, {}) if isinstance(here, dict) else None
    if not isinstance(here, dict):
        raise ConfigError(f"--set {override}: `{'.'.join(path[:-1])}` holds no keys", hint="check the path")
    here[path[-1]] = value


def parse(source: str, where: str) -> Any:
    """YAML without surprises: no key twice, 1e-3 is a number, and 2026-01-31 is a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            twice = {key for key in keys if keys.count(key) > 1}
            if twice:
                raise ConfigError(
                    f"{where}, line {node.start_mark.line + 1}: `{min(twice)}` is there twice", hint="keep one of them"
                )
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 wants a dot and a sign
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in Loader.yaml_implicit_resolvers.items()
    }
    try:
        return yaml.load(source, Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line} is not YAML: {problem}", hint="check the indentation and colons") from None
