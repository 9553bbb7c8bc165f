"""The benchmark stage and its numbers: hand-worked statistics, and whole comparisons of tiny models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Samples
from edgekd.errors import ConfigError, DataError, EdgekdError, StaleArtifact
from edgekd.metrics import _compute as compute
from edgekd.metrics.latency import nearest_rank
from edgekd.stages.bench import entries, statistics
from edgekd.stages.bench import runner as stage
from edgekd.stages.bench.benchmark import BenchmarkRequest, benchmark, run_on_target, save_noise
from edgekd.stages.bench.config import BenchConfig
from edgekd.targets.cpu import Cpu
from edgekd.targets.openvino import OpenVino
from edgekd.tasks.classification import Classification
from tests.standins.bundles import network

SHAPE = (3, 8, 8)
QUICK = BenchConfig(rounds=4, calls_per_round=5, warmup_s=0.05, metrics=("top1", "agreement", "min_ms", "p50_ms"))


def classifier(path: Path, width: int, seed: int = 0, batch: int | str = 1) -> File:
    return File.of(network(path, width, seed, batch, SHAPE, classes=10))


def contestant(name: str, file: File, **changes: object) -> BenchmarkEntry:
    return replace(BenchmarkEntry(name, "student", "kd", "fp32", file, macs=1, parameters=1), **changes)  # type: ignore[arg-type]


def stored(path: Path, array: np.ndarray) -> File:
    np.save(path, array)
    return File.of(path)


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> tuple[File, File]:
    home = tmp_path_factory.mktemp("exam")
    random = np.random.default_rng(1)
    images = random.standard_normal((40, *SHAPE)).astype(np.float32)
    return stored(home / "inputs.npy", images), stored(home / "labels.npy", random.integers(10, size=40))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, exam: tuple[File, File]) -> tuple[BenchResult, Path]:
    """A slow student against a small teacher: the planted difference is about a hundredfold."""
    home = tmp_path_factory.mktemp("bench")
    small, large = classifier(home / "model.onnx", 16), classifier(home / "large.onnx", 4096, seed=2)
    contestants = (
        contestant("student fp32", large),
        contestant("teacher fp32", small, role="teacher", method=""),
        contestant("student int8", large, precision="int8"),
    )
    out = home / "out"
    return benchmark(out, BenchmarkRequest(contestants, "cpu", Cpu(), *exam, "student fp32", QUICK)), out


# --- percentiles and metrics ---


@pytest.mark.parametrize(("percent", "expected"), [(50, 5.0), (90, 9.0), (91, 10.0), (99, 10.0), (1, 1.0), (0, 1.0)])
def test_a_percentile_is_the_nearest_rank_and_never_interpolated(percent: float, expected: float) -> None:
    values = np.array([10, 3, 7, 1, 9, 2, 8, 4, 6, 5])
    assert nearest_rank(values, percent) == expected


def test_metrics_read_what_they_say() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    trial = Samples(
        ns=np.arange(1, 1001) * 1_000_000,
        round=np.zeros(1000),
        outputs=(logits,),
        reference=(logits[::-1],),
        labels=np.array([0, 1, 0, 0]),
    )
    expected = {"min_ms": 1, "p50_ms": 500, "p90_ms": 900, "p99_ms": 990, "mean_ms": 500.5, "top1": 75, "agreement": 0}
    assert compute.compute_metrics(trial, tuple(expected), Classification()) == expected


def test_every_metric_is_listed_under_its_own_name_and_says_what_it_needs() -> None:
    for name in plugins.names("metrics"):
        metric = plugins.load("metrics", name)
        assert plugins.summary("metrics", name).startswith(f"{name}: ")
        assert metric.unit and metric.better in ("higher", "lower") and metric.min_calls >= 0
        assert set(metric.inputs) <= set(Samples.__annotations__)


def test_a_metric_without_its_part_of_the_trial_is_left_out() -> None:
    trial = Samples(np.array([2_000_000]), np.zeros(1), (), (), np.zeros(0))
    assert compute.compute_metrics(trial, ("top1", "agreement", "min_ms"), Classification()) == {"min_ms": 2.0}


# --- settings ---


def test_refuses_a_percentile_from_too_few_calls() -> None:
    with pytest.raises(
        ConfigError, match=r"`p99_ms` needs 662 timed calls; bench.rounds x bench.calls_per_round is 80"
    ) as caught:
        BenchConfig(rounds=8, calls_per_round=10)
    assert "set bench.rounds to 67" in caught.value.hint
    assert BenchConfig(rounds=8, calls_per_round=10, metrics=("p90_ms",)).rounds == 8


@pytest.mark.parametrize(
    "wrong", [{"rounds": 2}, {"calls_per_round": 0}, {"warmup_s": -1.0}, {"seed": -1}, {"metrics": ("p98",)}]
)
def test_refuses_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        BenchConfig(**wrong)  # type: ignore[arg-type]
    assert caught.value.hint


def test_the_defaults_suffice_for_all_metrics_and_are_read_from_a_configuration() -> None:
    assert serialization.from_json(BenchConfig, serialization.to_json(BenchConfig())) == BenchConfig()
    assert set(BenchConfig().metrics) == set(plugins.names("metrics"))


# --- ratios and verdicts ---


def test_the_ratio_of_steady_samples_is_exact() -> None:
    base, other = np.full((5, 3), 800), np.full((5, 3), 200)
    assert statistics.ratio(base, other, seed=0) == Interval(4.0, 4.0, 4.0)


def test_what_moves_both_models_of_a_round_alike_does_not_widen_their_ratio() -> None:
    speed = np.linspace(1, 3, 20)[:, None] * np.ones((1, 10))  # the machine slows down threefold
    interval = statistics.ratio(1000 * speed, 500 * speed, seed=0)
    assert interval == Interval(2.0, 2.0, 2.0)


def test_a_machine_of_two_speeds_does_not_move_the_ratio() -> None:
    """As seen: a neighbour slows all models down by 14 % for parts of a second; a few rounds are torn by it."""
    random, found = np.random.default_rng(0), []
    for _ in range(20):
        slow = np.where(random.random(90) < 0.5, 1.14, 1.0)[:, None] * np.ones((1, 12))
        base, other = (slow * random.normal(ns, 0.003 * ns, size=(90, 12)) for ns in (1000, 1030))
        base[:9] *= 1.14  # the machine changed its speed within the round
        found.append(statistics.ratio(base, other, seed=0))
    assert all(abs(ratio.estimate - 1 / 1.03) < 0.003 and ratio.high < 0.98 for ratio in found)


def test_three_blocks_give_the_interval_that_can_be_worked_out_by_hand() -> None:
    # three blocks of one call; their ratios are 1, 2 and 3:
    # the median of picks is 1 when at least two of three picks are block 0: 7 cases of 27, so far more than 2.5 %
    base, other = np.array([[100], [200], [300]]), np.array([[100], [100], [100]])
    assert statistics.ratio(base, other, seed=0) == Interval(1.0, 2.0, 3.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    random = np.random.default_rng(0)
    base, other = random.lognormal(size=(10, 5)), random.lognormal(size=(10, 5))
    assert statistics.ratio(base, other, seed=3) == statistics.ratio(base, other, seed=3)
    assert statistics.ratio(base, other, seed=3) != statistics.ratio(base, other, seed=4)


STEADY, SHAKY, WIDE = Interval(0.998, 1.0, 1.002), Interval(1.03, 1.04, 1.05), Interval(0.9, 1.0, 1.1)


@pytest.mark.parametrize(
    ("speedup", "aa", "expected"),
    [
        (Interval(4.0, 4.1, 4.2), STEADY, "4.1 times faster (4.0-4.2)"),
        (Interval(4.0, 4.1, 4.2), SHAKY, "4.1 times faster (4.0-4.2)"),
        (Interval(1.03, 1.04, 1.05), STEADY, "1.04 times faster (1.03-1.05)"),
        (Interval(1.005, 1.013, 1.019), STEADY, "no measurable difference"),
        (Interval(0.5, 0.8, 0.9), STEADY, "1.25 times slower (1.11-2.00)"),
        (Interval(1.001, 1.005, 1.01), STEADY, "no measurable difference"),
        (Interval(0.99, 1.02, 1.05), STEADY, "no measurable difference"),
        (Interval(1.05, 1.07, 1.09), WIDE, "no measurable difference"),
        (Interval(1.01, 1.02, 1.03), SHAKY, "too noisy to say: A/A moved 4 %"),
        (Interval(0.96, 0.97, 0.98), SHAKY, "too noisy to say: A/A moved 4 %"),
    ],
)
def test_faster_is_said_only_of_what_excludes_1_and_exceeds_the_aa_band(
    speedup: Interval, aa: Interval, expected: str
) -> None:
    assert statistics.verdict(speedup, aa) == expected


def test_two_samples_of_one_distribution_show_no_measurable_difference() -> None:
    random = np.random.default_rng(0)
    base, again, other = (random.gamma(50, 1000, size=(30, 35)) for _ in range(3))
    verdict = statistics.verdict(statistics.ratio(base, other, 0), statistics.ratio(base, again, 0))
    assert verdict == "no measurable difference"


# --- doubts ---


def runner_result(**conditions: object) -> dict[str, object]:
    calm = {"others_percent": 1.0, "load_before": [9, 9, 9], "steal_percent": 0.0, "throttled": None}
    models = [{"name": "a", "warmup": {"steady": True}}]
    return {"conditions": calm | conditions, "machine": {"cores": 2}, "models": models}


def test_a_calm_run_raises_no_doubts() -> None:
    assert statistics.find_warnings(STEADY, {"a": np.full((6, 2), 100)}, runner_result()) == ()


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"others_percent": 40.0}, "contended: other processes used 40 % of the processor time"),
        ({"others_percent": None, "load_before": [2.0, 0, 0]}, "contended: the load was 1.0 per core at the start"),
        ({"steal_percent": 3.0}, "steal: the hypervisor took 3 % of the processor time"),
        ({"throttled": 2}, "throttled: the processor slowed itself 2 times"),
    ],
)
def test_a_disturbed_machine_is_told(conditions: dict[str, object], expected: str) -> None:
    assert statistics.find_warnings(STEADY, {}, runner_result(**conditions)) == (expected,)


def test_drift_an_aa_that_moved_and_an_unsteady_warm_up_are_told() -> None:
    ns = np.repeat([100, 100, 100, 100, 104, 104], 3).reshape(6, 3)
    result = runner_result() | {"models": [{"name": "a", "warmup": {"steady": False}}]}
    assert statistics.find_warnings(SHAKY, {"a": ns}, result) == (
        "A/A: two sessions of the same file differ by 4.0 % (1.030-1.050)",
        "drift: medians moved from the first to the last third of the rounds: a +4.0 %",
        "warm-up: a had not become steady when timing began",
    )


# --- whole comparisons, in the real runtime ---


def test_a_planted_slower_model_is_found_slower(compared: tuple[BenchResult, Path]) -> None:
    by_name = {m.model.name: m for m in compared[0].measurements}
    slow = by_name["student fp32"]
    assert slow.speedup and slow.speedup.high < 0.5
    assert "times slower" in slow.verdict
    assert by_name["teacher fp32"].speedup is None
    assert slow.metrics["p50_ms"] > 2 * by_name["teacher fp32"].metrics["p50_ms"]


def test_agreement_is_told_of_int8_files_only(compared: tuple[BenchResult, Path]) -> None:
    agreement = {m.model.name: m.metrics.get("agreement") for m in compared[0].measurements}
    assert agreement == {"student fp32": None, "teacher fp32": None, "student int8": 100.0}


def test_every_number_carries_its_machine_runtime_and_samples(compared: tuple[BenchResult, Path]) -> None:
    result, out = compared
    assert result.machine and result.machine.cores == os.cpu_count()
    assert result.runtime and (result.runtime.name, result.runtime.threads) == ("onnxruntime", 1)
    assert result.protocol["runtime"]["providers"] == ["CPUExecutionProvider"]
    assert set(result.protocol["cold_start_ms"]) == {
        "student fp32",
        "teacher fp32",
        "student int8",
        "teacher fp32 again",
    }
    assert result.aa_ratio and result.aa_ratio.low <= result.aa_ratio.estimate <= result.aa_ratio.high
    assert result.samples and result.samples.path == out / "samples.npz"
    with np.load(result.samples.path) as samples:
        assert samples["ns"].dtype == np.int64 and len(samples["ns"]) == 4 * 4 * 5


def test_a_result_reads_back_from_its_folder(compared: tuple[BenchResult, Path]) -> None:
    result, out = compared
    assert serialization.from_json(BenchResult, serialization.to_json(result), out) == result


def test_top1_comes_from_the_file_itself(exam: tuple[File, File], tmp_path: Path) -> None:
    """Labels that are the model's own answers give 100 percent."""
    file = classifier(tmp_path / "model.onnx", 16, batch="N")
    logits = np.load(run_on_target(tmp_path / "answers", file, Cpu(), exam[0]).path)
    labels = stored(tmp_path / "labels.npy", logits.argmax(1))
    contestants = (contestant("a", file), contestant("b", classifier(tmp_path / "other.onnx", 16, seed=5)))
    result = benchmark(tmp_path / "out", BenchmarkRequest(contestants, "cpu", Cpu(), exam[0], labels, "a", QUICK))
    assert result.measurements[0].metrics["top1"] == 100.0
    assert result.measurements[1].metrics["top1"] < 100.0
    assert result.measurements[0].speedup is None, "without a teacher the first is compared with"


