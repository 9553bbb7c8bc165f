"""The runner on 64-bit Arm, as qemu imitates it: a bundle of the cpu target answers there as it does here.

Only answers are compared: what qemu takes for a call says nothing about a processor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchResult
from edgekd.models.resnet import ResNet
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import runner_path
from edgekd.stages.device.bundle import Bundle, BundleConfig, BundleModel, BundleRequest, write_bundle
from edgekd.stages.device.results import build_bench_result, load_result
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.quantize import Int8Options, write_int8_files
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate_step
from edgekd.targets.cpu import Cpu
from edgekd.tasks.classification import Classification
from tests import zoo
from tests.standins.bundles import read_result

pytestmark = pytest.mark.slow
ARM = Cpu(arch="arm")
IMAGES = 256
QUICK = BenchConfig(rounds=3, calls_per_round=3, warmup_s=0.0, metrics=("top1", "agreement"))
PROCESSORS = ("cortex-a72", "max")  # without and with 8-bit dot products, for which ONNX Runtime has other kernels
ENGINES = ["teacher fp32", "net fp32", "net int8"]


def lacking() -> str:
    """Why nothing can be imitated here, with the remedy; empty where it can."""
    if not emulator():
        return "there is no qemu-aarch64: apt install qemu-user-static"
    make = "make one: sh tests/arm_root.sh FOLDER"
    if "EDGEKD_ARM_ROOT" not in os.environ:
        return f"EDGEKD_ARM_ROOT names no folder with a Debian for Arm; {make}"
    root = os.environ["EDGEKD_ARM_ROOT"]
    if not Path(root, "usr/lib/python3/dist-packages/onnxruntime").is_dir():
        return f"EDGEKD_ARM_ROOT={root} has no onnxruntime; {make}"
    return ""


def emulator() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.fixture(scope="module", params=PROCESSORS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python for Arm that starts itself again by its own name, as the runner starts its children."""
    if lacking():
        pytest.skip(lacking())
    path, root = tmp_path_factory.mktemp("arm") / "python3", Path(os.environ["EDGEKD_ARM_ROOT"]).absolute()
    line = f'exec "{emulator()}" -cpu {request.param} -L "{root}" -0 "$0" "{root}/usr/bin/python3" "$@"'
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A student that reads digits, in FP32 and in signed INT8."""
    home, out = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("bundle")
    digits = load_digits()
    images, labels = ((digits.images[:, None] - 4.9) / 6.0).astype(np.float32), digits.target
    net = taught(images[:1200], labels[:1200])
    np.savez(home / "calib.npz", image=images[:64])
    np.save(home / "inputs.npy", images[1200:])
    np.save(home / "labels.npy", labels[1200:])
    calibration, inputs, answers = (File.of(home / name) for name in ("calib.npz", "inputs.npy", "labels.npy"))
    fp32 = export(home, "net", net, images[:16], zoo.logits(10), ExportConfig())
    ranges = calibrate_step(home, fp32, calibration, QuantizeConfig())
    int8 = write_int8_files(home, fp32, calibration, ranges, Int8Options(ARM.scheme))
    networks = (
        BundleModel("teacher", "teacher", "supervised", True, fp32.single),
        BundleModel("net", "student", "any", True, fp32.single, int8.single, ranges),
    )
    config = BundleConfig(images=IMAGES, verify_images=IMAGES)
    files = (calibration, inputs, answers)
    return write_bundle(out, BundleRequest("digits", "arm", ARM, networks, *files, Classification(), config, QUICK))


def taught(images: np.ndarray, labels: np.ndarray) -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(depth=8, width=8).build(10, 1)
    optimiser = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for _ in range(6):
        for part in torch.randperm(len(images)).split(48):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(torch.from_numpy(images)[part]), torch.from_numpy(labels)[part]).backward()
            optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def there(python: Path, made: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle in which `run.sh` ran on Arm."""
    home = tmp_path_factory.mktemp("device") / "bundle"
    shutil.copytree(made.folder, home)
    ran = subprocess.run(["sh", "run.sh"], cwd=home, env=os.environ | {"PYTHON": str(python)}, capture_output=True,
                         text=True, timeout=1200, check=False)  # fmt: skip
    assert ran.returncode == 0 and not ran.stderr, ran.stdout + ran.stderr
    return home


def test_the_doctor_without_a_bundle_says_that_this_is_arm_and_lacks_nothing(python: Path) -> None:
    ran = subprocess.run([python, runner_path(), "doctor"], capture_output=True, text=True, check=True)
    seen: dict[str, Any] = json.loads(ran.stdout)
    assert "aarch64" in seen["machine"]["system"] and "x86" not in json.dumps(seen["machine"])
    assert {"numpy", "onnxruntime"} <= seen["versions"].keys() and seen["missing"] == []
    assert "asimddp" not in seen["machine"]["flags"] and "avx2" not in seen["machine"]["flags"]


def test_every_engine_answers_on_arm_as_on_the_host(there: Path) -> None:
    assert (
        "aarch64" in read_result(there, "doctor")["machine"]["system"] and read_result(there, "doctor")["missing"] == []
    )
    facts = {fact["name"]: fact for fact in read_result(there, "verify")["engines"]}
    assert list(facts) == ENGINES
    assert all(fact["passes"] and fact["verify_images"] == fact["images"] == IMAGES for fact in facts.values()), facts
    assert facts["net fp32"]["agreement"] == 100 and facts["net fp32"]["max_difference"] < 1e-3, facts
    assert facts["net int8"]["agreement"] >= 99, facts
    assert abs(facts["net int8"]["top1"] - facts["net fp32"]["top1"]) <= 2 and facts["net fp32"]["top1"] > 85, facts


def test_what_arm_measured_is_imported_as_a_comparison(there: Path, made: Bundle, tmp_path: Path) -> None:
    returned = load_result(there / "results", made)
    result: BenchResult = build_bench_result(tmp_path, made, returned, QUICK)
    assert "aarch64" in result.machine.system and result.runtime.name == "onnxruntime"
    rows = {one.model.name: one for one in result.measurements}
    assert list(rows) == ENGINES and not any(one.mismatch for one in rows.values())
    for index, name in enumerate(ENGINES):
        right = np.load(there / "results" / f"logits-{index}.npy").argmax(1) == np.load(made.folder / "labels.npy")
        assert rows[name].metrics["top1"] == pytest.approx(100 * right.mean())
    assert rows["net int8"].metrics["agreement"] >= 99
