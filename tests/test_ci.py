"""The templates for CI: they are what their systems take, and jobs end as builds do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

CI = Path(__file__).parents[1] / "deploy" / "ci"
ACTION = CI / "edgekd-build" / "action.yml"
# stands in for docker: keeps its words, leaves a report as `edgekd build` does unless that is a mistake, ends as told
DOCKER = """#!/bin/sh
printf '%s\\n' "$@" > "words-$1"
[ "$1" = run ] || exit 0
shift && while [ "$1" != --cidfile ]; do shift; done
echo 0123abcd > "$2"
case $WANTED in 0 | 3 | 4) mkdir -p runs/build && echo "## the report" > runs/build/report.md ;; esac
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
    action = YAML(typ="safe").load(ACTION.read_text())
    asked = {name: told.get("default", "") for name, told in action["inputs"].items()} | inputs
    known = {f"inputs.{name}": value for name, value in asked.items()}
    ended = 0
    for step in action["runs"]["steps"]:
        if "run" not in step:
            continue
        given = {key: known[value.strip("${} ")] for key, value in step.get("env", {}).items()}
        files = {"GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path)}
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=given | files | place | {"WANTED": str(code)},
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


OLD = (
    "junit.xml",
    "report.md",
    "report.json",
    "manifest.json",
    "samples-cpu.npz",
    "artifacts/cpu/a.onnx",
    "bundle-jetson/run.sh",
)


def leave_a_build(out: Path) -> None:
    for name in (*OLD, "steps/a/step.json", "bundle-jetson/results/result.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")


def check_what_is_left(out: Path) -> None:
    assert not [name for name in OLD if (out / name).exists() and (out / name).read_text() == "old"]
    assert (out / "steps/a/step.json").exists() and (out / "bundle-jetson/results/result.json").exists()


@pytest.mark.parametrize(("code", "told"), [(0, True), (3, True), (4, True), (1, False), (2, False)])
def test_what_a_job_shows_is_of_its_own_build(tmp_path: Path, code: int, told: bool) -> None:
    """After a mistake, what an older build wrote may lie in the cache."""
    leave_a_build(tmp_path / "runs" / "build")
    job(tmp_path, code)
    check_what_is_left(tmp_path / "runs" / "build")
    summary = tmp_path / "summary.md"
    assert summary.exists() == told and (not told or summary.read_text() == "## the report\n")


@pytest.mark.parametrize("before", [True, False])
def test_a_job_of_gitlab_shows_what_is_of_its_own_build(tmp_path: Path, before: bool) -> None:
    told: dict[str, Any] = YAML(typ="safe").load((CI / "gitlab.yml").read_text())["edgekd"]
    (tmp_path / "edgekd").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > words\nexit 3\n")
    (tmp_path / "edgekd").chmod(0o755)
    if before:
        leave_a_build(tmp_path / told["variables"]["EDGEKD_OUT"])
    environment = os.environ | told["variables"] | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", "-eo", "pipefail", "-c", "\n".join(told["script"])]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 3
    if before:
        check_what_is_left(tmp_path / told["variables"]["EDGEKD_OUT"])
    assert (tmp_path / "words").read_text().splitlines() == [
        *("build", "edgekd.yaml", "--out", "runs/build", "--prune", "--target", "cpu", "--target", "jetson", "--bundle")
    ]


def test_a_container_that_outlives_its_job_is_stopped_before_the_cache_is_kept(tmp_path: Path) -> None:
    steps = YAML(typ="safe").load(ACTION.read_text())["runs"]["steps"]
    stops = next(i for i, step in enumerate(steps) if "docker stop" in step.get("run", ""))
    keeps = next(i for i, step in enumerate(steps) if "cache/save" in step.get("uses", ""))
    assert stops < keeps and steps[stops]["if"] == steps[keeps]["if"] == "always()"
    job(tmp_path, 0)
    assert (tmp_path / "words-stop").read_text().split() == ["stop", "--time", "10", "0123abcd"]


def test_inputs_become_words_and_none_of_them_is_run(tmp_path: Path) -> None:
    wild = '$(touch pwned) "; touch pwned #'
    job(
        tmp_path,
        0,
        image="it@sha256:0",
        config=wild,
        targets="cpu jetson",
        arguments="--bundle\n--set student.epochs=4",
    )
    words = (tmp_path / "words-run").read_text().splitlines()
    build = words[words.index("it@sha256:0") :]
    assert build[1:] == ["build", wild, "--out", "runs/build", "--prune"] + [
        *("--target", "cpu", "--target", "jetson", "--bundle", "--set", "student.epochs=4")
    ]
    assert "--read-only" in words and not (tmp_path / "pwned").exists()


def test_what_a_job_keeps_is_the_folder_that_it_builds_into() -> None:
    told: dict[str, Any] = YAML(typ="safe").load((CI / "gitlab.yml").read_text())["edgekd"]
    out = told["variables"]["EDGEKD_OUT"]
    assert told["artifacts"]["paths"] == [f"{out}/"]
    assert told["artifacts"]["exclude"] == [f"{out}/steps/**/*"]
