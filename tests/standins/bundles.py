"""Bundles of tiny networks, written by hand as the format says, and the runner started on them as people start it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgekd.stages.bench.runner import runner_path

SHAPE = (2, 4, 4)
CLASSES = 5
PROTOCOL = {"rounds": 4, "calls_per_round": 5, "warmup_s": 0.02, "warmup_calls": 10, "seed": 0, "spinning": True}
Messages = list[dict[str, Any]]


def network(
    path: Path,
    width: int,
    seed: int = 0,
    batch: int | str = 1,
    shape: tuple[int, ...] = SHAPE,
    classes: int = CLASSES,
) -> Path:
    """Two matrix products over a flattened image; `width` decides how long they take."""
    random = np.random.default_rng(seed)
    sizes = {"a": (int(np.prod(shape)), width), "b": (width, classes)}
    weights = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "a"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=7, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


def engine(name: str, role: str, model: str, **changes: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "role": role,
        "method": "" if role == "teacher" else "kd",
        "model": f"models/{model}",
        "precisions": [name.rpartition(" ")[2]],
        "typed": False,
        "dla": None,
        "cache": None,
        "expected": f"expected/{Path(model).stem}.npy",
        "agreement": 99.0,
        "macs": 1,
        "parameters": 1,
    }
    return row | changes


def make_bundle(home: Path, runtime: str = "onnxruntime", engines: Messages | None = None, **changes: Any) -> Path:
    """A slow teacher and a small student."""
    for folder in ("models", "expected"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    network(home / "models" / "teacher.onnx", 2048, seed=1)
    network(home / "models" / "student.onnx", 8, seed=2)
    random = np.random.default_rng(0)
    inputs = random.standard_normal((12, *SHAPE)).astype(np.float32)
    np.save(home / "inputs.npy", inputs)
    np.save(home / "labels.npy", random.integers(CLASSES, size=12))
    for path in (home / "models").glob("*.onnx"):
        np.save(home / "expected" / f"{path.stem}.npy", compute_expected(path, inputs[:8]))
    rows = engines or [
        engine("teacher fp32", "teacher", "teacher.onnx"),
        engine("student fp32", "student", "student.onnx"),
    ]
    manifest = {
        "schema": 2,
        "name": "tiny",
        "target": "jetson" if runtime == "tensorrt" else "cpu",
        "runtime": runtime,
        "threads": 1,
        "edgekd": "0",
        "jetpack": None,
        "board": None,
        "tensorrt": None,
        "engines": rows,
        "inputs": "inputs.npy",
        "labels": "labels.npy",
        "task": {"use": "classification"},
        "verify_images": 8,
        "protocol": PROTOCOL,
    }
    return write_manifest(home, manifest | changes)


def compute_expected(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": image[None]})[0] for image in images])


def write_manifest(home: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest with the hashes of the files as they are now."""
    files = [path for path in home.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest["files"] = {
        str(path.relative_to(home)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in files
        if path.relative_to(home).parts[0] != "results"
    }
    (home / "manifest.json").write_text(json.dumps(manifest, sort_keys=True))
    return home


def start(command: str, home: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, str(runner_path()), command, "--bundle", str(home), *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(command: str, home: Path, *words: str, **options: Any) -> tuple[int, Messages]:
    """Exit code, and the lines on stdout."""
    with start(command, home, *words, **options) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert not stderr, stderr
    return process.returncode, [json.loads(line) for line in stdout.splitlines()]


def read_result(home: Path, command: str) -> Any:
    return json.loads((home / "results" / f"{command}.json").read_text())
