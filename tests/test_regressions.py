"""Regressions between two builds: what is judged, by which interval, and what is left undecided, with its exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from edgekd.core import serialization
from edgekd.core.artifact import File, RecordedFile, Weights
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Machine, Measurement, Runtime
from edgekd.core.build_record import SCHEMA, BuildRecord, DataFacts, Provenance
from edgekd.core.gate import Decision, Gate
from edgekd.errors import ConfigError
from edgekd.stages.bench.intervals import wilson
from edgekd.stages.bench.statistics import median_ci, ratio
from edgekd.stages.report.build_diff import TablePair, table
from edgekd.stages.report.change import Change, Tolerance, minus, quotient
from edgekd.stages.report.regressions import compare_builds, exit_code, markdown, publish, summary, text

HERE = Machine("CPU", ("avx2", "avx512_vnni"), 2, 23.5, "Linux", "3.11.7")
RUNTIME = Runtime("onnxruntime", "1.31.1", 1)
PROTOCOL = {"batch": 1, "scope": "one image per call", "rounds": 90, "calls_per_round": 12, "processes": 6}
TESTED = {"test-images.npy": "1" * 64, "test-labels.npy": "2" * 64}
STEADY = Interval(0.996, 1.001, 1.006)
MS = 0.5  # of the student
USUAL = Tolerance()


def around(mid: float, by: float = 0.01) -> Interval:
    return Interval(mid / (1 + by), mid, mid * (1 + by))


def remembered(size: int, content: str = "a") -> RecordedFile:
    return RecordedFile(Path(f"{content}.onnx"), content * 64, size)


def row(name: str, ms: float = MS, top1: float = 95.0, size: int = 1000, sha: str = "b", **more: Any) -> Measurement:
    """A student; its speed-up is that of a teacher of 4 ms."""
    contestant = BenchmarkEntry(name, "student", "kd", "int8", remembered(size, sha), 10, 20)
    readings = {"top1": top1, "agreement": 99.0, "p50_ms": ms, "memory_mb": 12.0}
    sure = {"p50_ms": around(ms), "top1": Interval(top1 - 0.4, top1, top1 + 0.4), "memory_mb": around(12.0)}
    sure["agreement"] = Interval(98.8, 99.0, 99.2)
    return replace(Measurement(contestant, readings, around(4 / ms), "faster", intervals=sure), **more)


def bench(*rows: Measurement, **more: Any) -> BenchResult:
    contestant = BenchmarkEntry("teacher fp32", "teacher", "supervised", "fp32", remembered(9000), 100, 200)
    teacher = Measurement(contestant, {"top1": 96.0, "p50_ms": 4.0}, None, "", intervals={"p50_ms": around(4.0)})
    made = BenchResult("cpu", "", HERE, RUNTIME, PROTOCOL, STEADY, (), (teacher, *rows), None, "", 1.0, "kd int8")
    return replace(made, **more)


def record(*benches: BenchResult, **more: Any) -> BuildRecord:
    weights = Weights(File(Path("kd.safetensors"), "c" * 64), "kd", "kd", 20, 0.95, 1.0)
    data = DataFacts("digits", ("0", "1"), (1, 8, 8), 100, 20, 10_000, 100, 16)
    provenance = Provenance(TESTED, {}, {}, ())
    facts: dict[str, Any] = {"teacher": weights, "students": (weights,), "models": (), "versions": {}}
    facts |= {"config": {}, "step_seconds": {}, "data": data, "provenance": provenance, "command": "edgekd build"}
    return replace(BuildRecord("digits", "0.1", "2026-11-21T10:00:00Z", benches=benches, **facts), **more)


def written(home: Path, made: BuildRecord) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    rows = [m.model.file for b in made.benches for m in b.measurements]
    files = [{"name": f.path.name, "sha256": f.sha256, "bytes": f.size, "what": "ONNX model"} for f in rows]
    (home / "report.json").write_text(json.dumps({"schema": SCHEMA, **serialization.to_json(made), "files": files}))
    return home


@pytest.fixture
def compare(tmp_path: Path) -> Any:
    def run(old: Any, new: Any, tolerance: Tolerance = USUAL) -> tuple[int, dict[str, Change], Any]:
        """Exit code, the changes of what ships by measure, and all that was found."""
        made = [side if isinstance(side, BuildRecord) else record(side) for side in (old, new)]
        homes = [written(tmp_path / name, side) for name, side in zip(("old", "new"), made, strict=True)]
        found = compare_builds(*homes, tolerance)
        return exit_code(found), {c.metric: c for c in found.changes if c.model.endswith("int8")}, found

    return run


def test_a_quotient_of_two_intervals_adds_their_errors_as_squares():
    found = quotient(Interval(9.0, 10.0, 12.0), Interval(4.0, 5.0, 5.5))
    low = math.hypot(math.log(10 / 9), math.log(5.5 / 5))
    high = math.hypot(math.log(12 / 10), math.log(5 / 4))
    assert (found.low, found.estimate, found.high) == pytest.approx((2 * math.exp(-low), 2, 2 * math.exp(high)))


def test_a_difference_of_two_intervals_is_newcombes():
    # Newcombe 1998, table II, example (a): 56/70 and 48/80, method 10: 0.0524 to 0.3339
    found = minus(wilson(80.0, 70), wilson(60.0, 80))
    assert (found.low, found.estimate, found.high) == pytest.approx((5.24, 20.0, 33.39), abs=0.01)


def test_the_interval_of_a_quotient_holds_the_truth_as_often_as_it_says():
    random, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        seen = [(random.normal(0, sigma), 1.96 * sigma) for sigma in (0.02, 0.01)]
        found = quotient(*(Interval(math.exp(m - d), math.exp(m), math.exp(m + d)) for m, d in seen))
        inside += found.low <= 1 <= found.high
    assert 0.935 < inside / 2000 < 0.965


def build_of(random: np.random.Generator, slower: float) -> BenchResult:
    """As six processes measure it, which differ by 1 %, on a machine of two speeds."""

    def ns(mid: float) -> np.ndarray:
        own = np.repeat(np.exp(random.normal(0, 0.01, 6)), 15)[:, None]
        return machine * mid * own * np.exp(random.normal(0, 0.01, (90, 12)))

    machine = np.where(random.random(90) < 0.5, 1.14, 1)[:, None]
    teacher, student, again = ns(4e6), ns(5e5 * slower), ns(4e6)
    median = median_ci(student / 1e6, 0, 6)
    made = row(
        "kd int8",
        sha=str(random.integers(1_000_000)),
        speedup=ratio(teacher, student, 0, 6),
        intervals={"p50_ms": median},
    )
    return bench(made, aa_ratio=ratio(teacher, again, 0, 6))


@pytest.mark.parametrize(("slower", "found"), [(1.0, "held"), (1.1, "regression")])
def test_builds_that_differ_and_builds_that_do_not_are_told_apart(slower, found):
    random, outcomes = np.random.default_rng(0), []
    for _ in range(25):
        both = TablePair(build_of(random, 1.0), build_of(random, slower), USUAL, True, ({}, {}))
        changes = table(both, "kd int8", "kd int8")
        outcomes += [c.outcome for c in changes if (c.model, c.metric) == ("kd int8", "speed-up")]
    assert len(outcomes) == 25 and outcomes.count(found) >= 22 and set(outcomes) <= {found, "undecided"}


def test_the_same_build_twice_has_no_regression(compare):
    code, changes, found = compare(bench(row("kd int8")), bench(row("kd int8")))
    assert code == 0 and found.outcome == "held"
    assert "no measurable difference" in changes["speed-up"].description
    assert changes["file"].description == "the same"
    assert changes["top-1"].description == "the same file on the same images"


@pytest.mark.parametrize(
    ("slower", "code", "outcome", "words"),
    [
        (0.80, 0, "held", "20.0 % faster ("),
        (1.03, 0, "held", "3.0 % slower ("),
        (1.06, 4, "undecided", "6.0 % slower ("),
        (1.20, 3, "regression", "20.0 % slower ("),
    ],
)
def test_latency_is_judged_by_its_ratio_to_the_teacher(slower, code, outcome, words, compare):
    found = compare(bench(row("kd int8")), bench(row("kd int8", MS * slower, sha="d")))
    change = found[1]["speed-up"]
    assert (found[0], change.outcome) == (code, outcome) and words in change.description
    assert change.by.low < change.by.estimate < change.by.high and change.by.estimate == pytest.approx(
        100 * (slower - 1)
    )
    assert found[1]["median"].outcome == "not judged" and words in found[1]["median"].description


def test_the_tolerance_is_what_a_regression_is_beyond(compare):
    old, new = bench(row("kd int8")), bench(row("kd int8", MS * 1.06, sha="d"))
    assert compare(old, new, Tolerance(percent=2))[0] == 3
    assert compare(old, new, Tolerance(percent=10))[0] == 0
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="--tolerance"):
            Tolerance(percent=wrong)


def test_wide_intervals_are_too_noisy_to_say(compare):
    wide = replace(row("kd int8", sha="d"), speedup=around(8, 0.2))
    code, changes, _ = compare(bench(row("kd int8")), bench(wide))
    assert code == 4 and changes["speed-up"].description.startswith("too noisy to say (")


@pytest.mark.parametrize(
    "warning", ["A/A: two sessions of the same file differ by 4.0 %", "contended: other processes"]
)
def test_a_run_that_is_in_doubt_leaves_latency_undecided_and_accuracy_not(warning, compare):
    quiet, noisy = bench(row("kd int8")), bench(row("kd int8", MS * 1.3, sha="d"), warnings=(warning,))
    for code, changes, _ in (compare(quiet, noisy), compare(noisy, quiet)):
        assert code == 4 and changes["speed-up"].outcome == "undecided" and changes["top-1"].outcome == "held"
        assert warning in changes["speed-up"].description


def test_what_the_aa_control_is_off_by_widens_the_interval(compare):
    moved = Interval(0.98, 1.02, 1.06)
    found = [
        compare(bench(row("kd int8")), bench(row("kd int8"), aa_ratio=aa))[1]["speed-up"].by for aa in (STEADY, moved)
    ]
    assert found[1].high - found[1].low > 1.3 * (found[0].high - found[0].low)


def test_one_session_leaves_more_undecided_than_several(compare):
    one = PROTOCOL | {"processes": 1}
    device = PROTOCOL | {"locked_clocks": False}  # its sessions are parts of a run that was interrupted
    for protocol, expected in ((PROTOCOL, 0), (one, 4), (device, 4)):
        benches = [bench(row("kd int8", ms, sha=s), protocol=protocol) for ms, s in ((MS, "b"), (MS * 1.03, "d"))]
        assert compare(*benches)[0] == expected


def test_a_busier_machine_is_no_regression(compare):
    """The teacher is as much slower: the median grew, the ratio did not."""
    new = replace(row("kd int8", MS * 1.3, sha="d"), speedup=around(8))
    code, changes, _ = compare(bench(row("kd int8")), bench(new))
    assert code == 0 and changes["median"].outcome == "not judged" and "30.0 % slower" in changes["median"].description


def test_a_teacher_that_became_faster_is_no_regression_of_the_student(compare):
    new = replace(row("kd int8", sha="d"), speedup=around(6))
    code, changes, _ = compare(bench(row("kd int8")), bench(new))
    assert code == 4 and "its own median held" in changes["speed-up"].description


def test_the_same_file_on_the_same_machine_cannot_become_slower(compare):
    code, changes, _ = compare(bench(row("kd int8")), bench(row("kd int8", MS * 1.3)))
    assert code == 4 and "the same file, so it is the machine that moved" in changes["speed-up"].description
    wide = replace(row("kd int8"), speedup=around(8, 0.2))
    code, changes, _ = compare(bench(wide), bench(wide))
    assert code == 0 and changes["speed-up"].description.endswith("; the same file")


@pytest.mark.parametrize(
    "other",
    [
        {"machine": replace(HERE, processor="Another")},
        {"runtime": replace(RUNTIME, version="1.32.0")},
        {"runtime": replace(RUNTIME, threads=2)},
        {"protocol": PROTOCOL | {"scope": "another"}},
        {"protocol": PROTOCOL | {"conditions": {"governor": "powersave"}}},
    ],
)
def test_on_another_machine_times_do_not_compare_and_a_ratio_that_fell_is_undecided(other, compare):
    for slower, code in ((1.0, 0), (1.2, 4)):
        new = bench(row("kd int8", MS * slower, sha="d"), **other)
        found = compare(bench(row("kd int8")), new)
        assert found[0] == code and "median" not in found[1] and found[1]["memory"].outcome == "not judged"
        assert any("absolute times do not compare" in remark for remark in found[2].remarks)
    assert "not under the same conditions" in found[1]["speed-up"].description


def test_a_teacher_of_another_size_is_no_measure(compare):
    new = bench(row("kd int8", sha="d"))
    teacher = new.measurements[0]
    bigger = replace(teacher, model=replace(teacher.model, macs=1000))
    new = replace(new, measurements=(bigger, *new.measurements[1:]))
    code, changes, found = compare(bench(row("kd int8")), new)
    assert code == 0 and "speed-up" not in changes and changes["median"].outcome == "held"  # times decide then
    assert any("another network" in remark for remark in found.remarks)
    elsewhere = replace(new, machine=replace(HERE, cores=64))
    assert compare(bench(row("kd int8")), elsewhere)[1]["latency"].outcome == "undecided"


@pytest.mark.parametrize(
    ("top1", "code", "words"), [(93.0, 3, "2.0 points worse ("), (94.5, 4, "too few images to say (")]
)
def test_accuracy_is_judged_in_points_from_the_two_intervals(top1, code, words, compare):
    found = compare(bench(row("kd int8")), bench(row("kd int8", top1=top1, sha="d")))
    assert found[0] == code and words in found[1]["top-1"].description
    assert found[1]["top-1"].description.endswith("from the two intervals")


def answered(home: Path, made: BuildRecord, right: np.ndarray, name: str) -> BuildRecord:
    """The record with answers in its steps, of which `right` (images,) are right: as a build leaves them."""
    data, timed = home / "steps" / "data-0", home / "steps" / "bench-cpu-0"
    for folder in (data, timed / "answers"):
        folder.mkdir(parents=True)
    np.save(data / "test-labels.npy", np.zeros(len(right), np.int64))
    np.save(timed / "answers" / "logits-1.npy", np.where(right[:, None], [1.0, 0.0], [0.0, 1.0]))
    np.savez(timed / "samples.npz", ns=np.arange(1, 5), names=np.array([name]))
    samples = File.of(timed / "samples.npz")
    provenance = Provenance(TESTED | {"test-labels.npy": File.of(data / "test-labels.npy").sha256}, {}, {}, ())
    return replace(made, provenance=provenance, benches=(replace(made.benches[0], samples=samples),))


def test_accuracy_is_paired_where_both_builds_still_have_their_answers(tmp_path, compare):
    before = np.arange(10_000) < 9_500
    after = before.copy()
    after[:60] = False  # 0.6 points: the two intervals say nothing of that, pairs do
    old = answered(tmp_path / "old", record(bench(row("kd int8"))), before, "old")
    new = answered(tmp_path / "new", record(bench(row("kd int8", top1=94.4, sha="d"))), after, "new")
    code, changes, _ = compare(old, new)
    assert code == 0 and changes["top-1"].description.startswith(
        "0.6 points worse (0.4 to 0.8), paired over 10,000 images"
    )
    assert compare(old, new, Tolerance(points=0.2))[0] == 3
    elsewhere = replace(new, provenance=replace(new.provenance, data=TESTED))
    assert "two intervals" in compare(old, elsewhere)[1]["top-1"].description


def test_a_larger_file_and_more_memory_are_regressions(compare):
    bigger = replace(row("kd int8", size=1100, sha="d"))
    code, changes, _ = compare(bench(row("kd int8")), bench(bigger))
    assert code == 3 and changes["file"].description == "10.0 % larger"
    hungry = replace(bigger, intervals=bigger.intervals | {"memory_mb": around(15.0)})
    assert compare(bench(row("kd int8", size=1100)), bench(hungry))[1]["memory"].outcome == "regression"


def test_only_what_ships_is_judged(compare):
    old, new = (bench(row("kd int8"), row("kd fp32", ms)) for ms in (1.0, 2.0))
    code, _, found = compare(old, new)
    assert code == 0
    other = [c for c in found.changes if c.model == "kd fp32"]
    assert other and {c.outcome for c in other} == {"not judged"} and "100.0 % slower" in other[0].description


def test_what_ships_now_is_compared_with_what_shipped(compare):
    old = bench(row("kd int8"), row("kpn int8", 0.6, sha="d"))
    new = bench(row("kd int8"), row("kpn int8", 0.6, sha="d"), selected="kpn int8")
    code, _, found = compare(old, new)
    assert (
        code == 3
        and found.changes[0].model == "kd int8, now kpn int8"
        and "20.0 % slower" in found.changes[0].description
    )
    assert compare(old, replace(new, selected=""))[0] == 3


def test_models_and_tables_that_appear_or_vanish_are_told(compare):
    batch = bench(row("kd int8"), scenario="batch 8", selected="")
    old = record(bench(row("kd int8"), row("old int8")), batch)
    new = record(bench(row("kd int8"), row("new int8")), bench(row("kd int8"), scenario="inference only", selected=""))
    code, _, found = compare(old, new)
    assert code == 4
    assert [c.description for c in found.changes if c.table == "cpu, batch 8"] == ["is not measured any more"]
    for words in ("no longer there: old int8", "new: new int8", "cpu, inference only: was not measured before"):
        assert any(words in remark for remark in found.remarks)


def test_a_target_that_was_never_measured_is_left_alone_and_nothing_at_all_is_undecided(compare):
    board = BenchResult("jetson", "no board", None, None, {}, None, (), (), None, "", 0.0)
    both = record(bench(row("kd int8")), board)
    assert compare(both, both)[0] == 0
    code, _, found = compare(record(board), record(board))
    assert code == 4 and "nothing could be compared" in text(found)


def test_throughput_is_judged_by_its_ratio_and_its_images(compare):
    def at(images: float, sha: str) -> BenchResult:
        made = row("kd int8", sha=sha)
        sure = {"images_per_s": around(images)}
        made = replace(made, metrics={"images_per_s": images}, intervals=sure, speedup=around(images / 250))
        return bench(made, scenario="throughput", selected="")

    builds = [record(bench(row("kd int8", sha=s)), at(images, s)) for images, s in ((2000.0, "b"), (1600.0, "d"))]
    code, _, found = compare(*builds)
    told = {c.metric: c for c in found.changes if c.table == "cpu, throughput"}
    assert (
        code == 3 and "25.0 % slower" in told["speed-up"].description and "25.0 % slower" in told["images"].description
    )
    assert told["images"].unit == "per s"


def test_a_model_that_cannot_keep_up_any_more_is_undecided(compare):
    late = replace(row("kd int8", sha="d"), metrics={}, intervals={}, speedup=None, verdict="cannot keep up: 9 ms")
    rates = [bench(m, scenario="200 calls a second") for m in (row("kd int8"), late)]
    code, _, found = compare(*(record(bench(row("kd int8")), rate) for rate in rates))
    assert code == 4 and any("cannot keep up" in c.description for c in found.changes)


@pytest.mark.parametrize(
    ("was", "now", "code"),
    [
        ("passed", "failed", 3),
        ("passed", "undecided", 4),
        ("undecided", "failed", 4),
        ("failed", "failed", 0),
        ("failed", "passed", 0),
        ("failed", "undecided", 0),
    ],
)
def test_a_gate_that_failed_and_had_passed_is_a_regression(was, now, code, compare):
    def gated(outcome: Any) -> BuildRecord:
        decision = Decision("cpu", Gate("accuracy_drop", max=1.0), "kd int8", outcome, None, "0.5")
        return record(bench(row("kd int8")), gates=(decision,))

    assert compare(gated(was), gated(now))[0] == code


def test_a_new_gate_is_told(compare):
    gate = Decision("cpu", Gate("accuracy_drop", max=1.0), "kd int8", "failed", None, "2")
    code, changes, _ = compare(bench(row("kd int8")), record(bench(row("kd int8")), gates=(gate,)))
    assert code == 0 and changes["gate: accuracy_drop at most 1"].description == "new: failed; 2"


def test_markdown_stands_alone_and_hostile_names_break_nothing(tmp_path, compare):
    evil = "<script>x</script>| a\n# b ![i](http://h) @team"
    rows = [(row(evil, ms, sha=s), row("o", ms)) for ms, s in ((0.5, "b"), (0.8, "d"))]
    code, _, found = compare(*(record(bench(*pair, selected=evil), name=evil) for pair in rows))
    told = markdown(found)
    assert code == 3 and "<script" not in told and "@team" not in told and "](" not in told
    page = MarkdownIt("commonmark").enable("table").render(told)
    assert page.count("<table>") == 2 and page.count("<h2>") == 1 and "<script" not in page and "<img" not in page
    assert publish(found, tmp_path / "out").read_text() == told
    kept = json.loads((tmp_path / "out" / "regressions.json").read_text())
    assert kept == json.loads(json.dumps(summary(found))) and kept["exit_code"] == 3
    assert {change["outcome"] for change in kept["changes"]} >= {"regression", "not judged"}


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        compare_builds(tmp_path, tmp_path, Tolerance())
