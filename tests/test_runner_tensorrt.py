"""The runner with TensorRT: stand-ins for three interfaces, commands for every trtexec, words for every failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.stages.bench.runner import runner_path
from edgekd_runner import trtexec
from edgekd_runner.child_process import explain_failure
from tests.standins import bundles
from tests.standins.bundles import CLASSES, SHAPE, engine, make_bundle, read_result, run, write_manifest

STANDINS = Path(bundles.__file__).parent
DEVICE = STANDINS / "device"
BINDINGS, BOTH, TENSORS, TYPED = "8.2.1", "8.6.1", "10.3.0", "11.4.0"
VERSIONS = (BINDINGS, BOTH, TENSORS, TYPED)


def machine(version: str, **more: str) -> dict[str, Any]:
    """Options of a process that finds this TensorRT, and no other program of NVIDIA."""
    return {"env": os.environ | {"PYTHONPATH": str(DEVICE), "STANDIN_TENSORRT": version, "LD_LIBRARY_PATH": ""} | more}


def student(*precisions: str, file: str = "student.onnx", **changes: Any) -> dict[str, Any]:
    return engine(f"student {precisions[0]}", "student", file, precisions=list(precisions), **changes)


def plan(home: Path, name: str) -> dict[str, Any]:
    """What the stand-in wrote into an engine: how it was asked to build it."""
    fact = next(fact for fact in read_result(home, "build")["engines"] if fact["name"] == name)
    head: dict[str, Any] = json.loads((home / "results" / fact["engine"]).read_bytes().partition(b"\n")[0])
    return head


def quantized(path: Path) -> Path:
    """A product of an image and a matrix between Q/DQ pairs."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((int(np.prod(SHAPE)), CLASSES)).astype(np.float32)
    constants = {"w": weight, "s": np.float32(0.05), "z": np.int8(0)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *SHAPE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CLASSES])
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "quantized", [x], [y], stored)
    onnx.save(helper.make_model(graph, ir_version=7, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


def bundle(home: Path, *rows: dict[str, Any], **changes: Any) -> Path:
    """A bundle with `student.onnx` in FP32 and `pairs.onnx` in INT8."""
    (home / "models").mkdir(parents=True)
    quantized(home / "models" / "pairs.onnx")
    return make_bundle(home, "tensorrt", list(rows) or [student("fp32")], **changes)


# --- what the stand-ins are ---


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stand_in_has_nothing_that_the_real_one_lacks(version: str) -> None:
    """Names and parameters of 8.6.1, 10.3.0 and 11.4.0 were read from NVIDIA's wheels, by importing them.

    A stand-in may leave out parameters at the end, which have defaults: what is called without them works on both.
    """
    code = """if True:
        import inspect, json, tensorrt
        found = {}
        for owner, made in vars(tensorrt).items():
            if isinstance(made, type) and owner in tensorrt.API["8.6.1"]:
                members = {name: value for name, value in vars(made).items() if not name.startswith("_")}
                found[owner] = {
                    name: list(inspect.signature(value).parameters)[1:] if inspect.isfunction(value) else None
                    for name, value in members.items()
                }
        print(json.dumps(found))
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **machine(version))
    real = json.loads((STANDINS / "tensorrt_api.json").read_text())["8.6.1" if version == BINDINGS else version]
    made = json.loads(ran.stdout)
    assert len(made) > 15
    for owner, members in made.items():
        for name, parameters in members.items():
            assert name in real[owner], f"{owner}.{name}"
            if parameters is not None and real[owner][name] != "overloaded":
                assert parameters == real[owner][name][: len(parameters)], f"{owner}.{name}"
    lacks = {
        BINDINGS: [("ICudaEngine", "num_io_tensors"), ("IBuilderConfig", "set_memory_pool_limit")],
        BOTH: [],
        TENSORS: [("ICudaEngine", "num_bindings"), ("IBuilderConfig", "max_workspace_size")],
        TYPED: [
            ("BuilderFlag", "INT8"),
            ("IBuilderConfig", "int8_calibrator"),
            ("IExecutionContext", "execute_async_v2"),
        ],
    }
    assert not [(owner, name) for owner, name in lacks[version] if name in made[owner]]


# --- whole runs ---


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_are_built_verified_and_timed_in_every_interface(tmp_path: Path, version: str) -> None:
    typed = version == TYPED
    rows = [student("fp32", typed=typed), student("int8", "fp16", typed=typed, file="pairs.onnx")]
    home = bundle(tmp_path / "bundle", *rows)
    for command in ("build", "verify", "bench"):
        code, lines = run(command, home, **machine(version))
        assert code == 0 and not any("warning" in line for line in lines), lines
    asked, built = plan(home, "student int8"), read_result(home, "build")["engines"][1]
    assert asked["flags"] == (["TF32"] if typed else ["FP16", "INT8", "TF32"])
    assert asked["network"] == (["EXPLICIT_BATCH"] if version.startswith("8") else [])
    assert 0 < asked["workspace"] <= 4 << 30 and built["workspace_mib"] == asked["workspace"] >> 20
    assert (
        built["runtime"]["version"] == version
        and built["device"]["sm"] == "8.7"
        and built["compute_precision"] == "int8+fp16"
    )
    assert built["runtime"]["interface"] == ("Bindings" if version == BINDINGS else "Tensors")
    graph = "this CUDA has no cudaGraphInstantiateWithFlags" if version == BINDINGS else "captured"
    assert built["cuda_graph"] == graph
    assert (home / "results" / built["layers"]).read_text().startswith("{")
    verified = read_result(home, "verify")["engines"]
    assert [fact["passes"] for fact in verified] == [True, True] and verified[1]["max_difference"] < 1e-4
    bench = read_result(home, "bench")
    manifest = json.loads((home / "manifest.json").read_text())
    assert bench["models"][1]["sha256"] == manifest["files"]["models/pairs.onnx"]["sha256"]
    assert all(len(model["compute_ms"]) == 200 and min(model["compute_ms"]) > 0 for model in bench["models"])
    assert bench["recommended"]["name"] in ("student fp32", "student int8")
    assert "no trtexec" in bench["trtexec"]["reason"]


def test_a_strongly_typed_network_gets_no_precision_flags(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle", student("fp16", typed=True))
    assert run("build", home, **machine(TENSORS))[0] == 0
    assert plan(home, "student fp16")["network"] == ["STRONGLY_TYPED"] and plan(home, "student fp16")["flags"] == [
        "TF32"
    ]


def test_an_engine_is_built_once_and_again_where_something_changed(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle")

    def built(version: str) -> dict[str, Any]:
        assert run("build", home, **machine(version))[0] == 0
        fact: dict[str, Any] = read_result(home, "build")["engines"][0]
        return fact

    first, second = built(TENSORS), built(TENSORS)
    assert not first["cached"] and second["cached"] and first["engine"] == second["engine"]
    path = home / "results" / first["engine"]
    path.write_bytes(path.read_bytes()[:-1])
    third = built(TENSORS)
    assert not third["cached"] and third["engine_sha256"] == first["engine_sha256"], "a spoiled engine"
    other = built(BOTH)
    assert not other["cached"] and other["engine"] != first["engine"], "another TensorRT"
    assert (home / "results" / "engines" / f"timings-{TENSORS}.cache").read_bytes() == b"timed;timed;"


def test_a_network_that_leaves_its_batch_open_is_built_for_one_image(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle")
    bundles.network(home / "models" / "student.onnx", 8, seed=2, batch="N")
    write_manifest(home, json.loads((home / "manifest.json").read_text()))
    for version in (BINDINGS, TENSORS):
        for command in ("build", "verify"):
            code, lines = run(command, home, **machine(version))
            assert code == 0, lines
        assert read_result(home, "verify")["engines"][0]["passes"]


CACHE = "TRT-8601-EntropyCalibration2\nx: 3c010a14\n"


def with_cache(home: Path, text: str = CACHE, **changes: Any) -> Path:
    (home / "models").mkdir(parents=True)
    (home / "models" / "student.cache").write_text(text)
    return bundle_again(home, student("int8", "fp16", cache="models/student.cache", **changes))


def bundle_again(home: Path, row: dict[str, Any]) -> Path:
    return make_bundle(home, "tensorrt", [row])


def test_implicit_int8_on_a_dla_takes_its_scales_from_the_cache(tmp_path: Path) -> None:
    home = with_cache(tmp_path / "bundle", dla=1)
    code, lines = run("build", home, **machine(BOTH, STANDIN_DLA="2"))
    assert code == 0, lines
    asked, fact = plan(home, "student int8"), read_result(home, "build")["engines"][0]
    assert asked["flags"] == ["FP16", "GPU_FALLBACK", "INT8", "TF32"] and asked["dla"] == 1 and asked["scales"] == CACHE
    assert fact["on_dla"] == {"layers": 3, "of": 4} and fact["cuda_graph"] == "not valid on a DLA"
    assert run("verify", home, **machine(BOTH, STANDIN_DLA="2"))[0] == 0


@pytest.mark.parametrize(
    ("version", "row", "more", "words"),
    [
        (TENSORS, student("int8", "fp16"), {"STANDIN_SM": "5.3"}, "INT8 is not available on SM 5.3"),
        (BOTH, student("fp16", typed=True), {}, "TensorRT 8.6.1 knows no strongly typed networks"),
        (TYPED, student("int8", "fp16"), {}, "TensorRT 11.4.0 takes precisions from the file only"),
        (TENSORS, student("fp16", dla=0), {}, "the DLA is not there, or cannot run the network"),
        (TENSORS, student("fp32"), {"STANDIN_FAIL": "SIGSEGV"}, "it ended with SIGSEGV"),
        (TENSORS, student("fp32"), {"STANDIN_FAIL": "SIGKILL"}, "memory ran out"),
        (TENSORS, student("fp32"), {"STANDIN_FAIL": "oom"}, "memory ran out (TensorRT built nothing: Tactic Device"),
        (TENSORS, student("fp32"), {"STANDIN_FAIL": "driver"}, "the NVIDIA driver is older than this CUDA, or missing"),
        (TENSORS, student("fp32"), {"STANDIN_MEMORY": "8"}, "cudaMalloc: CUDA error 2, out of memory"),
    ],
)
def test_what_cannot_be_built_is_told_with_its_remedy(
    tmp_path: Path, version: str, row: dict[str, Any], more: dict[str, str], words: str
) -> None:
    home = bundle(tmp_path / "bundle", row)
    code, lines = run("build", home, **machine(version, **more))
    assert code == 1 and words in lines[-1]["error"] and lines[-1]["hint"], lines
    assert words in read_result(home, "build")["engines"][0]["error"]


def test_a_cache_of_another_tensorrt_is_refused(tmp_path: Path) -> None:
    home = with_cache(tmp_path / "bundle", CACHE.replace("8601", "8502"))
    code, lines = run("build", home, **machine(BOTH))
    assert code == 1 and "the calibration cache is for TRT-8502, this is TRT-8601" in lines[-1]["error"]


def test_a_build_that_ran_out_of_memory_is_tried_with_less(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle")
    code, lines = run("build", home, **machine(TENSORS, STANDIN_FAIL="oom once"))
    fact = read_result(home, "build")["engines"][0]
    assert code == 0 and any("trying again with less memory" in line.get("hint", "") for line in lines)
    assert fact["frugal"] and fact["workspace_mib"] == 256 and fact["recipe"]["level"] == 1


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle")
    path = home / "models" / "student.onnx"
    model = onnx.load(path)
    model.graph.node[2].op_type = "Shrink"
    onnx.save(model, path)
    write_manifest(home, json.loads((home / "manifest.json").read_text()))
    code, lines = run("build", home, **machine(TENSORS))
    assert code == 1 and "No importer registered for op: Shrink" in lines[-1]["error"]
    assert "node 2" in lines[-1]["error"] and "--jetpack" in lines[-1]["hint"]


def test_a_graph_that_cannot_be_captured_is_done_without(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle")
    for command in ("build", "verify"):
        assert run(command, home, **machine(TENSORS, STANDIN_FAIL="capture"))[0] == 0
    assert read_result(home, "build")["engines"][0]["cuda_graph"] == "TensorRT's kernels cannot be captured"
    assert read_result(home, "verify")["engines"][0]["passes"]


def test_an_engine_that_answers_otherwise_than_the_host_is_not_recommended(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle")
    for command in ("build", "verify", "bench"):
        assert run(command, home, **machine(TENSORS, STANDIN_FAIL="answers"))[0] == 0
    assert not read_result(home, "verify")["engines"][0]["passes"]
    assert read_result(home, "bench")["recommended"] == {
        "name": None,
        "reason": "no student answers as on the host",
    }


def test_doctor_asks_for_tensorrt_where_it_is_missing(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle", board="orin-nano", tensorrt="10.3.0", jetpack="6.2")
    code, lines = run("doctor", home)
    assert code == 1 and "tensorrt: No module named 'tensorrt'" in lines[-1]["error"]
    assert "python3-libnvinfer" in lines[-1]["hint"]
    code, lines = run("doctor", home, **machine(TENSORS))
    doctor = read_result(home, "doctor")
    assert code == 0 and doctor["versions"]["tensorrt"] == TENSORS and doctor["device"]["cuda"] == "12.6"
    assert [line["warning"] for line in lines][0] == "the bundle is for the board orin-nano, this is no Jetson"


# --- the failure table ---


@pytest.mark.parametrize(
    ("words", "meaning", "remedy"),
    [
        ("Tactic Device request: 2113MB Available: 1536MB. Device memory is insufficient memory to use tactic.",
         "memory ran out", "swap"),
        ("Requested amount of GPU memory (1073741824 bytes) could not be allocated.", "memory ran out", "init 3"),
        ("Target GPU SM 87 is not supported by this TensorRT release.", "PyPI are for servers", "uninstall"),
        ("In node 3: No importer registered for op: Foo", "does not know", "--jetpack"),
        ("Network has dynamic or shape inputs, but no optimization profile has been defined.", "open", "one size"),
        ("The engine plan file is generated on an incompatible device, expecting", "on another device", "build"),
        ("plan file is not compatible with this version of TensorRT, expecting library version", "another", "build"),
        ("only activation types allowed as input to this layer", "Q/DQ pairs", "edgekd lint"),
        ("Assertion failed: shiftIsAllZeros && \"zero point must be zero\"", "Q/DQ pairs", "scheme"),
        ("Non-zero zero point is not supported", "Q/DQ pairs", "scheme"),
        ("Could not find any implementation for node conv1 + relu", "no kernel for a node", "edgekd lint"),
        ("Cuda failure: 222", "driver is older", "L4T"),
        ("CUDA driver version is insufficient for CUDA runtime version", "driver is older", "driver"),
        ("libcuda.so.1: cannot open shared object file: No such file", "a library of NVIDIA is missing", "jetpack"),
    ],
)  # fmt: skip
def test_what_tensorrt_says_when_it_fails_has_a_meaning_and_a_remedy(words: str, meaning: str, remedy: str) -> None:
    for problem in (
        explain_failure({}, f"before\n{words}\n", -6),
        explain_failure({"error": words, "hint": "?"}, "", 1),
    ):
        assert meaning in problem.error and words in problem.error and remedy in problem.hint and problem.code == 1


def test_words_that_nobody_knows_are_passed_on() -> None:
    problem = explain_failure({"error": "the moon is full", "hint": "wait"}, "", 1)
    assert (problem.error, problem.hint) == ("the moon is full", "wait")
    wrong = explain_failure({"error": "out of memory is a model's name", "hint": "h"}, "", 2)
    assert (wrong.error, wrong.code) == ("out of memory is a model's name", 2)


# --- trtexec ---

OPTIONS = """=== Inference Options ===
  --iterations=N              Run at least N inference iterations (default = 10)
  --warmUp=N                  Run for N milliseconds to warmup before measuring performance
  --duration=N                Run performance measurements for at least N seconds wallclock time (see --iterations)
{inference}
=== Reporting Options ===
  --avgRuns=N                 Report performance measurements averaged over N consecutive iterations
  {percentile}
  --dumpProfile               Print profile information per layer (default = disabled)
  --exportTimes=<file>        Write the timing results in a json file (default = disabled)
  --exportProfile=<file>      Write the profile information per layer in a json file (default = disabled)
  --exportLayerInfo=<file>    Write the layer information of the engine in a json file (default = disabled)
=== Build Options ===
  --loadEngine=<file>         Load a serialized engine
  --useDLACore=N              Select DLA core N for layers that support DLA (default = none)
{build}
"""
ONE, SEVERAL = (
    "--percentile=P              Report performance for the P percentage",
    "--percentile=P1,P2,P3,...   Report",
)
OLD = ["--streams=N", "--noDataTransfers", "--useSpinWait", "--useCudaGraph", "--separateProfileRun"]
NEW = ["--infStreams=N", "--noDataTransfers", "--useSpinWait", "--useCudaGraph", "--separateProfileRun"]
ELEVEN = ["--infStreams=N", "--includeDataTransfers", "--noSpinWait", "--noCudaGraph"]


def helped(version: str) -> str:
    """The part of `trtexec --help` that matters, as versions list it."""
    flags = {"8.2": OLD, "8.5": OLD, "8.6": NEW, "10.3": NEW, "11.4": ELEVEN}[version]
    lines = [f"  {flag}                Words (default = as --exportOutput says)" for flag in flags]
    percentile = ONE if version == "8.2" else SEVERAL
    build = "  --profilingVerbosity=mode   Words" if version != "8.2" else "  --nvtxMode=mode             Words"
    return OPTIONS.format(inference="\n".join(lines), percentile=percentile, build=build)


TIMES = "--warmUp=2000 --duration=15 --iterations=1000 --avgRuns=100"
RANKS = "--percentile=50,90,95,99"
LAYERS = "--dumpProfile --separateProfileRun --exportProfile=t/profile.json"
GOLDEN = {
    ("8.2", "inference_only"): f"--noDataTransfers --useSpinWait --useCudaGraph --streams=1 {TIMES} --percentile=99",
    ("8.2", "end_to_end"): f"--useSpinWait --useCudaGraph --streams=1 {TIMES} --percentile=99",
    ("8.2", "layers"): f"--useSpinWait --useCudaGraph --streams=1 {LAYERS}",
    ("8.5", "inference_only"): f"--noDataTransfers --useSpinWait --useCudaGraph --streams=1 {TIMES} {RANKS}",
    ("8.6", "end_to_end"): f"--useSpinWait --useCudaGraph --infStreams=1 {TIMES} {RANKS}",
    ("10.3", "inference_only"): f"--noDataTransfers --useSpinWait --useCudaGraph --infStreams=1 {TIMES} {RANKS}",
    ("10.3", "layers"): f"--useSpinWait --useCudaGraph --infStreams=1 {LAYERS} --profilingVerbosity=detailed",
    ("11.4", "inference_only"): f"--infStreams=1 {TIMES} {RANKS}",
    ("11.4", "end_to_end"): f"--includeDataTransfers --infStreams=1 {TIMES} {RANKS}",
    ("11.4", "layers"): "--infStreams=1 --dumpProfile --exportProfile=t/profile.json --profilingVerbosity=detailed",
}


@pytest.mark.parametrize(("version", "scope"), GOLDEN)
def test_commands_of_trtexec_are_made_of_flags_that_it_lists(version: str, scope: str) -> None:
    command = trtexec.compose_command("trtexec", helped(version), "e.engine", scope, "t")
    export = "--exportLayerInfo=t/layers.json" if scope == "layers" else "--exportTimes=t/times.json"
    assert " ".join(command) == f"trtexec --loadEngine=e.engine {GOLDEN[version, scope]} {export}"


def test_a_dla_runs_without_a_graph() -> None:
    command = trtexec.compose_command("trtexec", helped("10.3"), "e", "inference_only", "t", dla=1)
    assert "--useDLACore=1" in command and "--useCudaGraph" not in command
    assert "--noCudaGraph" in trtexec.compose_command("trtexec", helped("11.4"), "e", "inference_only", "t", dla=0)


def test_a_flag_that_the_help_only_talks_about_is_not_one() -> None:
    assert "--exportOutput" not in trtexec.list_flags(helped("10.3"))


def row(start_ms: float, compute_ms: float) -> dict[str, float]:
    return {
        "startComputeMs": start_ms,
        "computeMs": compute_ms,
        "latencyMs": compute_ms + 0.5,
        "h2dMs": 0.3,
        "d2hMs": 0.2,
    }


def test_the_warm_up_in_the_times_of_an_old_trtexec_does_not_count() -> None:
    old = [row(10, 9.0), row(1999, 9.0)] + [row(2000 + i, 1.0 + i) for i in range(10)]
    times = trtexec.read_times(old, 2000)
    assert times["computeMs"] == {"p50": 5, "p90": 9, "p95": 10, "p99": 10, "n": 10, "min": 1, "mean": 5.5}
    assert times["latencyMs"]["p50"] == 5.5 and times == trtexec.read_times(old[2:], 2000)
    assert trtexec.read_times([], 2000) == {}


OLD_SUMMARY = """&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec --loadEngine=e
[05/01-10:00] [I] === Performance summary ===
[05/01-10:00] [I] Throughput: 1063.11 qps
[05/01-10:00] [I] Latency: min = 0.92 ms, max = 1.9 ms, mean = 0.93 ms, median = 0.925 ms, percentile(99%) = 1 ms
[05/01-10:00] [I] End-to-End Host Latency: min = 1 ms, max = 2 ms, mean = 1 ms, median = 1 ms
[05/01-10:00] [I] Enqueue Time: min = 0.8 ms, max = 1 ms, mean = 0.9 ms, median = 0.9 ms, percentile(99%) = 1 ms
[05/01-10:00] [I] GPU Compute Time: min = 0.9 ms, max = 1.5 ms, median = 0.9 ms, percentile(99%) = 1e-1 ms
[05/01-10:00] [I] Total Host Walltime: 3.00186 s
[05/01-10:00] [W] * Throughput may be bound by Enqueue Time rather than GPU Compute
"""
NEW_SUMMARY = """&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26] # trtexec --loadEngine=e
[I] Throughput: 2240 qps
[I] Latency: min = 0.4 ms, max = 1 ms, median = 0.45 ms, percentile(50%) = 0.45 ms, percentile(99.5%) = 0.9 ms
[W] * GPU compute time is unstable, with coefficient of variance = 5.58526%.
"""


def test_summaries_of_old_and_new_trtexecs_are_read() -> None:
    old, new = trtexec.read_summary(OLD_SUMMARY), trtexec.read_summary(NEW_SUMMARY)
    assert old["version"] == "8201" and old["enqueue_bound"] and not old["unstable"]
    assert old["ms"]["Throughput"] == {"qps": 1063.11} and old["ms"]["GPU Compute Time"]["percentile(99%)"] == 0.1
    assert old["ms"]["Latency"]["median"] == 0.925 and "End-to-End Host Latency" in old["ms"]
    assert new["version"] == "100300" and new["unstable"] and new["ms"]["Latency"]["percentile(99.5%)"] == 0.9


def test_layers_are_read_from_every_dialect() -> None:
    old = [{"count": 100}, {"name": "conv", "timeMs": 5, "averageMs": 0.05, "percentage": 80}]
    new = [{"count": 100}, {"name": "conv", "timeMs": 5, "averageMs": 0.05, "medianMs": 0.04, "percentage": 80}]
    assert (
        trtexec.read_profile(old) == trtexec.read_profile(new) == [{"name": "conv", "average_ms": 0.05, "percent": 80}]
    )
    plain = {"Layers": ["conv", "relu"], "Bindings": ["x"]}
    outputs = [
        {"Name": "y", "Dimensions": [1, 8], "Format/Datatype": "Thirty-two wide channel vectorized row major Int8"}
    ]
    detailed = {"Layers": [{"Name": "conv", "Outputs": outputs}], "I/O Tensors": ["x"]}
    assert trtexec.read_layers(plain) == [{"name": "conv", "precision": ""}, {"name": "relu", "precision": ""}]
    assert trtexec.read_layers(detailed) == [{"name": "conv", "precision": "Int8"}]


TRTEXEC = """#!{python}
import json, sys
if "--help" in sys.argv:
    print({text!r}); sys.exit()
files = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
if {fails!r} in sys.argv:
    print("[E] Could not find any implementation for node conv"); sys.exit(1)
print({summary!r})
row = {{"startComputeMs": 2500.0, "computeMs": 0.4, "latencyMs": 0.6, "h2dMs": 0.1, "d2hMs": 0.1}}
layers = {{"Layers": ["conv"]}}
for name, value in (("Times", [row]), ("Profile", [{{"count": 1}}]), ("LayerInfo", layers)):
    if "--export" + name in files:
        json.dump(value, open(files["--export" + name], "w"))
"""


def test_trtexec_is_asked_for_a_second_opinion(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    text = {"text": helped("10.3"), "summary": NEW_SUMMARY, "fails": "--dumpProfile", "python": sys.executable}
    program.write_text(TRTEXEC.format(**text))
    program.chmod(0o755)
    home = bundle(tmp_path / "bundle")
    options = machine(TENSORS, PATH=f"{program.parent}:{os.environ['PATH']}")
    for command in ("build", "bench"):
        assert run(command, home, **options)[0] == 0
    told = read_result(home, "bench")["trtexec"]
    said = told["engines"]["student fp32"]
    assert told["path"] == str(program) and set(said) == {"inference_only", "end_to_end", "layers"}
    assert (
        said["inference_only"]["times_ms"]["computeMs"]["p50"] == 0.4 and said["inference_only"]["version"] == "100300"
    )
    assert (
        "--noDataTransfers" in said["inference_only"]["command"]
        and "--noDataTransfers" not in said["end_to_end"]["command"]
    )
    assert "no kernel for a node" in said["layers"]["reason"]


def test_a_job_times_an_engine_from_and_to_the_memory_of_the_device(tmp_path: Path) -> None:
    home = bundle(tmp_path / "bundle", student("fp32"))
    run("build", home, **machine(TENSORS))
    engine_file = home / "results" / read_result(home, "build")["engines"][0]["engine"]
    job = {
        "runtime": "tensorrt",
        "threads": 1,
        "scope": "inference_only",
        "models": [{"name": name, "path": str(engine_file)} for name in ("it", "it again")],
        "inputs": str(home / "inputs.npy"),
        "protocol": {"rounds": 3, "calls_per_round": 4, "warmup_s": 0.0, "warmup_calls": 1, "seed": 0},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    words = [sys.executable, str(runner_path()), "bench", "--job", str(tmp_path / "job.json"), "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **machine(TENSORS))
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(tmp_path / "samples.npz") as samples:
        assert len(samples["ns"]) == 24 and samples["ns"].min() > 0
