"""The protocol: scenarios apart, several sessions, rates, throughput, cold starts, memory, and how they are judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.core import serialization
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Measurement, Samples
from edgekd.core.dataset import Normalization
from edgekd.core.gate import Gate
from edgekd.errors import ConfigError
from edgekd.metrics.latency import PLUGINS, nearest_rank, over_latency, upper_bound
from edgekd.stages.bench import cold_start, gates, load, statistics
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark, save_noise
from edgekd.stages.bench.compare_files import FileComparison, compare_all, table
from edgekd.stages.bench.config import BenchConfig, Scenario, scenarios
from edgekd.stages.bench.runner import runner_path
from edgekd.targets.cpu import Cpu
from edgekd.targets.openvino import OpenVino
from edgekd_runner import timing
from edgekd_runner.bench import call_on_pictures
from tests.standins.bundles import network

SHAPE = (3, 8, 8)
QUICK = BenchConfig(rounds=3, calls_per_round=5, warmup_s=0.02, metrics=("p50_ms",))
PROTOCOL = {"rounds": 3, "calls_per_round": 5, "warmup_s": 0.02, "warmup_calls": 20, "seed": 0, "spinning": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one.onnx` with a batch of 1 and `any.onnx` with any, of the same weights."""
    folder = tmp_path_factory.mktemp("models")
    network(folder / "one.onnx", 16, 0, 1, SHAPE, classes=10)
    network(folder / "any.onnx", 16, 0, "N", SHAPE, classes=10)
    np.save(folder / "inputs.npy", np.random.default_rng(0).random((20, *SHAPE), np.float32))
    return folder


def entry(name: str, path: Path) -> BenchmarkEntry:
    return BenchmarkEntry(name, "student", "kd", "fp32", File.of(path), macs=1, parameters=1)


def measure(out: Path, path: Path, called: Scenario, config: BenchConfig = QUICK, **more: Any) -> BenchResult:
    return benchmark(
        out,
        BenchmarkRequest(
            (entry("it", path),), "cpu", Cpu(), save_noise(path.parent, SHAPE, 0), None, "", config, called, **more
        ),
    )


def asked(home: Path, command: str, out: Path, **changes: Any) -> tuple[int, dict[str, Any]]:
    """Exit code of the runner, and its result, or its last words."""
    models = [{"name": name, "path": str(home / name)} for name in changes.pop("files", ("any.onnx",))]
    job = {"runtime": "onnxruntime", "threads": 1, "models": models, "inputs": str(home / "inputs.npy")}
    out.mkdir(exist_ok=True)
    (out / "job.json").write_text(json.dumps(job | {"protocol": PROTOCOL | changes.pop("protocol", {})} | changes))
    words = [sys.executable, str(runner_path()), command, "--job", str(out / "job.json"), "--out", str(out)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        return ran.returncode, json.loads(ran.stdout.splitlines()[-1])
    return 0, json.loads((out / "result.json").read_text())


# --- scenarios ---


def test_a_configuration_asks_for_one_table_of_each_kind_of_call_the_main_one_first() -> None:
    config = replace(
        QUICK, batches=(1, 8), scopes=("end_to_end", "inference_only", "cold_start"), rate=200.0, throughput=True
    )
    found = scenarios(config)
    assert [called.title for called in found] == [
        "",
        "batch 8",
        "inference only",
        "inference only, batch 8",
        "cold start",
        "200 calls a second",
        "throughput",
        "throughput, batch 8",
    ]
    assert [called.main for called in found] == [True] + 7 * [False]
    assert found[3].slug == "inference-only-batch-8" and len({called.slug for called in found}) == len(found)
    assert scenarios(QUICK) == (Scenario(),)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": ()},
        {"batches": (0,)},
        {"batches": (8, 8)},
        {"scopes": ()},
        {"scopes": ("cold_start",)},
        {"scopes": ("inference_only", "inference_only")},
        {"rate": 0.0},
        {"rate": math.nan},
        {"processes": 0},
    ],
)
def test_refuses_scenarios_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        BenchConfig(**wrong)
    assert caught.value.hint