def test_without_labels_only_latency_is_told(tmp_path: Path) -> None:
    contestants = (contestant("a", classifier(tmp_path / "a.onnx", 16)),)
    result = benchmark(
        tmp_path / "out", BenchmarkRequest(contestants, "cpu", Cpu(), save_noise(tmp_path, SHAPE, 0), None, "", QUICK)
    )
    assert set(result.measurements[0].metrics) == {"min_ms", "p50_ms"}
    assert not (tmp_path / "out" / "answers").exists()


def test_static_and_dynamic_batches_answer_alike(exam: tuple[File, File], tmp_path: Path) -> None:
    files = [classifier(tmp_path / f"{batch}.onnx", 16, batch=batch) for batch in (1, 7, "N")]
    one, seven, any_number = (np.load(run_on_target(tmp_path / f.path.stem, f, Cpu(), exam[0]).path) for f in files)
    assert one.shape == (40, 10)
    np.testing.assert_allclose(seven, one, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(any_number, one, rtol=1e-4, atol=1e-3)


def test_a_target_that_this_machine_cannot_serve_gives_the_reason_and_no_number(
    exam: tuple[File, File], tmp_path: Path
) -> None:
    class Absent(Cpu):
        def unavailable_reason(self) -> str:
            return "there is no board here"

    file = classifier(tmp_path / "a.onnx", 16)
    result = benchmark(
        tmp_path / "out", BenchmarkRequest((contestant("a", file),), "board", Absent(), *exam, "a", QUICK)
    )
    assert result.not_measured == "there is no board here"
    assert (result.machine, result.runtime, result.aa_ratio, result.samples, result.measurements) == (
        None,
        None,
        None,
        None,
        (),
    )
    assert serialization.from_json(BenchResult, serialization.to_json(result)) == result


def test_refuses_contestants_that_cannot_be_told_apart_or_compared(exam: tuple[File, File], tmp_path: Path) -> None:
    inputs, labels = exam
    one = contestant("a", classifier(tmp_path / "a.onnx", 16))
    few = stored(tmp_path / "few.npy", np.zeros(3, np.int64))
    with pytest.raises(ConfigError, match="share a name"):
        benchmark(tmp_path / "out", BenchmarkRequest((one, one), "cpu", Cpu(), inputs, labels, "a", QUICK))
    with pytest.raises(ConfigError, match="nothing to measure"):
        benchmark(tmp_path / "out", BenchmarkRequest((), "cpu", Cpu(), inputs, labels, "a", QUICK))
    with pytest.raises(ConfigError, match="`b` is not among the models"):
        benchmark(tmp_path / "out", BenchmarkRequest((one,), "cpu", Cpu(), inputs, labels, "b", QUICK))
    with pytest.raises(DataError, match="40 inputs and 3 labels"):
        benchmark(tmp_path / "out", BenchmarkRequest((one,), "cpu", Cpu(), inputs, few, "a", QUICK))


def test_a_model_of_another_input_shape_is_refused_with_a_sentence(tmp_path: Path) -> None:
    inputs = stored(tmp_path / "inputs.npy", np.zeros((4, 1, 5, 5), np.float32))
    with pytest.raises(ConfigError, match=r"`a.onnx` takes inputs of 3x8x8, these are 1x5x5"):
        run_on_target(tmp_path / "out", classifier(tmp_path / "a.onnx", 16), Cpu(), inputs)


def test_a_file_that_changed_since_it_was_recorded_is_refused(exam: tuple[File, File], tmp_path: Path) -> None:
    file = classifier(tmp_path / "a.onnx", 16)
    classifier(tmp_path / "a.onnx", 16, seed=9)
    with pytest.raises(StaleArtifact, match="changed since it was recorded"):
        benchmark(tmp_path / "out", BenchmarkRequest((contestant("a", file),), "cpu", Cpu(), *exam, "a", QUICK))


def test_a_runner_that_dies_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = tmp_path / "runner.py"
    monkeypatch.setattr(stage, "runner_path", lambda: dying)
    dying.write_text("import os, sys\nprint('a library talks')\nsys.stderr.write('out of luck')\nsys.exit(5)\n")
    with pytest.raises(EdgekdError, match="failed with exit code 5") as caught:
        stage.run("bench", tmp_path / "out", {}, "bench", 1)
    assert "out of luck" in caught.value.hint
    dying.write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n")
    with pytest.raises(EdgekdError, match="SIGKILL"):
        stage.run("bench", tmp_path / "out", {}, "bench", 1)


def test_ctrl_c_ends_the_runner_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping, started = tmp_path / "runner.py", tmp_path / "pid"
    sleeping.write_text(
        f"import os, time\nopen({str(started)!r} + '.tmp', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(started)!r} + '.tmp', {str(started)!r})\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(stage, "runner_path", lambda: sleeping)

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        stage.run("bench", tmp_path / "out", {}, "bench", 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_an_int8_file_is_compared_with_the_float_file_of_its_own_method() -> None:
    nowhere = File(Path("a.onnx"), "")
    mine, other = contestant("kd fp32", nowhere), contestant("kpn fp32", nowhere, method="kpn")
    int8 = contestant("kpn int8", nowhere, method="kpn", precision="int8")
    orphan = contestant("dkd int8", nowhere, method="dkd", precision="int8")
    all_of_them = (mine, other, int8, orphan)
    assert [entries.fp32_twin(c, all_of_them, "kd fp32") for c in all_of_them] == [None, None, 1, 0]
    family = (*all_of_them, contestant("kpn wide fp32", nowhere, method="kpn"))
    assert entries.fp32_twin(int8, family, "kd fp32") == 1, "its own name decides within a family"
    odd = contestant("kpn small int8", nowhere, method="kpn", precision="int8")
    assert entries.fp32_twin(odd, family, "kd fp32") is None, "it could come from either"


def test_float_files_stand_once_for_every_precision_that_a_target_computes_in() -> None:
    teacher, student = (contestant(f"{name} fp32", File(Path(f"{name}.onnx"), name)) for name in ("teacher", "kd"))
    int8 = contestant("kd int8", File(Path("kd-int8.onnx"), "kd-int8"), precision="int8")
    assert entries.expand_precisions((teacher, student, int8), Cpu()) == (teacher, student, int8)
    rows = entries.expand_precisions((teacher, student, int8), OpenVino())
    assert [(c.name, c.compute_precision) for c in rows] == [
        ("teacher fp32", "fp32"),
        ("teacher fp32 (native precision)", "native"),
        ("kd fp32", "fp32"),
        ("kd fp32 (native precision)", "native"),
        ("kd int8", "fp32"),
    ]
    assert [entries.fp32_twin(c, rows, "kd fp32") for c in rows] == [None, 0, None, 2, 2]
    renamed = replace(int8, name="small int8")
    assert entries.fp32_twin(renamed, rows, "teacher fp32") is None, "two float files share its role and method"
    assert entries.fp32_twin(renamed, rows[2:], "kd fp32") == 0, "the two rows of one file are no doubt"


def test_measuring_and_its_metrics_work_without_torch(exam: tuple[File, File], tmp_path: Path) -> None:
    file = classifier(tmp_path / "a.onnx", 16)
    script = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from edgekd.core.artifact import File
from edgekd.stages.bench.benchmark import run_on_target
from edgekd.targets.cpu import Cpu
model, inputs = (File.of(Path(path)) for path in ({str(file.path)!r}, {str(exam[0].path)!r}))
run_on_target(Path({str(tmp_path / "out")!r}), model, Cpu(), inputs)
assert "onnxruntime" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
