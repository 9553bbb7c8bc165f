"""The runner as a program of its own: a real child process on tiny ONNX files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.stages.bench.runner import runner_path
from edgekd.utils import cpu
from edgekd_runner.machine import CPU_FLAGS

PROTOCOL = {"rounds": 3, "calls_per_round": 4, "warmup_s": 0.02, "warmup_calls": 10, "seed": 0, "spinning": True}


def doubler(
    path: Path, shape: tuple[int | str, ...] = ("N", 2), dtype: int = TensorProto.FLOAT, factor: float = 2
) -> str:
    scale = numpy_helper.from_array(np.full((1,), factor, helper.tensor_dtype_to_np_dtype(dtype)), "k")
    x, y = (helper.make_tensor_value_info(name, dtype, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "doubler", [x], [y], [scale])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path.name


def job(home: Path, files: list[str], images: np.ndarray | None = None, **changes: Any) -> Path:
    np.save(home / "inputs.npy", np.arange(20, dtype=np.float32).reshape(10, 2) if images is None else images)
    named = [{"name": f"model {i}", "path": path} for i, path in enumerate(files)]
    asked = {"runtime": "onnxruntime", "threads": 1, "models": named, "inputs": "inputs.npy", "protocol": PROTOCOL}
    (home / "job.json").write_text(json.dumps({k: v for k, v in (asked | changes).items() if v is not None}))
    return home / "job.json"


def runner(command: str, path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the lines on stdout."""
    words = [sys.executable, str(runner_path()), command, "--job", str(path), "--out", str(path.parent / "out")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()]


def test_it_looks_for_the_same_processor_flags_as_the_package() -> None:
    assert tuple(CPU_FLAGS) == cpu.RELEVANT_FLAGS


def test_doctor_says_what_the_machine_is() -> None:
    ran = subprocess.run([sys.executable, str(runner_path()), "doctor"], capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert told["missing"] == [] and set(told["versions"]) >= {"numpy", "onnxruntime"}
    assert told["machine"]["cores"] >= 1 and told["machine"]["flags"] == list(cpu.flags())


def test_doctor_names_what_is_missing_and_the_remedy() -> None:
    words = [sys.executable, "-S", "-E", str(runner_path()), "doctor"]  # -S: without installed packages
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    told = json.loads(ran.stdout)
    assert ran.returncode == 1
    assert [lack["package"] for lack in told["missing"]] == ["numpy", "onnxruntime", "openvino"]
    assert all("-m pip install" in lack["hint"] for lack in told["missing"])


@pytest.mark.parametrize("batch", [1, 3, "N"])
def test_answers_are_the_models_own_in_order(tmp_path: Path, batch: int | str) -> None:
    path = job(
        tmp_path, [doubler(tmp_path / "a.onnx", (batch, 2)), doubler(tmp_path / "b.onnx", (batch, 2), factor=-1)]
    )
    code, lines = runner("predict", path)
    inputs = np.load(tmp_path / "inputs.npy")
    assert code == 0 and lines[-1] == {"progress": 20, "of": 20}
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "logits-0.npy"), 2 * inputs)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "logits-1.npy"), -inputs)


def test_a_bench_keeps_every_nanosecond_with_its_round_and_model(tmp_path: Path) -> None:
    path = job(tmp_path, [doubler(tmp_path / "a.onnx"), doubler(tmp_path / "b.onnx"), "a.onnx"])
    code, lines = runner("bench", path)
    assert code == 0
    assert [line["progress"] for line in lines if "note" not in line] == [1, 2, 3]
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        ns, rounds, model = samples["ns"], samples["round"], samples["model"]
    assert ns.dtype == np.int64 and (ns > 0).all() and len(ns) == 3 * 3 * 4
    assert (np.diff(rounds) >= 0).all(), "rounds follow each other"
    pairs, counts = np.unique(np.stack([rounds, model]), axis=1, return_counts=True)
    assert pairs.shape[1] == 9 and (counts == 4).all(), "in every round every model has one block"
    orders = [tuple(model[rounds == r][::4]) for r in range(3)]
    assert len(set(orders)) > 1, "the order changes from round to round"
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_result_says_what_ran_where_and_under_which_conditions(tmp_path: Path) -> None:
    runner("bench", job(tmp_path, [doubler(tmp_path / "a.onnx")], threads=2))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["runtime"] == {
        "name": "onnxruntime",
        "version": __import__("onnxruntime").__version__,
        "threads": 2,
        "providers": ["CPUExecutionProvider"],
        "graph_optimisation": "ORT_ENABLE_ALL",
        "spinning": True,
    }
    model = result["models"][0]
    assert model["bytes"] == (tmp_path / "a.onnx").stat().st_size and len(model["sha256"]) == 64
    assert model["compute_precision"] == "fp32"
    assert model["load_ms"] > 0 and model["first_ms"] > 0 and model["warmup"]["calls"] >= 10
    shares = {"others_percent", "steal_percent", "throttled"}
    both = {f"{what}_{when}" for what in ("load", "temperature_c", "clock_mhz") for when in ("before", "after")}
    assert set(result["conditions"]) == shares | both and 0 <= result["overhead_ns"] < 10_000
    assert {"processor", "flags", "cores", "affinity", "cpu_quota", "governor"} <= set(result["machine"])


