"""A result from elsewhere: over SSH in one command, or brought by hand; and none but the right one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import ConfigError, EdgekdError
from edgekd.pipelines.import_result import import_result
from tests import sshd

ROOT = Path(__file__).parent.parent
BUILD = ("build", "digits", "--smoke", "--target", "cpu", "--out", "runs/a", "--set", "student.baselines=[]")


def edgekd(*words: Any, cwd: Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert "Traceback" not in done.stderr
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a build `runs/a`, measured here, whose bundle went elsewhere and ran: `away`."""
    home = tmp_path_factory.mktemp("built")
    edgekd(*BUILD, "--bundle", cwd=home)
    shutil.copytree(home / "runs" / "a" / "bundle-cpu", home / "away")
    words = ["sh", "run.sh"]
    subprocess.run(
        words, check=True, capture_output=True, cwd=home / "away", env=os.environ | {"PYTHON": sys.executable}
    )
    return home


@pytest.fixture
def place(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "place")
    return tmp_path / "place"


def bench(place: Path) -> dict[str, Any]:
    return json.loads((place / "runs" / "a" / "report.json").read_text())["benches"][0]


def samples(place: Path) -> set[str]:
    return {f.name for f in (place / "runs" / "a").glob("samples-*.npz")}


@pytest.mark.slow
def test_an_imported_result_takes_the_place_of_what_was_there_and_stays(place):
    before, own = bench(place), samples(place)
    done = edgekd("import-result", "away/results/result.json", "--json", cwd=place)
    after = bench(place)
    assert [m["model"]["name"] for m in after["measurements"]] == [m["model"]["name"] for m in before["measurements"]]
    away = json.loads((place / "away" / "results" / "result.json").read_text())
    assert after["samples"]["sha256"] == away["files"]["samples.npz"]["sha256"] != before["samples"]["sha256"]
    assert samples(place) != own and len(samples(place)) == 1
    assert after["selected"] in ("kpn int8", "kpn fp32") and after["aa_ratio"] and after["machine"]["processor"]
    told = json.loads(done.stdout)["targets"]["cpu"]
    labels = np.load(place / "away" / "labels.npy")
    for index, engine in enumerate(json.loads((place / "away" / "manifest.json").read_text())["engines"]):
        logits = np.load(place / "away" / "results" / f"logits-{index}.npy")
        assert told[engine["name"]]["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    assert "kpn int8" in (place / "runs" / "a" / "report.html").read_text()
    shutil.rmtree(place / "away")
    again = edgekd(*BUILD, cwd=place)  # the same configuration does not lose it
    assert "measured elsewhere" in again.stderr and "bench-cpu: unchanged" in again.stderr
    assert bench(place) == after


@pytest.mark.slow
def test_results_that_are_not_of_this_build_are_refused_with_the_reason(place, monkeypatch):
    monkeypatch.chdir(place)
    away = place / "away" / "results"
    found = json.loads((away / "result.json").read_text())
    report = (place / "runs" / "a" / "report.json").read_bytes()

    def refused(kind: type[EdgekdError], *words: str, path: Path = away / "result.json") -> None:
        with pytest.raises(kind) as failure:
            import_result(path, None)
        assert failure.value.hint and all(word in failure.value.what for word in words), failure.value
        assert (place / "runs" / "a" / "report.json").read_bytes() == report
        assert not (place / "runs" / "a" / "bundle-cpu" / "results").exists()

    def changed(**facts: Any) -> None:
        (away / "result.json").write_text(json.dumps(found | facts))

    refused(ConfigError, "cannot be read", path=away / "none.json")
    changed(bundle="0" * 64)
    refused(ConfigError, "bundle 000000000000", "no build in `runs` has made", "`runs/a/bundle-cpu` is ")
    changed(schema=99)
    refused(ConfigError, "has schema 99")
    changed(bench=None)
    refused(EdgekdError, "has no `bench`")
    changed(bench=found["bench"] | {"invalid": ["2 thermal alarms"]})
    refused(EdgekdError, "not valid: 2 thermal alarms")
    changed()
    arrays = away / "samples.npz"
    kept = arrays.read_bytes()
    arrays.write_bytes(kept[: len(kept) // 2])
    refused(ConfigError, "not as the device wrote it")
    arrays.unlink()
    refused(ConfigError, "`samples.npz` of the result is not in")
    arrays.write_bytes(kept)
    for content in (json.dumps(found)[:-20], json.dumps(found | {"bench": {"models": "\x1b[31m"}})):
        (away / "result.json").write_text(content)
        done = edgekd("import-result", "away/results/result.json", cwd=place, check=False)
        assert done.returncode == 2 and "hint: " in done.stderr and "\x1b" not in done.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[sshd.Server]:
    if sshd.lacking():
        pytest.skip(sshd.lacking())
    (tmp_path / "sshd").mkdir()
    made = sshd.make(tmp_path / "sshd")
    made.start()
    yield made
    made.stop()


@pytest.mark.slow
def test_a_build_over_ssh_is_one_command_and_a_second_one_needs_no_device(place, server):
    address = f"ssh://device{place}/there?python={sys.executable}"
    config = {"EDGEKD_SSH_CONFIG": str(server.config)}
    done = edgekd(*BUILD, "--device", address, cwd=place, **config)
    assert "sending" in done.stderr and "bundle-cpu: unchanged" in done.stderr  # the bundle is that of --bundle
    found = bench(place)
    there = json.loads((place / "there" / "results" / "result.json").read_text())
    assert found["samples"]["sha256"] == there["files"]["samples.npz"]["sha256"]
    server.stop()
    for words in (("--device", address), ()):
        again = edgekd(*BUILD, *words, cwd=place, **config)
        assert "bench-cpu: unchanged" in again.stderr and bench(place) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "telnet://board/x"), "by SSH only"),
        (("--target", "openvino", "--device", "ssh://board/x"), "a device is for one target"),
        (("--lock-clocks",), "--lock-clocks is for a device"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused_before_anything_is_trained(words, said, tmp_path):
    done = edgekd(*BUILD, *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.glob("runs/a/steps/*-*"))
