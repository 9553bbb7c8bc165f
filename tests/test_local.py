"""A bundle that is measured on this machine, with stand-ins for NVIDIA's libraries in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekd.core.artifact import File
from edgekd.errors import EdgekdError
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import pack_runner
from edgekd.stages.device import local
from edgekd.stages.device.bundle import Bundle
from edgekd.stages.device.results import build_bench_result
from edgekd.targets.tensorrt import TensorRt
from tests.standins import bundles

ROOT = Path(__file__).parent.parent
DEVICE = Path(bundles.__file__).parent / "device"
BUILD = ("build", "digits", "--smoke", "-t", "tensorrt", "-s", "student.baselines=[]", "-o", "out", "--json")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    for name, value in {"PYTHONPATH": str(DEVICE), "STANDIN_TENSORRT": "10.3.0", "LD_LIBRARY_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    rows = [
        bundles.engine(f"{n} fp32", n, f"{n}.onnx", predicts_labels=True, typed=True) for n in ("teacher", "student")
    ]
    home = bundles.make_bundle(tmp_path / "bundle", "tensorrt", rows)
    pack_runner(home / "runner.pyz")
    bundles.write_manifest(home, json.loads((home / "manifest.json").read_text()))
    return Bundle(File.of(home / "manifest.json"))


def out_of(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir(exist_ok=True)
    return tmp_path / "out"


def test_a_bundle_is_built_verified_and_timed_here_and_left_as_it_is(bundle, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in bundle.folder.rglob("*")}
    returned = local.measure(out_of(tmp_path), bundle)
    assert {p: p.stat().st_mtime_ns for p in bundle.folder.rglob("*")} == before
    (tmp_path / "bench").mkdir()
    result = build_bench_result(tmp_path / "bench", bundle, returned, BenchConfig(rounds=3, metrics=("top1", "p50_ms")))
    assert [m.model.name for m in result.measurements] == ["teacher fp32", "student fp32"]
    assert result.runtime.name == "tensorrt" and result.runtime.version == "10.3.0" and result.measurements[1].speedup
    assert list((tmp_path / "out" / "engines").iterdir())


def test_an_interrupted_run_goes_on_with_what_is_finished(bundle, tmp_path):
    out = out_of(tmp_path)
    local.run_commands(bundle, out, ("doctor", "build", "verify"))
    made = {p: p.stat().st_mtime_ns for p in (out / "engines").glob("*.engine")} | {out: 0}
    local.measure(out, bundle)
    assert len(made) > 1
    assert {p: p.stat().st_mtime_ns for p in (out / "engines").glob("*.engine")} | {out: 0} == made


def test_another_tensorrt_is_another_machine_to_the_ledger(bundle, monkeypatch):
    one = local.probe(bundle)
    assert one == local.probe(bundle) and one["versions"]["tensorrt"] == "10.3.0" and one["device"]["sm"] == "8.7"
    monkeypatch.setenv("STANDIN_TENSORRT", "11.4.0")
    assert local.probe(bundle) != one


def test_what_the_runner_lacks_here_is_told_with_what_to_type(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(EdgekdError, match="this machine: .*tensorrt") as failure:
        local.measure(out_of(tmp_path), bundle)
    assert "pip install tensorrt" in failure.value.hint and "same command again" in failure.value.hint


def test_a_runner_that_dies_is_told_with_its_last_words(bundle, tmp_path):
    (bundle.folder / "runner.pyz").write_text("import os\nprint('so long', flush=True)\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(EdgekdError, match="this machine: the job was ended by signal 9; its last lines: so long"):
        local.measure(out_of(tmp_path), bundle)


def edgekd(*words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, "-m", "edgekd", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_a_workstation_is_measured_by_the_build_itself_once_it_has_all_and_till_then_says_what_it_lacks(tmp_path):
    if not TensorRt().unavailable_reason():
        pytest.skip("TensorRT is here, and would be used")
    without = json.loads(edgekd(*BUILD, cwd=tmp_path).stdout)
    assert "not measured on device: there is no" in without["not_measured"]["tensorrt"]
    assert not without["targets"]["tensorrt"] and (tmp_path / "out" / "bundle-tensorrt" / "manifest.json").is_file()
    nvidia = {"STANDIN_TENSORRT": "11.4.0", "LD_LIBRARY_PATH": "", "PYTHONPATH": f"{DEVICE}{os.pathsep}{ROOT}"}
    done = edgekd(*BUILD, cwd=tmp_path, **nvidia)
    told: dict[str, Any] = json.loads(done.stdout)
    models = told["targets"]["tensorrt"]
    assert {"teacher fp32", "kpn fp32", "kpn fp16", "kpn int8"} <= models.keys() and not told["not_measured"]
    assert all(0 <= m["top1"] <= 100 and m["p50_ms"] > 0 for m in models.values())
    assert "bundle-tensorrt: unchanged" in done.stderr and "run-tensorrt ..." in done.stderr
    again = edgekd(*BUILD, cwd=tmp_path, **nvidia)
    assert "run-tensorrt: unchanged" in again.stderr and json.loads(again.stdout) == told
