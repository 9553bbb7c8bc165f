"""Gates are decided by intervals: worked cases, coverage on simulated data, and what a build says and exits with."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgekd.core import plugins
from edgekd.core.artifact import File
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Measurement, Samples
from edgekd.core.gate import Gate
from edgekd.errors import ConfigError
from edgekd.metrics.latency import PLUGINS
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.gates import check, decide, decisive, exit_code, junit
from edgekd.stages.bench.intervals import accuracy_lost, intervals, resampled, wilson
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression

NONE = np.zeros(0)


def test_points_lost_are_those_of_the_table_of_pairs():
    before = np.repeat([True, True, False, False], [80, 12, 4, 4])
    after = np.repeat([True, False, True, False], [80, 12, 4, 4])
    found = accuracy_lost(before, after)
    assert found.estimate == pytest.approx(8.0)  # 12 worse, 4 better, of 100
    # Agresti and Min by hand: (12.5 - 4.5) / 102, sqrt(17 - 64 / 102) / 102
    assert (found.low, found.high) == pytest.approx((100 * (8 / 102 - 0.07776), 100 * (8 / 102 + 0.07776)), abs=0.01)


def test_no_difference_in_few_images_is_not_called_certain():
    right = np.ones(50, bool)
    assert accuracy_lost(right, right).high > 3.5
    assert accuracy_lost(np.ones(10000, bool), np.ones(10000, bool)).high < 0.05


def test_a_share_has_wilsons_interval():
    found = wilson(90.0, 100)
    assert (found.low, found.estimate, found.high) == pytest.approx(
        (82.56, 90.0, 94.48), abs=0.01
    )  # tables of Wilson's
    assert wilson(100.0, 20).low == pytest.approx(83.89, abs=0.01)


def test_the_interval_of_points_lost_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        kinds = random.choice(4, 400, p=[0.85, 0.04, 0.02, 0.09])  # both right, lost, won, both wrong: 2 points lost
        found = accuracy_lost(np.isin(kinds, [0, 1]), np.isin(kinds, [0, 2]))
        inside += found.low <= 2.0 <= found.high
    assert 0.92 < inside / 500 < 0.98


def test_every_number_of_a_measurement_has_an_interval_around_it():
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 200)
    logits = np.eye(3)[np.where(random.random(200) < 0.9, labels, (labels + 1) % 3)]
    reference = np.eye(3)[labels]
    ns = random.integers(1000, 2000, (10, 70))
    trial = Samples(ns.ravel(), np.repeat(np.arange(10), 70), (logits,), (reference,), labels)
    found = intervals(trial, (reference,), ("top1", "agreement", "p50_ms", "p99_ms", "rmse"), 0, task=Classification())
    assert set(found) == {"top1", "agreement", "p50_ms", "p99_ms", "accuracy_drop", "accuracy_drop_vs_teacher"}
    assert all(i.low <= i.estimate <= i.high and i.low < i.high for i in found.values())
    assert found["accuracy_drop"] == found["accuracy_drop_vs_teacher"]


def test_the_error_of_a_map_has_an_interval_that_shrinks_with_images():
    random = np.random.default_rng(2)
    widths = []
    for images in (40, 1000):
        truth = random.standard_normal((images, 1, 4, 4))
        answer = truth + random.standard_normal(truth.shape)
        found = intervals(Samples(NONE, NONE, (answer,), (answer,), truth), (), ("rmse", "top1"), 0, task=Regression())[
            "rmse"
        ]
        assert found.low < 1 < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


NOISE = ("A/A: two sessions of the same file differ by 4.0 %",)


def bench(drop, ships="student int8", warnings=(), not_measured="", **numbers) -> BenchResult:
    contestant = BenchmarkEntry(ships, "student", "kd", "int8", File(Path(__file__), ""), 10, 20)
    seen = {"accuracy_drop": drop} | numbers
    row = Measurement(contestant, {"agreement": 99.0}, Interval(2.0, 2.1, 2.2), "", intervals=seen)
    return BenchResult("cpu", not_measured, None, None, {}, None, warnings, (row,), None, "", 0.0, selected=ships)


@pytest.mark.parametrize(
    ("gate", "outcome"),
    [
        (Gate("accuracy_drop", max=1.0), "passed"),
        (Gate("accuracy_drop", max=0.6), "undecided"),
        (Gate("accuracy_drop", max=0.1), "failed"),
        (Gate("speedup", min=2.0), "passed"),
        (Gate("speedup", min=2.1), "undecided"),
        (Gate("speedup", min=3.0), "failed"),
        (Gate("macs", max=10), "passed"),
        (Gate("parameters", max=19), "failed"),
        (Gate("kilobytes", max=0.1), "failed"),
        (Gate("agreement", min=98), "passed"),  # a number without an interval
        (Gate("p99_ms", max=1), "undecided"),  # was not measured
    ],
)
def test_a_gate_is_decided_by_the_whole_interval(gate, outcome):
    (decision,) = decide([gate], [bench(Interval(0.2, 0.5, 0.8))])
    assert decision.outcome == outcome and decision.model == "student int8"
    assert decision.reason


def test_noise_leaves_a_latency_undecided_and_an_accuracy_not():
    noisy = bench(Interval(0.2, 0.5, 0.8), warnings=NOISE)
    decisions = decide([Gate("speedup", min=1.0), Gate("accuracy_drop", max=1.0)], [noisy])
    assert [d.outcome for d in decisions] == ["undecided", "passed"]
    assert "A/A" in decisions[0].reason


@pytest.mark.parametrize(
    ("gate", "warnings", "decides"),
    [
        (Gate("speedup", min=1.0), NOISE, False),
        (Gate("speedup", min=1.0, target="cpu"), NOISE, False),
        (Gate("speedup", min=1.0, target="jetson"), NOISE, True),
        (Gate("accuracy_drop", max=1.0), NOISE, True),
        (Gate("speedup", min=9.0), (), True),
    ],
)
def test_what_noise_leaves_undecided_is_measured_again(gate, warnings, decides):
    noisy = bench(Interval(0.2, 0.5, 0.8), warnings=warnings)
    assert decisive([gate], noisy) == decides
    assert decisive([gate], replace(noisy, scenario="batch8"))


def test_what_was_not_measured_is_undecided_and_nothing_that_ships_is_a_failure():
    gate = Gate("accuracy_drop", max=1.0)
    away = replace(bench(Interval(0, 0, 0), not_measured="no board"), measurements=())
    none = bench(Interval(0, 0, 0))
    none = replace(none, selected="")
    assert [d.outcome for d in decide([gate], [away, none])] == ["undecided", "failed"]


def test_a_gate_for_one_target_leaves_the_others_alone():
    assert decide([Gate("accuracy_drop", max=1.0, target="jetson")], [bench(Interval(0, 0, 0))]) == ()


def test_a_gate_for_a_family_is_for_all_its_targets():
    benches = [replace(bench(Interval(0, 0, 0)), target=name) for name in ("cpu-1t", "cpu-4t", "openvino")]
    for name, count in (("cpu", 2), ("cpu-4t", 1), ("openvino", 1), ("", 3)):
        assert len(decide([Gate("accuracy_drop", max=1.0, target=name)], benches)) == count


def test_the_size_of_a_file_that_is_gone_is_not_known():
    row = bench(Interval(0, 0, 0))
    contestant = replace(row.measurements[0].model, file=File(Path("nowhere.onnx"), ""))
    gone = replace(row, measurements=(replace(row.measurements[0], model=contestant),))
    assert [d.outcome for d in decide([Gate("kilobytes", max=1e9)], [gone, row])] == ["undecided", "passed"]


def test_the_exit_code_is_that_of_the_worst():
    good, bad, unknown = (
        decide([Gate("accuracy_drop", max=m)], [bench(Interval(0.2, 0.5, 0.8))]) for m in (1, 0.1, 0.6)
    )
    assert [exit_code(d) for d in ((), good, bad, unknown)] == [0, 0, 3, 4]
    assert exit_code(good + unknown + bad) == 3


def test_junit_tells_failures_from_what_is_undecided(tmp_path):
    gates = [Gate("accuracy_drop", max=m) for m in (1, 0.1, 0.6)]
    junit(decide(gates, [bench(Interval(0.2, 0.5, 0.8))]), tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"], ["error"]]


def test_a_mistaken_gate_is_told():
    with pytest.raises(ConfigError, match="no gate can look at `accuracy_dropp`"):
        check([Gate("accuracy_dropp", max=1)], ["top1", "p50_ms"], ["cpu"])
    with pytest.raises(ConfigError, match="for the target `jetsen`"):
        check([Gate("accuracy_drop", max=1, target="jetsen")], ["top1", "p50_ms"], ["cpu", "jetson"])
    with pytest.raises(ConfigError, match="gates need the metric `p50_ms`"):
        check([Gate("accuracy_drop", max=1)], ["top1"], ["cpu"])
    for limits in ({}, {"max": 1.0, "min": 2.0}):
        with pytest.raises(ConfigError, match="limits"):
            Gate("accuracy_drop", **limits)
    with pytest.raises(ConfigError, match="nan"):
        Gate("accuracy_drop", max=float("nan"))


def test_every_latency_has_an_interval_where_each_session_has_few_calls():
    ns, none = np.random.default_rng(0).gamma(100, 1e4, (30, 35)), np.zeros(0)
    trial = Samples(ns.ravel(), np.repeat(np.arange(30), 35), (), (), none)
    timed = [name for name in BenchConfig().metrics if "ns" in plugins.load("metrics", name).inputs]
    found = intervals(trial, (), timed, seed=0, processes=6)
    assert list(found) == timed and {"p99_ms", "p99_upper_ms"} <= set(timed)
    assert all(one.low <= one.estimate <= one.high for one in found.values())


@pytest.mark.parametrize("spread", [0.005, 0.01])
def test_intervals_of_latencies_hold_what_sessions_differ_by(spread):
    """Six processes of five blocks each, whose medians differ: the true one is in nearly all intervals."""
    random, none = np.random.default_rng(0), np.zeros(0)
    held = 0
    for _ in range(60):
        own = np.repeat(np.exp(random.normal(0, spread, 6)), 5)[:, None]
        ns = 1e6 * own * np.exp(random.normal(0, 0.01, (30, 35)))
        found = resampled(
            PLUGINS["p50_ms"].compute, Samples(ns.ravel(), np.repeat(np.arange(30), 35), (), (), none), 0, processes=6
        )
        held += found.low <= 1 <= found.high
    assert held >= 53  # of 60, where 57 are to be expected