def test_a_fixed_batch_is_refused_for_another_in_words(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`it` has a fixed batch of 1") as caught:
        measure(tmp_path, home / "one.onnx", Scenario(batch=8))
    assert "calls are timed with 8 images" in caught.value.hint and "dynamic" in caught.value.hint


@pytest.mark.parametrize("target", [Cpu(), OpenVino()])
def test_the_latency_of_a_batch_is_of_the_whole_call_and_its_file_is_named(
    home: Path, tmp_path: Path, target: Cpu | OpenVino
) -> None:
    network(tmp_path / "wide.onnx", 2048, 0, "N", SHAPE, classes=10)
    who = (entry("it", tmp_path / "wide.onnx"),)
    inputs = save_noise(tmp_path, SHAPE, 0)
    found = {}
    for batch in (1, 64):
        called = Scenario(batch=batch, main=batch == 1)
        found[batch] = benchmark(
            tmp_path / str(batch), BenchmarkRequest(who, "x", target, inputs, None, "", QUICK, called)
        )
    one, many = (found[batch].measurements[0].metrics["p50_ms"] for batch in (1, 64))
    assert many > 2 * one
    assert (found[1].scenario, found[64].scenario, found[64].title) == ("", "batch 64", "x, batch 64")
    assert found[64].protocol["files"]["it"] == "wide.onnx" and "files" not in found[1].protocol
    assert "64 images per call" in found[64].protocol["scope"] and found[64].protocol["batch"] == 64


def test_every_scope_says_what_its_calls_hold_in_every_runtime() -> None:
    for runtime in ("onnxruntime", "openvino", "tensorrt"):
        words = {
            Scenario(scope=scope).describe_call(runtime)
            for scope in ("end_to_end", "inference_only", "with_preprocessing", "cold_start")
        }
        assert len(words) == 4
    assert "no copies" in Scenario().describe_call("onnxruntime")


def identity(path: Path, numbers: int) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, numbers]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_a_plain_call_of_onnxruntime_copies_nothing_as_its_scope_says(tmp_path: Path) -> None:
    """What it gives out does not own its memory: it is the runtime's own."""
    import onnxruntime

    session = onnxruntime.InferenceSession(identity(tmp_path / "a.onnx", 8), providers=["CPUExecutionProvider"])
    assert not session.run(None, {"x": np.ones((1, 8), np.float32)})[0].flags.owndata


def test_a_call_of_the_model_only_spares_openvino_the_copies(tmp_path: Path) -> None:
    """A network that does nothing on 8 MB: the plain call copies them in and out."""
    identity(tmp_path / "a.onnx", 2_000_000)
    np.save(tmp_path / "inputs.npy", np.ones((4, 2_000_000), np.float32))
    least = {}  # of two runs: neighbours may be busy in one of them
    for scope in ("end_to_end", "inference_only"):
        code, _ = asked(tmp_path, "bench", tmp_path / scope, files=["a.onnx"], runtime="openvino", scope=scope)
        assert code == 0
        with np.load(tmp_path / scope / "samples.npz") as samples:
            least[scope] = samples["ns"].min()
    assert least["inference_only"] < 0.7 * least["end_to_end"]


