"""Convert dataclasses to JSON and back, through pydantic: settings, artifacts and measurements alike."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.renamed import new_name
from edgekd.errors import ConfigError

T = TypeVar("T")
MAX_MISTAKES, MAX_QUOTED = 20, 100  # mistakes of one message; characters of a value in it
EXAMPLE = "`edgekd init` shows an example"
HINTS = {  # by pydantic's name of the mistake
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing_size"), "write a whole number"),
    "float_type": "write a number, such as 0.1",
    "finite_number": "write a number, such as 0.1",
    "bool_type": "write true or false",
    "string_type": "write a text, in quotes if it looks like a number",
    "literal_error": "choose one of these values",
    **dict.fromkeys(("tuple_type", "list_type"), "write a list: [first, second]"),
    **dict.fromkeys(("dataclass_type", "dict_type"), "write keys with values below it"),
}


def to_json(value: Any) -> Any:
    """Return plain JSON. A plug-in becomes {"use": its name, ...}; a file is its name and hash."""
    return _plain(value, whole=True)


def cache_key(value: Any) -> Any:
    """Return `to_json` without the fields that determine no output (NOT_IN_KEY)."""
    return _plain(value, whole=False)


def _plain(value: Any, whole: bool) -> Any:
    if isinstance(value, File):
        return {"name": value.path.name, "sha256": value.sha256}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if whole or f.metadata.get("key", True)]
        fields = {name: _plain(getattr(value, name), whole) for name in names}
        return {"use": plugins.name_of(value), **fields} if plugins.folder_of(type(value)) else fields
    if isinstance(value, (list, tuple)):
        return [_plain(v, whole) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v, whole) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path, hint: str) -> Any:
    """Return the content of a JSON file from outside. Raise ConfigError with `hint` if it is invalid, as NaN is."""
    try:
        data = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refused, parse_float=_finite, parse_int=_whole
        )
        json.dumps(data, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` cannot be read: {error}", hint=hint) from None
    return data


def _refused(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)


def _whole(text: str) -> int:
    if len(text) > 18:  # what 64 bits hold
        raise ValueError(f"{text[:18]}... is too large a number")
    return int(text)


def from_json(
    kind: type[T], data: Any, home: Path = Path(), find: Callable[[Path, str], File] = File.checked, hint: str = ""
) -> T:
    """Return the object that `data` describes. No value is converted, and settings have no unknown key.

    Args:
        kind: the type of the object.
        data: as `to_json` returns it.
        home: the folder of its files, which must match their hashes.
        find: makes a file of its path and hash, for a record that outlives its files.
        hint: of errors; empty: each mistake has its own.

    Raises:
        ConfigError: with every mistake at once.
    """
    from pydantic import ValidationError

    context = {"home": home, "find": find}
    try:
        return typing.cast(
            T, _adapter(typing.cast(Any, kind)).validate_json(json.dumps(data), strict=True, context=context)
        )
    except ValidationError as error:
        raise config_error(error, kind, data, hint) from None


@cache
def _adapter(kind: Any) -> Any:
    """Return pydantic's adapter of a type, which takes some 20 ms to make."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def config_error(error: Any, kind: Any, data: Any, hint: str = "") -> ConfigError:
    """Return one ConfigError for all mistakes, each with the full path of its key."""
    mistakes = [describe_mistake(item, kind, data) for item in error.errors()[:MAX_MISTAKES]]
    lines = [f"{one.what}\n    hint: {one.hint}" if one.hint and not hint else one.what for one in mistakes]
    count = error.error_count()
    if count == 1:
        return ConfigError(mistakes[0].what, hint=hint or mistakes[0].hint)
    more = [f"and {count - MAX_MISTAKES} more"] if count > MAX_MISTAKES else []
    return ConfigError(f"{count} mistakes:\n  " + "\n  ".join(lines + more), hint=hint)


def describe_mistake(mistake: Any, kind: type, data: Any) -> ConfigError:
    """Return the error for one of pydantic's mistakes."""
    path = [part for part in mistake["loc"] if part != "function-plain"]
    where = ".".join(str(part) for part in path) or "the configuration"
    cause = mistake.get("ctx", {}).get("error")
    if mistake["type"] == "unexpected_keyword_argument":
        parent = ".".join(map(str, path[:-1])) or "the configuration"
        return plugins.unknown_name(f"{parent} has no `{path[-1]}`", str(path[-1]), allowed_keys(kind, data, path[:-1]))
    if isinstance(cause, ConfigError):
        return ConfigError(f"{where}: {cause.what}", hint=cause.hint)
    if mistake["type"] in ("missing", "missing_argument"):
        return ConfigError(f"{where} is missing", hint=example_of(type_at(kind, data, path[:-1]), str(path[-1])))
    if mistake["type"] == "no_use":
        return ConfigError(f"{where} {mistake['msg']}", hint=f"`edgekd list` says what each of them is; {EXAMPLE}")
    quoted = json.dumps(mistake["input"], default=str)
    quoted = quoted if len(quoted) <= MAX_QUOTED else f"{quoted[:MAX_QUOTED]}..."
    hint = HINTS.get(mistake["type"], EXAMPLE)
    if mistake["type"] == "literal_error" and (new := new_name(str(mistake["input"]), mistake["ctx"]["expected"])):
        hint = f"it is called `{new}` now"
    return ConfigError(f"{where} is {quoted}: {mistake['msg']}", hint=hint)


def example_of(above: Any, key: str) -> str:
    """Return what to write for the setting `key` of the type `above`, which has no default."""
    kind = typing.get_type_hints(above).get(key) if dataclasses.is_dataclass(above) else None
    inner = next(iter(typing.get_args(kind)), None) if typing.get_origin(kind) is tuple else kind
    if not (isinstance(inner, type) and "FOLDER" in vars(inner)):
        return EXAMPLE
    one = "{use: NAME}"
    text = one if inner is kind else f"[{one}]"
    return f"write `{key}: {text}`; `edgekd list {vars(inner)['FOLDER']}` says the names"


def allowed_keys(kind: Any, data: Any, path: list[Any]) -> list[str]:
    """Return the keys that are allowed at `path` of a type."""
    kind = type_at(kind, data, path)
    if not dataclasses.is_dataclass(kind):
        return []
    return sorted([f.name for f in dataclasses.fields(kind)] + ["use"] * bool(plugins.folder_of(kind)))  # type: ignore[arg-type]


def type_at(kind: Any, data: Any, path: list[Any]) -> Any:
    """Return the type at `path` of a type, with its plug-ins as `data` chooses them."""
    kind = concrete_type(kind, data)
    for part in path:
        inner = typing.get_args(kind)
        if isinstance(kind, type):
            hint = typing.get_type_hints(kind).get(part)
        else:
            hint = next(iter(inner[-1:] if typing.get_origin(kind) is dict else inner), None)
        data = data[part]
        kind = concrete_type(hint, data)
    return kind


def concrete_type(hint: Any, data: Any) -> Any:
    """Return a type without `| None`, and the plug-in that `data` chooses instead of an interface."""
    options = [a for a in typing.get_args(hint) if a is not type(None)]
    if options and type(None) in typing.get_args(hint):
        hint = options[0]
    if isinstance(hint, type) and "FOLDER" in vars(hint) and isinstance(data, dict):
        return plugins.load(hint.FOLDER, data["use"])  # type: ignore[attr-defined]
    return hint