def test_the_same_seed_gives_the_same_order(tmp_path: Path) -> None:
    path, orders = job(tmp_path, [doubler(tmp_path / "a.onnx"), doubler(tmp_path / "b.onnx")]), []
    for _ in range(2):
        runner("bench", path)
        with np.load(tmp_path / "out" / "samples.npz") as samples:
            orders.append(samples["model"].tolist())
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"runtime": "abacus"}, "this runner has no runtime `abacus`"),
        ({"threads": "many"}, "the job has no proper `threads`"),
        ({"models": []}, "the job names no model"),
        ({"models": [{"name": "a"}]}, "a model of the job has no proper `path`"),
        ({"models": [{"name": "a", "path": "gone.onnx"}]}, "`a` is not there"),
        (
            {"models": [{"name": "a", "path": "a.onnx", "compute_precision": "fp8"}]},
            "the compute_precision of `a` is `fp8`",
        ),
        ({"hint": "haste"}, "the hint of the job is `haste`"),
        ({"inputs": "gone.npy"}, "the inputs cannot be read"),
        ({"protocol": None}, "the job has no proper `protocol`"),
        ({"protocol": PROTOCOL | {"calls_per_round": None}}, "the protocol has no proper `calls_per_round`"),
        ({"protocol": PROTOCOL | {"rounds": 0}}, "the protocol times no call"),
    ],
)
def test_a_bad_job_ends_with_2_a_sentence_and_a_hint(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    code, lines = runner("bench", job(tmp_path, [doubler(tmp_path / "a.onnx")], **changes))
    assert code == 2
    assert lines[-1]["error"].startswith(error) and lines[-1]["hint"]
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_job_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    code, lines = runner("bench", tmp_path / "job.json")
    assert code == 2 and "cannot be read" in lines[-1]["error"]


@pytest.mark.parametrize(
    ("shape", "dtype", "inputs", "code", "error"),
    [
        ((1, 3), TensorProto.FLOAT, None, 2, "`model 0` takes inputs of 3, these are 2"),
        ((1, 2, 1), TensorProto.FLOAT, None, 2, "`model 0` takes inputs of 2x1, these are 2"),
        ((1, 2), TensorProto.DOUBLE, None, 2, "`model 0`: it takes x tensor(double)"),
        ((4, 2), TensorProto.FLOAT, None, 2, "`model 0` has a fixed batch of 4"),
        ((1, 2), TensorProto.FLOAT, np.zeros((4, 2)), 2, "the inputs are float64 of shape (4, 2)"),
    ],
)
def test_a_model_or_inputs_that_do_not_fit_are_told_in_a_sentence(
    tmp_path: Path, shape: tuple[int, ...], dtype: int, inputs: np.ndarray | None, code: int, error: str
) -> None:
    found, lines = runner("bench", job(tmp_path, [doubler(tmp_path / "a.onnx", shape, dtype)], inputs))
    assert (found, lines[-1]["error"]) == (code, error) and lines[-1]["hint"]


def test_a_file_that_the_runtime_cannot_load_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a model")
    code, lines = runner("predict", job(tmp_path, ["a.onnx"]))
    assert code == 1 and lines[-1]["error"].startswith("`model 0`: onnxruntime ")


def test_a_model_that_fails_while_it_runs_ends_with_1(tmp_path: Path) -> None:
    """It takes any batch by its signature, but was traced with one image."""
    shape = numpy_helper.from_array(np.array([1, 2], np.int64), "shape")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "stuck", [x], [y], [shape])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "a.onnx")
    code, lines = runner("predict", job(tmp_path, ["a.onnx"]))
    assert code == 1 and lines[-1]["error"].startswith("`model 0` does not run on (10, 2)")
