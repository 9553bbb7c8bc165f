"""The published JSON Schema is that of the code, and independent validators read report.json with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgekd.core import serialization
from edgekd.core.build_record import SCHEMA
from edgekd.stages.report.json_schema import schema, text
from edgekd.stages.report.load import read
from tests.test_reading import whole
from tests.test_regressions import bench, record, row, written

ROOT = Path(__file__).parent.parent
COMPARES = "edgekd.stages.report.regressions"
PUBLISHED = ROOT / "docs" / "report.schema.json"


def validator() -> Any:
    found = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_the_published_schema_is_that_of_the_code():
    again = "python -m edgekd.stages.report.json_schema > docs/report.schema.json"
    assert PUBLISHED.read_text(encoding="utf-8") == text(), f"write it again: {again}"
    assert schema()["properties"]["schema"] == {"const": SCHEMA}


def test_it_is_printed_and_builds_are_compared_without_torch():
    name = "'edgekd.stages.report.json_schema', run_name='__main__'"
    code = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_module({name}); import {COMPARES}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == text()


def test_a_report_fits_and_what_is_no_report_does_not(tmp_path):
    found = json.loads((written(tmp_path, whole()) / "report.json").read_text())
    validator().validate(found)
    for path, value in (
        (("schema",), 1),
        (("name",), None),
        (("benches",), {}),
        (("benches", 0, "measurements", 0, "metrics", "p50_ms"), "fast"),
        (("benches", 0, "measurements", 0, "model", "role"), "judge"),
        (("benches", 0, "measurements", 0, "model", "file", "name"), "../../etc/passwd"),
        (("teacher", "file", "sha256"), "short"),
    ):
        wrong = json.loads(json.dumps(found))
        at = wrong
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert not validator().is_valid(wrong), path


def test_every_key_is_described_and_further_ones_are_let_through(tmp_path):
    made = record(bench(row("kd int8")))
    found = json.loads((written(tmp_path, made) / "report.json").read_text())
    assert set(found) == set(schema()["properties"]) >= set(schema()["required"])
    (tmp_path / "report.json").write_text(json.dumps(found | {"later": 1}))
    validator().validate(found | {"later": 1})
    assert serialization.to_json(read(tmp_path / "report.json")) == serialization.to_json(made)


@pytest.mark.slow
def test_the_report_of_a_build_fits(tmp_path):
    asked = (
        "--set",
        "bench.scopes=[end_to_end, cold_start]",
        "--set",
        "student.baselines=[]",
        "-t",
        "cpu",
        "-t",
        "jetson",
    )
    words = ["build", "digits", "--smoke", "--out", "run", *asked]
    command, path = [sys.executable, "-m", "edgekd", *words], os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, env=path)
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    validator().validate(found)
    assert len(found["benches"]) == 3 and read(tmp_path / "run" / "report.json")