def test_preprocessing_gives_the_network_its_inputs_back_and_the_class_with_its_probability() -> None:
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.25], np.float32)
    pictures = np.random.default_rng(0).integers(256, size=(2, 4, 5, 3), dtype=np.uint8)
    x = ((pictures / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    seen = []

    class Session:
        def run(self, given: np.ndarray) -> list[np.ndarray]:
            seen.append(given)
            return [np.array([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]])]

    call = call_on_pictures(Session(), x, {"mean": mean.tolist(), "std": std.tolist()})
    classes, shares = call()
    np.testing.assert_allclose(seen[0], x, atol=1e-6)
    assert seen[0].flags.c_contiguous and seen[0].dtype == np.float32
    assert classes.tolist() == [2, 0]
    np.testing.assert_allclose(shares, [math.e**3 / (1 + math.e + math.e**3), math.e**2 / (math.e**2 + 2)])


def test_preprocessing_takes_longer_and_stands_in_a_table_of_its_own(home: Path, tmp_path: Path) -> None:
    scale = Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    plain_call = measure(tmp_path / "a", home / "one.onnx", Scenario())
    whole = measure(
        tmp_path / "b", home / "one.onnx", Scenario(scope="with_preprocessing", main=False), normalize=scale
    )
    assert whole.scenario == "with preprocessing" and "uint8" in whole.protocol["scope"]
    assert whole.measurements[0].metrics["p50_ms"] > plain_call.measurements[0].metrics["p50_ms"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"batch": 0}, "the batch of the job is `0`"),
        ({"scope": "all"}, "the scope of the job is `all`"),
        ({"protocol": {"rate": -1}}, "the rate of the protocol is `-1`"),
        ({"protocol": {"rate": 5, "throughput": True}}, "the protocol has a rate and asks for throughput"),
        (
            {"scope": "with_preprocessing", "normalize": {"mean": [0, 0]}},
            "inputs of 3x8x8 cannot be made from pictures",
        ),
    ],
)
def test_a_job_that_asks_for_nonsense_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    code, told = asked(home, "bench", tmp_path, **changes)
    assert code == 2 and told["error"].startswith(error) and told["hint"]


# --- several sessions ---


def test_rounds_are_shared_out_to_several_processes_and_every_call_has_its_process(home: Path, tmp_path: Path) -> None:
    config = replace(QUICK, rounds=7, processes=5)
    result = measure(tmp_path, home / "one.onnx", Scenario(), config)
    assert result.protocol["processes"] == 2, "each has three rounds at least"
    with np.load(tmp_path / "samples.npz") as samples:
        ns, rounds, process = samples["ns"], samples["round"], samples["process"]
    assert len(ns) == 7 * 2 * 5 and np.unique(rounds).tolist() == list(range(7))
    assert process[rounds < 4].tolist() == 40 * [0] and process[rounds >= 4].tolist() == 30 * [1]
    assert serialization.from_json(BenchResult, serialization.to_json(result), tmp_path) == result


def test_the_ratio_of_sessions_is_their_geometric_mean_with_students_interval() -> None:
    ratios = np.array([1.02, 1.04, 1.03, 1.05, 1.01])
    base, other = np.repeat(1000 * ratios, 3)[:, None], np.full((15, 1), 1000.0)
    found = statistics.ratio(base, other, seed=0, processes=5)
    logs = np.log(ratios)
    half = 2.776445 * logs.std(ddof=1) / math.sqrt(5)  # of 4 degrees of freedom, from a printed table
    assert found.estimate == pytest.approx(math.exp(logs.mean()))
    assert (found.low, found.high) == pytest.approx((found.estimate / math.exp(half), found.estimate * math.exp(half)))


def test_of_several_sessions_a_difference_counts_beyond_the_aa_ratio_of_one_beyond_its_interval() -> None:
    three, aa = Interval(1.018, 1.03, 1.042), Interval(0.985, 0.999, 1.013)
    assert statistics.verdict(three, aa, processes=5) == "1.03 times faster (1.02-1.04)"
    assert statistics.verdict(three, aa) == "no measurable difference"
    assert statistics.verdict(three, Interval(1.011, 1.02, 1.03), processes=5) == "too noisy to say: A/A moved 2 %"
    assert statistics.verdict(Interval(1.002, 1.004, 1.006), aa, processes=5) == "no measurable difference"


