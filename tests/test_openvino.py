"""The OpenVINO target, on the real runtime: its answers, what it reads back, and that it tells nobody."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry, BenchResult
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.core.target import Target
from edgekd.errors import ConfigError, EdgekdError
from edgekd.onnx.session import run_model
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark, run_on_target
from edgekd.stages.bench.compare_files import FileComparison, compare_files, table
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import runner_path
from edgekd.stages.quantize.quantize import QuantizeConfig, quantize_file
from edgekd.targets.openvino import OpenVino
from edgekd.utils import cpu

ROOT = Path(__file__).parent.parent
QUICK = BenchConfig(rounds=4, calls_per_round=5, warmup_s=0.05, metrics=("top1", "agreement", "p50_ms"))
BY_DEFAULT = "bf16" if {"avx512_bf16", "amx_bf16"} & set(cpu.flags()) else "fp32"  # what OpenVINO chooses on x86
NO_OPENVINO = "openvino is not installed (pip install 'edgekd[openvino]')"
real = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason=NO_OPENVINO)


def network(path: Path, batch: int | str = 1, size: int | str = 8) -> Path:
    """A convolution with a residual sum and a classifier, (N, 3, 8, 8) to (N, 10)."""
    random = np.random.default_rng(0)
    shapes = {"a": (8, 3, 3, 3), "b": (8, 8, 3, 3), "c": (8, 10)}
    weights = {n: random.standard_normal(shape).astype(np.float32) / 3 for n, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["first"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["first"], ["active"]),
        helper.make_node("Conv", ["active", "b"], ["second"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["second", "active"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "c"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "network", [x], [y], constants)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def stored(path: Path, array: np.ndarray) -> File:
    np.save(path, array)
    return File.of(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> File:
    random = np.random.default_rng(1)
    return stored(
        tmp_path_factory.mktemp("images") / "inputs.npy", random.standard_normal((21, 3, 8, 8)).astype(np.float32)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, images: File) -> dict[str, File]:
    """The network in FP32 and in INT8 for this processor: full-range weights saturate where there is no VNNI."""
    home = tmp_path_factory.mktemp("files")
    network(home / "float.onnx")
    inputs = np.load(images.path)
    quantize_file(home / "float.onnx", home / "int8.onnx", inputs, OpenVino().scheme, QuantizeConfig())
    return {"net fp32": File.of(home / "float.onnx"), "net int8": File.of(home / "int8.onnx")}


def measured(out: Path, files: dict[str, File], images: File, target: Target) -> BenchResult:
    """The network on a target; the labels are what it answers in ONNX Runtime."""
    labels = run_model(files["net fp32"].path, np.load(images.path)).argmax(1)
    out.mkdir(exist_ok=True)
    truth = stored(out / "labels.npy", labels)
    who = tuple(
        BenchmarkEntry(name, "student", "kd", "int8" if "int8" in name else "fp32", file, macs=1, parameters=1)
        for name, file in files.items()
    )
    return benchmark(
        out / "bench", BenchmarkRequest(who, plugins.name_of(target), target, images, truth, "net fp32", QUICK)
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, files: dict[str, File], images: File) -> BenchResult:
    return measured(tmp_path_factory.mktemp("bench"), files, images, OpenVino())


# --- answers ---


@real
@pytest.mark.parametrize(
    ("batch", "size"), [("N", 8), ("N", "S"), (7, 8)], ids=["any batch", "any batch and size", "batch of 7"]
)
def test_a_file_answers_as_in_onnxruntime_whatever_its_batch(
    batch: int | str, size: int | str, images: File, tmp_path: Path
) -> None:
    file = File.of(network(tmp_path / "a.onnx", batch, size))
    got = np.load(run_on_target(tmp_path / "openvino", file, OpenVino(), images).path)
    assert got.shape == (21, 10)
    np.testing.assert_allclose(got, run_model(file.path, np.load(images.path)), rtol=1e-4, atol=1e-4)


@real
def test_an_int8_file_answers_nearly_as_in_onnxruntime(files: dict[str, File], images: File, tmp_path: Path) -> None:
    got = np.load(run_on_target(tmp_path / "openvino", files["net int8"], OpenVino(), images).path)
    want = run_model(files["net int8"].path, np.load(images.path))
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


# --- a comparison ---


@real
def test_fp32_the_default_and_int8_are_rows_with_the_precision_that_was_in_force(result: BenchResult) -> None:
    assert [(m.model.name, m.model.precision, m.compute_precision) for m in result.measurements] == [
        ("net fp32", "fp32", "fp32"),
        ("net fp32 (native precision)", "fp32", BY_DEFAULT),
        ("net int8", "int8", "fp32"),
    ]
    exact, default, int8 = result.measurements
    assert exact.metrics["top1"] == 100 and "agreement" not in exact.metrics
    assert default.metrics["agreement"] > 90 and int8.metrics["agreement"] > 80
    assert [m.speedup is None for m in result.measurements] == [True, False, False], "the exact one is the baseline"
    assert "net fp32 (native precision)" in table(result) and BY_DEFAULT in table(result)


@real
def test_the_result_tells_version_threads_streams_and_hint_as_read_back(result: BenchResult) -> None:
    assert result.runtime is not None and result.runtime.name == "openvino" and result.runtime.threads == 1
    assert result.runtime.version[:2] == "20"
    assert result.protocol["runtime"] == {"streams": 1, "pinned": True, "hint": "latency"}


@real
def test_cold_and_cached_compile_times_of_every_model_are_kept(result: BenchResult) -> None:
    starts = result.protocol["cold_start_ms"]
    assert set(starts) == {"net fp32", "net fp32 (native precision)", "net int8", "net fp32 again"}
    for told in starts.values():
        assert set(told) == {"load", "compile", "cached_compile", "first"}
        assert 0 < told["compile"] < told["load"] and told["cached_compile"] > 0


@real
def test_the_throughput_hint_is_told_with_its_latencies(files: dict[str, File], images: File, tmp_path: Path) -> None:
    told = measured(tmp_path, {"net fp32": files["net fp32"]}, images, OpenVino(hint="throughput"))
    assert told.protocol["runtime"]["hint"] == "throughput"


@real
def test_threads_that_there_are_no_cores_for_are_told(files: dict[str, File], images: File, tmp_path: Path) -> None:
    told = measured(tmp_path, {"net fp32": files["net fp32"]}, images, OpenVino(threads=512))
    assert told.runtime is not None and told.runtime.threads < 512
    assert any(text.startswith("threads: 512 were asked for") for text in told.warnings)


@real
def test_files_of_any_origin_are_compared_too(files: dict[str, File], tmp_path: Path) -> None:
    network(tmp_path / "any.onnx", "N")
    models = (tmp_path / "any.onnx", files["net int8"].path)
    told = compare_files(tmp_path / "out", FileComparison(models, "openvino", replace(QUICK, metrics=("p50_ms",))))
    assert [m.model.name for m in told.measurements] == [
        "any.onnx",
        "any.onnx (native precision)",
        "int8.onnx",
    ]


# --- settings, and what is missing ---


def test_settings_are_read_strictly() -> None:
    read = serialization.from_json(Target, {"use": "openvino", "threads": 2, "hint": "throughput", "budget_ms": 1.5})  # type: ignore[type-abstract]
    assert read == OpenVino(threads=2, hint="throughput", budget_ms=1.5)
    assert read.options == {"hint": "throughput"} and read.label == "2t-throughput"
    with pytest.raises(ConfigError, match="threads is 0"):
        OpenVino(threads=0)
    for wrong in ({"hint": "haste"}, {"treads": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            serialization.from_json(Target, {"use": "openvino"} | wrong)  # type: ignore[type-abstract]


def test_without_the_package_the_reason_is_told_and_no_number(
    files: dict[str, File], images: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    told = measured(tmp_path, files, images, OpenVino())
    assert told.not_measured == NO_OPENVINO and not told.measurements


@real
def test_a_file_that_openvino_cannot_read_is_told_in_words(images: File, tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "a.onnx"))
    model.graph.node[1].op_type, model.graph.node[1].domain = "QLinearSum", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(EdgekdError, match="openvino 20.*: No conversion rule found for operations: com.microsoft.QLin"):
        run_on_target(tmp_path / "out", File.of(tmp_path / "a.onnx"), OpenVino(), images)


# --- it tells nobody ---

WATCHED = """
import runpy, sys
def hook(event, arguments):
    if event.startswith(("socket.", "os.fork")):  # OpenVINO's message leaves from a process of its own
        open({log!r}, "a").write(event + "\\n")
        raise OSError("not here")
