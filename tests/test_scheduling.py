"""Scheduling: a test that kills its worker fails under its name, and all others run once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("xdist")
CONFTEST = "from tests.conftest import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler\n"


def run(folder: Path, files: dict[str, str]) -> str:
    """What pytest says of files of tests, on two workers; d in the name of a test kills it, p does not."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name, tests in files.items():
        body = {"p": "open(f'{os.environ[\"RAN\"]}/{NAME}', 'x').close()", "d": "os.abort()"}
        cases = (f"def test_{i}_{kind}(): NAME = '{name}{i}'; {body[kind]}" for i, kind in enumerate(tests))
        (folder / f"test_{name}.py").write_text("\n".join(["import os", *cases]))
    (folder / "ran").mkdir()
    words = ["-p", "no:cacheprovider", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    # in CI pytest repeats whole messages in its summary
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "BUILD_NUMBER")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "RAN": str(folder / "ran")},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and "INTERNALERROR" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        {"a": "pppp", "b": "pdpp", "c": "pdpp", "e": "ppp", "f": "pp"},  # two at about the same time
        {"a": "p", "b": "d", "c": "dp", "e": "p"},  # little is left for a new worker
        {"a": "ddd", "b": "ppd"},  # the last one, too
        {"a": "pdp"},
    ],
    ids="-".join,
)
def test_a_worker_that_dies_names_its_test_and_the_others_run_once(tmp_path, files):
    told = run(tmp_path, files)
    cases = [
        (f"test_{name}.py::test_{i}_{kind}", f"{name}{i}") for name, k in files.items() for i, kind in enumerate(k)
    ]
    deadly = [test for test, _ in cases if test.endswith("_d")]
    assert f"{len(deadly)} failed, {len(cases) - len(deadly)} passed" in told
    assert all(told.count(f"crashed while running '{test}'") == 1 for test in deadly)
    assert {path.name for path in (tmp_path / "ran").iterdir()} == {name for test, name in cases if test.endswith("_p")}