def test_an_interval_that_says_little_is_not_taken_for_no_difference() -> None:
    said = statistics.verdict(Interval(0.93, 1.0, 1.08), Interval(0.99, 1.0, 1.01), processes=5)
    assert said == "too noisy to say: between 0.93 and 1.08 times as fast"


def test_sessions_that_differ_by_where_memory_lies_give_few_false_alarms_and_find_three_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulated: each session of a file is off by 0.7 %, each call by 1 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 50)  # the spread of sessions decides
    random, told = np.random.default_rng(0), []
    for _ in range(60):
        ns = []
        for slower in (1.0, 1.0, 1.03, 1.0):
            off = np.repeat(random.normal(0, 0.007, size=5), 3)
            ns.append(slower * np.exp(off[:, None] + random.normal(0, 0.01, size=(15, 35))))
        aa = statistics.ratio(ns[0], ns[3], 0, 5)
        told.append([statistics.verdict(statistics.ratio(ns[0], own, 0, 5), aa, 5) for own in ns[1:3]])
    alarms = sum("times" in same and "noisy" not in same for same, _ in told)
    found = sum("slower" in other for _, other in told)
    assert alarms <= 3 and found >= 50


# --- MLPerf's early stopping ---


@pytest.mark.parametrize(("percent", "fewest"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)])
def test_early_stopping_speaks_from_as_many_calls_on_as_mlperf_publishes(percent: float, fewest: int) -> None:
    assert over_latency(fewest - 1, percent) == 0 and over_latency(fewest, percent) == 1


def test_early_stopping_gives_the_value_that_can_be_worked_out_by_hand() -> None:
    # 0.9^64 + 64 x 0.1 x 0.9^63 = 0.0096 <= 0.01: of 64 calls the largest; of 1050, one of 82 for 90 percent
    assert upper_bound(np.arange(64), 90) == 63
    assert upper_bound(np.arange(1050), 90) == 1050 - 82
    with pytest.raises(ValueError, match="63 values"):
        upper_bound(np.arange(63), 90)


def test_early_stopping_is_above_the_true_percentile_in_99_of_100_experiments() -> None:
    random = np.random.default_rng(0)
    seen = np.array([upper_bound(random.random(300), 90) for _ in range(2000)])
    assert 0.985 < (seen > 0.9).mean() < 1


def test_the_metrics_need_what_mlperf_needs_and_stand_beside_the_nearest_rank() -> None:
    ns = np.arange(1, 1051) * 1_000_000
    trial = Samples(ns, np.zeros(1050), (), (), np.zeros(0))
    assert PLUGINS["p90_upper_ms"].compute(trial) == 969.0 > nearest_rank(ns, 90) / 1e6
    with pytest.raises(ConfigError, match="`p99_upper_ms` needs 662 timed calls"):
        BenchConfig(rounds=3, calls_per_round=20, metrics=("p99_upper_ms",))


# --- calls at a rate ---


