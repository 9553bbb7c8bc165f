"""The JSON Schema of report.json, made from the dataclasses that it is read into, and the comments behind their fields.

`python -m edgekd.stages.report.schema > docs/report.schema.json` writes the published one.
"""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from edgekd.core import artifact, bench_result, build_record, gate, mixed_precision
from edgekd.stages.report import load

MODULES = (artifact, gate, mixed_precision, build_record, bench_result, load)  # that the parts of a report are from
SAID = re.compile(r"^    (\w+): [^#\n]*  # (.+)$", re.MULTILINE)


def schema() -> dict[str, Any]:
    """Draft 2020-12. Further keys are allowed, for a later edgekd may add some; `schema` counts what breaks readers."""
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    whole, files = (TypeAdapter(kind).json_schema() for kind in (build_record.Record, list[load.Listed]))
    parts = {name: described(name, part) for name, part in (whole.pop("$defs") | files.pop("$defs")).items()}
    keys = described("Record", whole)["properties"]
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "report.json of edgekd",
        "type": "object",
        "properties": {"schema": {"const": build_record.SCHEMA}, **keys, "files": files},
        "required": ["schema", *whole["required"], "files"],
        "$defs": parts,
    }


def described(name: str, part: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass with its docstring, and what its source says of each field; titles are but names."""
    kind = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    said = dict(SAID.findall(inspect.getsource(kind)))
    keys = {}
    for key, value in part["properties"].items():
        value.pop("title", None)
        keys[key] = value | ({"description": re.sub(r"\bNone\b", "null", said[key])} if key in said else {})
    told = "" if kind.__doc__.startswith(f"{name}(") else inspect.cleandoc(kind.__doc__)  # dataclass writes its own
    return part | {"properties": keys} | ({"description": told} if told else {})


def text() -> str:
    """As it is published."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
