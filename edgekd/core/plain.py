"""Dataclasses to JSON and back, through pydantic: settings, artefacts and measurements alike."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.errors import ConfigError

T = TypeVar("T")
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


def load(kind: type[T], data: Any, home: Path = Path(), find: Callable[[Path, str], File] = File.checked) -> T:
    """The object that `data` describes; files are looked for in `home` and must match their hash.

    `find(path, sha256)` gives another kind of file, for a record that outlives its files.

    Strict: no value is converted, no unknown key is let through. Raises ConfigError with every mistake at once.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(data), strict=True, context={"home": home, "find": find})
    except ValidationError as error:
        raise mistakes(error, kind, data) from None


def mistakes(error: Any, kind: type, data: Any) -> ConfigError:
    """One ConfigError for all that pydantic found; each mistake with the full path of its key, and its own hint."""
    found = [mistake(item, kind, data) for item in error.errors()]
    if len(found) == 1:
        return found[0]
    lines = [f"{one.what}\n    hint: {one.hint}" if one.hint else one.what for one in found]
    return ConfigError(f"{len(found)} mistakes:\n  " + "\n  ".join(lines))


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
        return ConfigError(f"{where} is missing", hint=EXAMPLE)
    if found["type"] == "no_use":
        return ConfigError(f"{where} {found['msg']}", hint=f"`edgekd list` says what each of them is; {EXAMPLE}")
    what = f"{where} is {json.dumps(found['input'], default=str)}: {found['msg']}"
    return ConfigError(what, hint=HINTS.get(found["type"], EXAMPLE))


def fields_at(kind: Any, data: Any, path: list[Any]) -> list[str]:
    """The keys that are allowed at `path` of a `kind`."""
    kind = concrete(kind, data)
    for part in path:
        inner = (
            typing.get_type_hints(kind) if isinstance(part, str) else {part: next(iter(typing.get_args(kind)), None)}
        )
        hint = inner.get(part)
        data = data[part]
        kind = concrete(hint, data)
    if not dataclasses.is_dataclass(kind):
        return []
    return sorted([f.name for f in dataclasses.fields(kind)] + ["use"] * bool(plugins.folder_of(kind)))  # type: ignore[arg-type]


def concrete(hint: Any, data: Any) -> Any:
    """`hint` with `| None` taken off, and a plug-in interface replaced by the plug-in that `data` chooses."""
    options = [a for a in typing.get_args(hint) if a is not type(None)]
    if options and type(None) in typing.get_args(hint):
        hint = options[0]
    if isinstance(hint, type) and "FOLDER" in vars(hint) and isinstance(data, dict):
        return plugins.load(hint.FOLDER, data["use"])  # type: ignore[attr-defined]
    return hint
