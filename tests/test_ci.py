"""The templates for CI: they are what their systems take, and jobs end as builds do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CI = Path(__file__).parents[1] / "deploy" / "ci"
ACTION = CI / "edgekd-build" / "action.yml"
# stands in for docker: keeps its words, leaves a report as `edgekd build` does, ends as it was told
DOCKER = """#!/bin/sh
printf '%s\\n' "$@" > words
mkdir -p runs/build && echo "## the report" > runs/build/report.md
exit $WANTED
"""


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-actions", ACTION),
        ("vendor.github-workflows", CI / "github.yml"),
        ("vendor.gitlab-ci", CI / "gitlab.yml"),
    ],
)
def test_a_template_is_what_its_system_takes(schema: str, path: Path) -> None:
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def job(tmp_path: Path, code: int, **inputs: str) -> tuple[int, Path]:
    """Run the action's scripts as GitHub would, with `docker` ending in `code`; the exit code of the last."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    action = yaml.safe_load(ACTION.read_text())
    asked = {name: told.get("default", "") for name, told in action["inputs"].items()} | inputs
    known = {f"inputs.{name}": value for name, value in asked.items()}
    ended = 0
    for step in action["runs"]["steps"]:
        if "run" not in step:
            continue
        given = {key: known[value.strip("${} ")] for key, value in step["env"].items()}
        files = {"GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
        path = f"{tmp_path}:{os.environ['PATH']}"
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=given | files | {"PATH": path, "WANTED": str(code)},
            capture_output=True,
            check=False,
        )
        ended = done.returncode
        for line in (tmp_path / "output").read_text().splitlines():
            name, value = line.split("=")
            known[f"steps.build.outputs.{name}"] = value
    return ended, tmp_path


@pytest.mark.parametrize(
    ("code", "undecided", "ended"), [(0, "fail", 0), (1, "fail", 1), (2, "pass", 2), (3, "pass", 3)]
)
def test_the_job_ends_as_the_build_does(tmp_path: Path, code: int, undecided: str, ended: int) -> None:
    assert job(tmp_path, code, undecided=undecided)[0] == ended


def test_a_gate_that_cannot_be_decided_fails_the_job_unless_it_may_pass(tmp_path: Path) -> None:
    assert job(tmp_path, 4)[0] == 4
    assert job(tmp_path, 4, undecided="pass")[0] == 0


@pytest.mark.parametrize(("code", "told"), [(0, True), (3, True), (4, True), (1, False), (2, False)])
def test_the_summary_is_the_report_of_a_build_that_has_one(tmp_path: Path, code: int, told: bool) -> None:
    """After a mistake, an older report may lie in the cache: it is not this build's."""
    job(tmp_path, code)
    assert (tmp_path / "summary.md").exists() == told


def test_inputs_become_words_and_none_of_them_is_run(tmp_path: Path) -> None:
    wild = '$(touch pwned) "; touch pwned #'
    job(
        tmp_path, 0, image="it@sha256:0", config=wild, targets="cpu jetson", arguments="--bundle --set student.epochs=4"
    )
    words = (tmp_path / "words").read_text().splitlines()
    build = words[words.index("it@sha256:0") :]
    assert build[1:] == ["build", wild, "--out", "runs/build", "--target", "cpu", "--target", "jetson"] + [
        *("--bundle", "--set", "student.epochs=4")
    ]
    assert "--read-only" in words and not (tmp_path / "pwned").exists()


def test_what_a_job_keeps_is_the_folder_that_it_builds_into() -> None:
    told: dict[str, Any] = yaml.safe_load((CI / "gitlab.yml").read_text())["edgekd"]
    out = told["variables"]["EDGEKD_OUT"]
    assert told["artifacts"]["paths"] == [f"{out}/"]
    assert told["artifacts"]["exclude"] == [f"{out}/steps/**/*"]
