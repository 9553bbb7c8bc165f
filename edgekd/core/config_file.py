"""Read a configuration: a recipe or a YAML file, with single values overridden."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekd.core.plugins import unknown_name
from edgekd.errors import ConfigError
from edgekd.utils.text import CONTROL, hidden_chars

MAX_BYTES = 64 << 10  # of a configuration; the longest recipe has 1.5 kB
MAX_LEVELS = 30  # of lists and tables
MAX_DIGITS = 40  # characters of a number
MAX_VALUES = 20_000  # those behind an alias counted as often as it is used
TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class ConfigSource:
    """A configuration as a user asks for it; `edgekd.config.load_source` loads it."""

    source: str  # the name of a recipe, or a YAML file
    overrides: tuple[str, ...] = ()  # `student.epochs=5`, values in YAML
    targets: tuple[str, ...] = ()  # instead of those of the source; none: as they are
    smoke: bool = False  # shrink everything, so that a build takes seconds
    jetpack: str | None = None  # settings of the device, for the targets that have them
    board: str | None = None
    dla: bool | None = None

    @classmethod
    def of(cls, source: str | Path, overrides: Mapping[str, Any] | Sequence[str] = (), **options: Any) -> ConfigSource:
        """Return a source with overrides as a mapping, `{"student.epochs": 5}`, or as texts."""
        if isinstance(overrides, Mapping):
            overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return cls(str(source), tuple(overrides), **options)

    @property
    def name(self) -> str:
        """The name of the configuration, for the folder of a build."""
        name = self.read().get("name")
        if not isinstance(name, str):
            raise ConfigError("name is missing, or not a text", hint="write `name: ` and a word for the build")
        return f"{name}-smoke" if self.smoke else name

    def read(self) -> dict[str, Any]:
        """Return its plain data. Raise ConfigError if it cannot be read."""
        return read_config(self.source, self.overrides)


def recipes() -> list[str]:
    """Return the names of the recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in files("edgekd.recipes").iterdir() if p.name.endswith(".yaml"))


def config_text(source: str) -> str:
    """Return the YAML of a recipe or a file. Raise ConfigError if there is none."""
    if Path(source).is_file():
        content = Path(source).read_bytes() if Path(source).stat().st_size <= MAX_BYTES else bytes(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            hint = "name a configuration, not its data"
            raise ConfigError(f"`{source}` has more than {MAX_BYTES >> 10} kB", hint=hint)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"`{source}` is not a text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
                hint="save it as UTF-8",
            ) from None
    if source in recipes():
        return files("edgekd.recipes").joinpath(f"{source}.yaml").read_text()
    if source.endswith((".yaml", ".yml")) or "/" in source:
        raise ConfigError(f"there is no file `{source}`", hint="`edgekd init` writes one")
    raise unknown_name(f"there is no recipe and no file `{source}`", source, recipes())


def read_config(source: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the plain data of a recipe or a file; `overrides` are like `student.epochs=5`, values in YAML."""
    data = parse_yaml(config_text(source), source)
    if not isinstance(data, dict):
        raise ConfigError(f"`{source}` is not a table of keys and values", hint="`edgekd init` writes an example")
    for override in overrides:
        path, sign, value = override.partition("=")
        if not sign or not path:
            raise ConfigError(f"--set {override} names no value", hint="write --set student.epochs=5")
        set_value(data, path.split("."), parse_yaml(value, f"--set {override}"), override)
    return data


def set_value(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    """Set the value at a path of keys. Raise ConfigError if the path leads through a value that has no keys."""
    table: Any = data
    for part in path[:-1]:
        table = table.setdefault(part, {}) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: `{'.'.join(path[:-1])}` holds no keys", hint="check the path")
    table[path[-1]] = value


def parse_yaml(source: str, where: str) -> Any:
    """Return what a text of YAML 1.2 holds: tables, lists, texts, numbers, true and false, null. A date is a text.

    Args:
        where: of the text, for messages.

    Raises:
        ConfigError: with the line of what cannot be read: a key twice, a tag, an invisible character, a number that no
            setting takes, aliases that stand for more than `MAX_VALUES` values or lead to themselves.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        node = YAML(typ="safe", pure=True).compose(source)
        return None if node is None else Constructor(where).value(node, 1)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{where}{line} is not YAML: {problem[:200]}", hint="check the indentation and colons"
        ) from None
    except RecursionError:
        raise too_deep(where) from None


