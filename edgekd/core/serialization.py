"""Dataclasses to JSON and back, through pydantic: settings, artefacts and measurements alike."""

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
from edgekd.errors import ConfigError

T = TypeVar("T")
MOST, LONGEST = 20, 100  # mistakes that are told at once; letters of a value that are quoted
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


def dump(value: Any) -> Any:
    """Plain JSON. A plug-in becomes {"use": its name, ...}; a file is its name and hash."""
    return _plain(value, whole=True)


def facts(value: Any) -> Any:
    """`dump` without the fields that only tell how something came to be (metadata `key: False`)."""
    return _plain(value, whole=False)


def _plain(value: Any, whole: bool) -> Any:
    if isinstance(value, File):
        return {"name": value.path.name, "sha256": value.sha256}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = [f.name for f in dataclasses.fields(value) if whole or f.metadata.get("key", True)]
        fields = {name: _plain(getattr(value, name), whole) for name in told}
        return {"use": plugins.name_of(value), **fields} if plugins.folder_of(type(value)) else fields
    if isinstance(value, (list, tuple)):
        return [_plain(v, whole) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v, whole) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def read(path: Path, hint: str) -> Any:
    """What a JSON file from outside says. Raises ConfigError with `hint` for what is none, as NaN and 1e999 are."""
    try:
        found = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refused, parse_float=_finite, parse_int=_whole
        )
        json.dumps(found, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` cannot be read: {error}", hint=hint) from None
    return found


def _refused(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)


def _whole(text: str) -> int:
    if len(text) > 18:  # what 64 bits hold
        raise ValueError(f"{text[:18]}... is too large a number")
    return int(text)


def load(
    kind: type[T], data: Any, home: Path = Path(), find: Callable[[Path, str], File] = File.checked, hint: str = ""
) -> T:
    """The object that `data` describes; files are looked for in `home` and must match their hash.

    `find(path, sha256)` gives another kind of file, for a record that outlives its files. Strict: no value is
    converted, and settings have no unknown key. Raises ConfigError with every mistake at once, each with what helps
    where a person wrote it; or all with `hint`.
    """
    from pydantic import ValidationError

    context = {"home": home, "find": find}
    try:
        return typing.cast(
            T, _adapter(typing.cast(Any, kind)).validate_json(json.dumps(data), strict=True, context=context)
        )
    except ValidationError as error:
        raise mistakes(error, kind, data, hint) from None


@cache
def _adapter(kind: Any) -> Any:
    """Takes some 20 ms to make."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def mistakes(error: Any, kind: Any, data: Any, hint: str = "") -> ConfigError:
    """One ConfigError for all that pydantic found; each mistake with the full path of its key, and its own hint."""
    found = [mistake(item, kind, data) for item in error.errors()[:MOST]]
    lines = [f"{one.what}\n    hint: {one.hint}" if one.hint and not hint else one.what for one in found]
    count = error.error_count()
    if count == 1:
        return ConfigError(found[0].what, hint=hint or found[0].hint)
    more = [f"and {count - MOST} more"] if count > MOST else []
    return ConfigError(f"{count} mistakes:\n  " + "\n  ".join(lines + more), hint=hint)


def mistake(found: Any, kind: type, data: Any) -> ConfigError:
    path = [part for part in found["loc"] if part != "function-plain"]
    where = ".".join(str(part) for part in path) or "the configuration"
    cause = found.get("ctx", {}).get("error")
    if found["type"] == "unexpected_keyword_argument":
        parent = ".".join(map(str, path[:-1])) or "the configuration"
        return plugins.unknown(f"{parent} has no `{path[-1]}`", str(path[-1]), fields_at(kind, data, path[:-1]))
    if isinstance(cause, ConfigError):
        return ConfigError(f"{where}: {cause.what}", hint=cause.hint)
    if found["type"] in ("missing", "missing_argument"):
        return ConfigError(f"{where} is missing", hint=sample(kind_at(kind, data, path[:-1]), str(path[-1])))
    if found["type"] == "no_use":
        return ConfigError(f"{where} {found['msg']}", hint=f"`edgekd list` says what each of them is; {EXAMPLE}")
    quoted = json.dumps(found["input"], default=str)
    quoted = quoted if len(quoted) <= LONGEST else f"{quoted[:LONGEST]}..."
    return ConfigError(f"{where} is {quoted}: {found['msg']}", hint=HINTS.get(found["type"], EXAMPLE))


def sample(above: Any, key: str) -> str:
    """What to write for the setting `key` of `above`, which has no default."""
    kind = typing.get_type_hints(above).get(key) if dataclasses.is_dataclass(above) else None
    inner = next(iter(typing.get_args(kind)), None) if typing.get_origin(kind) is tuple else kind
    if not (isinstance(inner, type) and "FOLDER" in vars(inner)):
        return EXAMPLE
    one = "{use: NAME}"
    said = one if inner is kind else f"[{one}]"
    return f"write `{key}: {said}`; `edgekd list {vars(inner)['FOLDER']}` says the names"


def fields_at(kind: Any, data: Any, path: list[Any]) -> list[str]:
    """The keys that are allowed at `path` of a `kind`."""
    kind = kind_at(kind, data, path)
    if not dataclasses.is_dataclass(kind):
        return []
    return sorted([f.name for f in dataclasses.fields(kind)] + ["use"] * bool(plugins.folder_of(kind)))  # type: ignore[arg-type]


def kind_at(kind: Any, data: Any, path: list[Any]) -> Any:
    """What is to stand at `path` of a `kind`, with its plug-ins as `data` chooses them."""
    kind = concrete(kind, data)
    for part in path:
        inner = typing.get_args(kind)
        if isinstance(kind, type):
            hint = typing.get_type_hints(kind).get(part)
        else:
            hint = next(iter(inner[-1:] if typing.get_origin(kind) is dict else inner), None)
        data = data[part]
        kind = concrete(hint, data)
    return kind


def concrete(hint: Any, data: Any) -> Any:
    """`hint` with `| None` taken off, and a plug-in interface replaced by the plug-in that `data` chooses."""
    options = [a for a in typing.get_args(hint) if a is not type(None)]
    if options and type(None) in typing.get_args(hint):
        hint = options[0]
    if isinstance(hint, type) and "FOLDER" in vars(hint) and isinstance(data, dict):
        return plugins.load(hint.FOLDER, data["use"])  # type: ignore[attr-defined]
    return hint