def test_calls_at_a_rate_are_timed_from_when_they_were_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 4 ms every 2 ms: the fifth waits for four times 2 ms."""
    clock = [0.0]
    monkeypatch.setattr(timing, "now_ns", lambda: int(clock.__setitem__(0, clock[0] + 100) or clock[0]))

    def call() -> None:
        clock[0] += 4_000_000

    rows = timing.time_at_rate([(lambda: None, call)], 0, 5, 500)
    ns, late = (np.array(column) / 1e6 for column in zip(*rows, strict=True))
    np.testing.assert_allclose(ns, [4, 6, 8, 10, 12], atol=0.1)
    np.testing.assert_allclose(late, [0, 2, 4, 6, 8], atol=0.1)


def test_a_rate_below_capacity_gives_latencies_and_the_share_of_late_calls(home: Path, tmp_path: Path) -> None:
    result = measure(tmp_path, home / "one.onnx", Scenario(rate=100.0, main=False))
    read = result.measurements[0].metrics
    assert read["p50_ms"] > 0 and 0 <= read["late_percent"] <= 100
    assert result.protocol["calls_per_round"] == 100 and result.protocol["calls_due_per_s"] == 100.0
    assert result.scenario == "100 calls a second" and result.aa_ratio


def test_a_rate_above_capacity_is_said_to_be_so_within_bounded_time(home: Path, tmp_path: Path) -> None:
    result = measure(tmp_path, home / "one.onnx", Scenario(rate=900_000.0, main=False))
    only = result.measurements[0]
    assert only.metrics == {} and only.verdict.startswith("cannot keep up: a call takes 0.0")
    assert only.verdict.endswith("one is due every 0.00111 ms") and result.aa_ratio is None and result.seconds < 60
    assert serialization.from_json(BenchResult, serialization.to_json(result), tmp_path) == result


def test_a_queue_that_grows_to_the_end_of_its_rounds_is_no_latency() -> None:
    steady, growing = np.zeros((4, 100)), np.tile(np.arange(100) * 1e6, (4, 1))  # 1 ms more with every call
    assert not load.queue_grew(steady, rate=100.0) and load.queue_grew(growing, rate=100.0)


# --- throughput ---


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_throughput_runs_as_many_calls_as_it_says_with_several_under_way(
    home: Path, tmp_path: Path, runtime: str
) -> None:
    code, result = asked(
        home, "bench", tmp_path, runtime=runtime, threads=2, protocol={"throughput": True, "calls_per_round": 2}
    )
    assert code == 0
    with np.load(tmp_path / "samples.npz") as samples:
        assert len(samples["ns"]) == 3, "one time for each round"
    model = result["models"][0]
    assert model["calls_per_round"] >= 2 * model["calls_in_flight"] >= 2
    if runtime == "onnxruntime":
        assert model["calls_in_flight"] == 2 and result["runtime"]["threads"] == 2


def test_throughput_counts_images_with_an_interval_over_blocks(home: Path, tmp_path: Path) -> None:
    called = Scenario(batch=4, throughput=True, main=False)
    result = measure(tmp_path, home / "any.onnx", called, replace(QUICK, rounds=4))
    only = result.measurements[0]
    images = only.intervals["images_per_s"]
    assert set(only.metrics) == {"images_per_s"} and images.low <= only.metrics["images_per_s"] <= images.high
    with np.load(result.samples.path) as samples:  # type: ignore[union-attr]
        ns = samples["ns"][samples["model"] == 0]
    calls = json.loads((tmp_path / "result.json").read_text())["models"][0]["calls_per_round"]
    assert images.estimate == pytest.approx(4 * calls / (nearest_rank(ns, 50) / 1e9))


# --- cold starts, memory, gates ---


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, home: Path) -> BenchResult:
    folder = tmp_path_factory.mktemp("starts")
    weights = numpy_helper.from_array(np.random.default_rng(0).random((5_000_000, 1), np.float32), "w")  # 20 MB
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 8, 8]), ("y", [1, 1])))
    nodes = [
        helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
    ]
    nodes += [helper.make_node("Mul", ["s", "m"], ["p"]), helper.make_node("Reshape", ["p", "shape"], ["y"])]
    shape = numpy_helper.from_array(np.array([1, 1], np.int64), "shape")
    graph = helper.make_graph(nodes, "large", [x], [y], [weights, shape])
    save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), folder / "large.onnx")
    who = (entry("small", home / "one.onnx"), entry("large", folder / "large.onnx"))
    called = Scenario(scope="cold_start", main=False)
    return benchmark(
        folder / "out", BenchmarkRequest(who, "cpu", Cpu(), save_noise(folder, SHAPE, 0), None, "", QUICK, called)
    )


def test_cold_starts_are_medians_of_fresh_processes_with_their_range(starts: BenchResult) -> None:
    for m in starts.measurements:
        assert set(m.metrics) == {"load_ms", "first_ms", "memory_mb"} and m.verdict == "" and m.speedup is None
        assert all(i.low <= m.metrics[name] <= i.high for name, i in m.intervals.items())
        assert m.metrics["load_ms"] > m.intervals["load_ms"].low > 0
    assert starts.scenario == "cold start" and starts.protocol["processes"] == 6 and starts.aa_ratio is None
    assert 1 - 2 * 0.5**6 > 0.95, "six values hold their median between them in 97 of 100 cases"
    assert "load_ms" in table(starts)


def test_memory_is_what_a_model_takes_above_the_runtime_alone(starts: BenchResult) -> None:
    small, large = (m.metrics["memory_mb"] for m in starts.measurements)
    assert 0 < small < 20 < large - small < 120, "its weights are 20 MB, the file is read whole"


def test_a_gate_can_look_at_memory_where_starts_are_measured(starts: BenchResult) -> None:
    limit = Gate("memory_mb", max=15.0)
    with pytest.raises(ConfigError, match="a gate looks at `memory_mb`, which is not measured") as caught:
        gates.check((limit,), ("p50_ms",), ("cpu",))
    assert "cold_start" in caught.value.hint
    gates.check((limit,), ("p50_ms",), ("cpu",), ("end_to_end", "cold_start"))
    rows = tuple(replace(m, metrics={"p50_ms": 1.0}, intervals={}) for m in starts.measurements)
    main = replace(starts, scenario="", measurements=rows)
    for name, outcome in (("small", "passed"), ("large", "failed")):
        whole = replace(cold_start.with_memory(main, starts), selected=name)
        assert [d.outcome for d in gates.decide((limit,), (whole, starts))] == [outcome], "main tables decide, once"


def test_gates_and_memory_leave_a_model_alone_that_was_not_started(starts: BenchResult) -> None:
    other = Measurement(replace(starts.measurements[0].model, name="other"), {}, None, "")
    assert cold_start.with_memory(replace(starts, measurements=(other,)), starts).measurements == (other,)


def test_a_start_that_fails_is_told_in_the_runners_words(home: Path, tmp_path: Path) -> None:
    (home / "broken.onnx").write_bytes(b"not a model")
    code, told = asked(home, "cold-start", tmp_path, files=["any.onnx", "broken.onnx"])
    assert code == 1 and "`broken.onnx`: onnxruntime" in told["error"]


# --- the command line ---


def test_the_command_line_measures_every_thread_count_and_scenario_apart(home: Path, tmp_path: Path) -> None:
    words = ["bench", str(home / "any.onnx"), "--smoke", "--json", "--threads", "1,2", "--batch", "1,2"]
    ran = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout.splitlines()[-1])
    assert [(one["runtime"]["threads"], one["scenario"]) for one in told] == [
        (1, ""),
        (1, "batch 2"),
        (2, ""),
        (2, "batch 2"),
    ]
    assert (tmp_path / "out" / "samples.npz").is_file() and (tmp_path / "out" / "2t-batch-2" / "samples.npz").is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--batch", "1,x"], "--batch is `1,x`"),
        (["--threads", "0"], "--threads is `0`"),
        (["--scope", "modle"], "there is no scope `modle`"),
        (["--scope", "cold_start"], "bench.scopes is"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(
    home: Path, tmp_path: Path, words: list[str], error: str
) -> None:
    ran = CliRunner().invoke(app, ["bench", str(home / "any.onnx"), "-o", str(tmp_path), *words])
    assert isinstance(ran.exception, ConfigError) and error in str(ran.exception) and ran.exception.hint


def test_more_threads_are_measured_in_processes_of_their_own(home: Path, tmp_path: Path) -> None:
    found = compare_all(tmp_path, FileComparison((home / "one.onnx",), "cpu", QUICK), (1, 2))
    assert [result.runtime.threads for result in found if result.runtime] == [1, 2]
    assert "overhead_of_the_loop_ns" in found[0].protocol and found[0].protocol["overhead_of_the_loop_ns"] < 10_000