sys.addaudithook(hook)
sys.argv = {words!r}
runpy.run_path({runner!r}, run_name="__main__")
"""


@real
@pytest.mark.parametrize(("command", "runtime"), [("bench", "openvino"), ("bench", "onnxruntime"), ("doctor", "")])
def test_a_runtime_opens_no_socket_and_leaves_nothing_in_the_home_folder(
    command: str, runtime: str, files: dict[str, File], images: File, tmp_path: Path
) -> None:
    home, log = tmp_path / "home", tmp_path / "sockets.txt"
    home.mkdir()
    protocol = {"rounds": 3, "calls_per_round": 2, "warmup_s": 0.0, "warmup_calls": 1, "seed": 0}
    asked = {"runtime": runtime, "threads": 1, "inputs": str(images.path), "protocol": protocol}
    asked["models"] = [{"name": name, "path": str(file.path)} for name, file in files.items()]
    (tmp_path / "job.json").write_text(json.dumps(asked))
    words = [command, *(["--job", str(tmp_path / "job.json"), "--out", str(tmp_path)] if runtime else [])]
    code = WATCHED.format(log=str(log), words=["runner", *words], runner=str(runner_path()))
    quiet = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY")  # what would keep the runtimes quiet anyway
    environment = {k: v for k, v in os.environ.items() if k not in quiet}
    program = [sys.executable, "-c", code]
    environment |= {"HOME": str(home)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert runtime in (tmp_path / "result.json").read_text() if runtime else "openvino" in done.stdout
    assert not log.exists() and not list(home.iterdir())


# --- the whole build ---


@real
@pytest.mark.slow
def test_a_build_measures_both_runtimes_and_reports_all_rows(tmp_path: Path) -> None:
    words = ["build", "digits", "--smoke", "-t", "cpu", "-t", "openvino", "--out", "out", "--json"]
    small = ["teacher.model.width=4", "student.baselines=[]", "student.epochs=1", "images_per_class=10"]
    done = subprocess.run(
        [sys.executable, "-m", "edgekd", *words, *(w for s in small for w in ("--set", s))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    targets = json.loads(done.stdout)["targets"]
    names = ["teacher fp32", "kpn fp32", "kpn int8", "supervised fp32"]
    assert list(targets["cpu"]) == names
    floats = [[n, f"{n} (native precision)"] if n.endswith("fp32") else [n] for n in names]
    assert list(targets["openvino"]) == sum(floats, [])
    comment = (tmp_path / "out" / "report.md").read_text()
    rows = [line for line in comment.splitlines() if line.startswith("| kpn fp32 (native precision) |")]
    assert len(rows) == 1 and ("| FP32, BF16 |" if BY_DEFAULT == "bf16" else "| FP32") in rows[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "cached compile" in page and "kpn fp32 (native precision)" in page


def test_weights_have_7_bits_on_processors_whose_products_saturate():
    for flags in (("avx2",), (), None):
        target = OpenVino().on("x86_64", flags)
        assert target.scheme.reduce_range
        assert "7 bits" in target.deployment_plan.instead[0]
    assert OpenVino(vnni=True).scheme == OpenVino().on("x86_64", ("avx_vnni",)).scheme == QUANT_SCHEMES["openvino"]
    assert OpenVino(vnni=False).on("aarch64", None).scheme != QUANT_SCHEMES["openvino"]  # what the user says stands
    assert OpenVino().on("aarch64", None).scheme == QUANT_SCHEMES["openvino"]
