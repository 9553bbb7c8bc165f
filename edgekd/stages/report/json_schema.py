"""The JSON Schema of report.json, made from the dataclasses that it is read into, and the docstrings of their fields.

`python -m edgekd.stages.report.json_schema > docs/report.schema.json` writes the published one.
"""

from __future__ import annotations

import json
from typing import Any

from edgekd.core import build_record
from edgekd.stages.report.load import ListedFile


def schema() -> dict[str, Any]:
    """Return the schema, draft 2020-12.

    Further keys are allowed, for a later edgekd may add some; the key `schema` counts what breaks readers.
    """
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    config = ConfigDict(use_attribute_docstrings=True)  # of lists, since dataclasses have a configuration of their own
    records, files = (TypeAdapter(kind, config=config) for kind in (list[build_record.BuildRecord], list[ListedFile]))
    parts, listed = records.json_schema()["$defs"], files.json_schema()
    parts = {name: without_titles(part) for name, part in (parts | listed.pop("$defs")).items()}
    record = parts.pop("BuildRecord")
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "report.json of edgekd",
        "description": record["description"],
        "type": "object",
        "properties": {
            "schema": {"const": build_record.SCHEMA},
            **record["properties"],
            "files": without_titles({"properties": {"files": listed}})["properties"]["files"],
        },
        "required": ["schema", *record["required"], "files"],
        "$defs": parts,
    }


def without_titles(part: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a dataclass without the titles of its fields, which only repeat their names."""
    fields = {
        name: {key: v for key, v in field.items() if key != "title"} for name, field in part["properties"].items()
    }
    return part | {"properties": fields}


def text() -> str:
    """Return the schema as it is published."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