def too_deep(where: str) -> ConfigError:
    """Return the error for a text of too many levels."""
    return ConfigError(f"{where} is nested too deeply", hint=f"use at most {MAX_LEVELS} levels, and no alias to itself")


class Constructor:
    """Makes plain data of the nodes of a text, and refuses what no setting can be."""

    def __init__(self, where: str) -> None:
        self.where, self.count = where, 0

    def value(self, node: Any, level: int) -> Any:
        """Return the data of a node and of all nodes below it."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(f"{self.where} holds more than {MAX_VALUES:,} values", hint="leave out the aliases")
        if level > MAX_LEVELS:
            raise too_deep(self.where)
        kind = str(node.tag).removeprefix(TAG)
        if node.id == "mapping" and kind == "map":
            return self.table(node, level)
        if node.id == "sequence" and kind == "seq":
            return [self.value(item, level + 1) for item in node.value]
        if node.id == "scalar" and kind in ("str", "timestamp", "int", "float", "bool", "null", "merge"):
            return self.scalar(node, kind)
        raise self.error(
            node, f"the tag `{str(node.tag).replace(TAG, '!!')[:60]}` is not read", "write the value as it is"
        )

    def table(self, node: Any, level: int) -> dict[str, Any]:
        """Return a table; those that are merged into it (`<<: *base`) give the keys that it lacks."""
        merged: dict[str, Any] = {}
        keys: dict[str, Any] = {}
        for key_node, value_node in node.value:
            kind = str(key_node.tag).removeprefix(TAG)
            if key_node.id != "scalar" or kind not in ("str", "merge"):
                shown = f" `{key_node.value[:20]}`" if key_node.id == "scalar" else ""
                raise self.error(key_node, f"a key is not a text, but {kind}{shown}", "write a word, or quote it")
            key, value = self.scalar(key_node, "str"), self.value(value_node, level + 1)
            if kind == "merge":
                for table in value if isinstance(value, list) else [value]:
                    if not isinstance(table, dict):
                        raise self.error(value_node, "`<<` merges tables only", "name the anchor of a table")
                    merged = table | merged
            elif key in keys:
                raise self.error(key_node, f"`{key[:60]}` is there twice", "keep one of them")
            else:
                keys[key] = value
        return merged | keys

    def scalar(self, node: Any, kind: str) -> Any:
        """Return a text, a number, a truth or None."""
        text = str(node.value)
        if hidden := hidden_chars(text, CONTROL):
            raise self.error(node, f"a text holds the character {ascii(min(hidden))}", "leave it out")
        try:
            if kind == "int" and len(text) <= MAX_DIGITS:
                number = int(text, 0 if text.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else 10)
                if -(2**63) <= number < 2**63:
                    return number
            if kind == "float" and len(text) <= MAX_DIGITS and math.isfinite(float(text)):
                return float(text)
        except ValueError:
            pass
        if kind in ("int", "float"):
            hint = "write it in digits; in quotes, if it is a text"
            raise self.error(node, f"`{text[:20]}` is no number that a setting takes", hint)
        if kind == "bool":
            if text.lower() not in ("true", "false"):
                raise self.error(node, f"`{text[:20]}` is neither true nor false", "write true or false")
            return text.lower() == "true"
        return None if kind == "null" else text

    def error(self, node: Any, what: str, hint: str) -> ConfigError:
        """Return an error about a node, with its line."""
        return ConfigError(f"{self.where}, line {node.start_mark.line + 1}: {what}", hint=hint)
