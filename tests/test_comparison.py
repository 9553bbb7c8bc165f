"""One student, many methods, several seeds: what is measured, what is said of it, and how it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.config import BuildConfig, CompareConfig, StudentConfig, TeacherConfig, Variant, load_config
from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.augment import Augment
from edgekd.core.bench_result import Interval
from edgekd.core.model import Model
from edgekd.errors import ConfigError, EdgekdError, TrainingError
from edgekd.onnx import session
from edgekd.pipelines import compare as compare_module
from edgekd.pipelines.build import distill_only
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.stages.distill.distill import load_pretrained
from edgekd.stages.distill.evaluate import evaluate
from edgekd.stages.distill.setup import TrainingPlan
from edgekd.stages.distill.worker import WorkerPool
from edgekd.stages.quantize.calibration_set import CalibrationConfig
from edgekd.stages.report.method_comparison import MethodRun, paired_interval, publish, summarize_methods, verdict
from edgekd.training import checkpoint
from edgekd.training.trainer import TrainConfig
from tests import zoo

ROOT = Path(__file__).parent.parent
TRAIN = TrainConfig(batch=16, precision="fp32")
SUPERVISED, KD, FINE_TUNE = (plugins.load("methods", name) for name in ("supervised", "kd", "fine_tune"))


TOYS = """
import multiprocessing
import os
import signal
from pathlib import Path
from tests.zoo import Toy, nn

def small():
    # tells in which lesson it is built, so that a test can see whether that process lives
    if "LIVES" in os.environ and multiprocessing.parent_process():
        (Path(os.environ["LIVES"]) / str(os.getpid())).touch()
    return Toy()

def big():
    return Toy(8)

def maps():
    return nn.Conv2d(3, 1, 3, padding=1)

def lost():
    net = Toy()
    nn.init.constant_(net.head.weight, float("nan"))
    return net

def deadly():
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return Toy()
"""


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    """A module with networks, as a user has one."""
    home = tmp_path_factory.mktemp("toys")
    (home / "compared_toys.py").write_text(TOYS)
    sys.path.insert(0, str(home))
    yield home
    sys.path.remove(str(home))


def family(function):
    return serialization.from_json(Model, {"use": "python", "function": f"compared_toys:{function}"})


def blobs(**compare):
    return BuildConfig(
        name="blobs",
        data=zoo.Blobs(),
        teacher=TeacherConfig(model=family("big"), epochs=4, train=TRAIN),
        student=StudentConfig(model=family("small"), method=SUPERVISED(), baselines=(KD(),), epochs=30, train=TRAIN),
        targets=(plugins.load("targets", "cpu")(),),
        calibration=CalibrationConfig(images=16),
        compare=CompareConfig(**({"seeds": 2} | compare)),
    )


def compared(out, config=None, jobs=1):
    return compare_module.compare(config or blobs(), out, jobs, command="edgekd compare blobs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return out, compared(out, jobs=2)


def test_every_contender_is_taught_with_every_seed_and_measured(made):
    _, found = made
    assert [s.name for s in found.results] == ["supervised", "kd"]
    for standing in found.results:
        assert [run.seed for run in standing.runs] == [0, 1]
        for run in standing.runs:
            assert 0 <= run.metrics["top1"] <= 100 and 0 <= run.valid_accuracy <= 1
            assert run.epochs == 30 and run.seconds > 30 * run.epoch_seconds > 0 and run.cpu_seconds > 0
            assert run.memory_bytes > 5e7 and "trained at a time: 2" in run.conditions
            # by hand: 8x8 pixels, then 4x4; kernels of 3x3
            assert run.macs == 64 * 9 * 1 * 4 + 16 * 9 * 4 * 8 + 16 * 9 * 8 * 16 + 16 * 3
            assert run.parameters == sum(p.numel() for p in zoo.Toy().parameters())
    one, two = (next(s for s in found.results if s.name == name).runs for name in ("supervised", "kd"))
    assert len({run.sha256 for run in (*one, *two)}) == 4


def test_the_difference_is_paired_by_seed(made):
    _, found = made
    alone, kd = (np.array([run.metrics["top1"] for run in s.runs]) for s in found.results)
    standing = found.results[0]
    assert standing.mean == pytest.approx(alone.mean()) and standing.std == pytest.approx(alone.std(ddof=1))
    assert standing.difference == pytest.approx((alone - kd).mean())
    half = 12.7062 * (alone - kd).std(ddof=1) / 2**0.5
    assert standing.interval.high == pytest.approx((alone - kd).mean() + half, abs=1e-3)
    assert found.results[1].verdict == "baseline" and found.results[1].interval is None


def test_without_a_word_kd_is_the_baseline_or_else_the_first():
    hot = Variant("hot", KD(temperature=8.0))
    for config, name in (
        (blobs(), "kd"),
        (blobs(methods=(SUPERVISED(),), variants=(hot,)), "supervised"),
        (blobs(baseline="supervised"), "supervised"),
    ):
        entries = compare_module.list_entries(config)
        assert compare_module.baseline_row(config, entries, [e.label for e in entries]) == name


def test_a_lesson_is_the_one_that_a_build_gives(tmp_path):
    config = blobs(seeds=1)
    found = compared(tmp_path / "compared", config)  # one lesson at a time: with all threads, as a build
    by_name = {w.name: w.file.sha256 for w in distill_only(config, tmp_path / "built")}
    assert {s.name: s.runs[0].sha256 for s in found.results} == {name: by_name[name] for name in ("supervised", "kd")}


def test_it_is_told_in_three_forms(made):
    out, found = made
    text = (out / "compare.md").read_text()
    assert "| supervised |" in text and "| kd |" in text and "edgekd compare blobs" in text and "torch" in text
    told = json.loads((out / "compare.json").read_text())
    assert told["entries"]["kd"]["method"] == serialization.to_json(KD())
    assert told["results"][1]["runs"][0]["seconds"] > 0
    svg = (out / "compare.svg").read_text()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in svg and "supervised: " in svg


def test_a_second_comparison_teaches_nothing(made):
    out, found = made
    before = {path: path.read_bytes() for path in out.glob("compare.*")}
    lessons = set((out / "steps").glob("train-*"))
    assert compared(out, jobs=1) == found
    assert {path: path.read_bytes() for path in out.glob("compare.*")} == before and len(before) == 3
    assert set((out / "steps").glob("train-*")) == lessons


def test_students_are_marked_by_their_int8_files_too(tmp_path):
    config = blobs(seeds=1, int8=True, baseline="supervised int8")
    found = compared(tmp_path, config)
    assert [s.name for s in found.results] == ["supervised", "supervised int8", "kd", "kd int8"]
    assert found.results[1].verdict == "baseline"
    (inputs,) = (tmp_path / "steps").glob("test-inputs-*/inputs.npy")
    (labels,) = (tmp_path / "steps").glob("data-*/test-labels.npy")
    for standing in found.results[1::2]:
        name = standing.name.removesuffix(" int8")
        (file,) = (tmp_path / "steps").glob(f"quantize-{name}-*/*-int8-dynamic.onnx")
        right = session.run_model(file, np.load(inputs)).argmax(1) == np.load(labels)
        assert standing.runs[0].metrics["top1"] == pytest.approx(100 * right.mean())
        assert standing.runs[0].metrics["agreement"] > 90


def test_a_target_without_int8_files_is_refused_before_any_lesson(tmp_path):
    dla = plugins.load("targets", "jetson")(board="xavier-nx", jetpack="5.1", dla=True)
    with pytest.raises(ConfigError, match="no INT8 file is made for `jetson`"):
        compared(tmp_path, replace(blobs(int8=True), targets=(dla,)))
    assert not list(tmp_path.glob("steps/*"))


@pytest.mark.slow
def test_when_it_is_killed_its_lessons_end_and_the_next_run_goes_on(made, toys, tmp_path):
    out, whole = made
    lives = tmp_path / "lives"
    lives.mkdir()
    code = "from tests.test_comparison import *\ncompared(Path(sys.argv[1]), blobs(methods=(KD(),), seeds=3))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{toys}", "LIVES": str(lives)}
    for number in (signal.SIGINT, signal.SIGKILL):
        seen = set(lives.iterdir())
        words = [sys.executable, "-c", code, str(out)]
        parent = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        wait_for(lambda seen=seen: set(lives.iterdir()) - seen)
        wait_for(lambda: list((out / "steps").glob("train-kd-seed2-*/.work/*/epoch.pt")))
        parent.send_signal(number)
        assert parent.wait(60) != 0
        (child,) = (int(path.name) for path in set(lives.iterdir()) - seen)
        wait_for(lambda child=child: not alive(child))
    config = blobs(methods=(KD(),), seeds=3)
    runs = compared(out, config).results[0].runs
    assert runs[:2] == whole.results[1].runs  # more seeds teach only the new ones
    assert runs[2].seconds is None and runs[2].memory_bytes is None  # what came before the end is not known
    again = distill_only(replace(config, student=replace(config.student, seed=2)), tmp_path)
    assert runs[2].sha256 == next(w.sha256 for w in (t.file for t in again if t.name == "kd"))


def wait_for(happened, seconds=60):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_what_a_method_refuses_is_said_as_it_says_it(made):
    out, _ = made
    wrong = blobs(methods=(FINE_TUNE(),))  # the student is smaller than the teacher
    with pytest.raises(ConfigError, match="of the student's .* tensors are in the teacher") as error:
        compared(out, wrong)
    assert "student.model" in error.value.hint


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("lost", "loss `.*` is not finite in phase .* step 1"),
        ("deadly", "the training process was killed by signal 9"),
    ],
)
def test_a_lesson_that_fails_is_named_and_finished_ones_are_kept(network, says, tmp_path):
    config = blobs(methods=(SUPERVISED(),), variants=(Variant("hot (8)", SUPERVISED(), family(network)),), seeds=1)
    with pytest.raises(TrainingError, match=rf"^`hot \(8\)`, seed 0: {says}") as error:
        compared(tmp_path, config)
    assert error.value.hint
    assert list(tmp_path.glob("steps/train-supervised-seed0-*/supervised.safetensors"))


def test_a_lesson_whose_process_is_killed_says_so(tmp_path):
    task = zoo.blobs_dataset(tmp_path / "data")
    course = TrainingPlan(1, TRAIN, Augment(), seed=7)
    with WorkerPool(1, 1) as room, pytest.raises(TrainingError, match="training process was killed by signal 9"):
        room.distill(tmp_path, "poor", task, family("deadly"), SUPERVISED(), course, (), None)


def test_a_network_is_graded_by_what_its_task_is_scored_with(tmp_path):
    task = zoo.blobs_dataset(tmp_path / "data")
    network = zoo.Toy().eval()
    checkpoint.save(network, tmp_path / "toy.safetensors")
    trained = load_pretrained(tmp_path, "toy", task, family("small"), File.of(tmp_path / "toy.safetensors"), False)
    graded = evaluate(tmp_path, trained, task, tuple(plugins.names("metrics")))
    test = task.test.load()
    with torch.no_grad():
        logits = network(torch.from_numpy(task.inputs(test.images))).numpy()
    assert graded.metrics == {"top1": pytest.approx(100 * (logits.argmax(1) == test.labels).mean())}
    other = replace(trained, classes=("x", "y", "z"))
    assert evaluate(tmp_path, other, task, ("top1",)).metrics == {}


def test_a_dense_answer_is_graded_by_its_own_metrics(tmp_path):
    task = prepare_dataset(tmp_path, plugins.load("data", "scenes")(train=4, valid=2, test=2), None)
    torch.manual_seed(0)
    network = nn.Conv2d(3, 1, 3, padding=1)
    checkpoint.save(network, tmp_path / "maps.safetensors")
    trained = load_pretrained(tmp_path, "maps", task, family("maps"), File.of(tmp_path / "maps.safetensors"), False)
    readings = evaluate(tmp_path, trained, task, tuple(plugins.names("metrics"))).metrics
    test = task.test.load()
    with torch.no_grad():
        answer = network(torch.from_numpy(task.inputs(test.images))).numpy()
    known = ~np.isnan(test.labels)
    assert readings["rmse"] == pytest.approx(np.sqrt(((answer - test.labels)[known] ** 2).mean()), rel=1e-5)
    assert set(readings) == {"rmse", "delta1"}


def test_the_interval_is_students():
    # by hand: mean 2, deviation 1, t(0.975, 2) = 4.302653, over the root of 3
    assert paired_interval([1, 2, 3]) == Interval(*(pytest.approx(v, abs=1e-5) for v in (-0.484138, 2.0, 4.484138)))
    assert paired_interval([1.0]) is None


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.1, 2, "better"), (-2, -0.1, "worse"), (-1, 1, "no measurable difference"), (0, 1, "no measurable difference")],
)
def test_a_difference_counts_when_its_interval_excludes_zero(low, high, says):
    assert verdict(Interval(low, (low + high) / 2, high)) == says


def a_run(seed, top1, notes=None):
    return MethodRun(seed, {"top1": top1}, 0.5, 10, 20, "0" * 64, notes, 1, 1.0, 1.0, 1.0, 10**6, "here")


def test_what_a_method_chose_is_told_once_for_each_lesson(made, tmp_path):
    routes = [{"teacher": f"a.{n}", "student": f"b.{n}", "losses": [0.5], "won": n == 1} for n in range(3)]
    rows = {name: (a_run(0, 50.0, {"routes": routes}),) for name in ("kpn", "kpn int8")}
    rows["steps/one"] = rows["steps/two"] = (a_run(0, 50.0, {"steps": ["wider"] * 99}), a_run(1, 50.0, {"end": "good"}))
    rows["supervised"] = (a_run(0, 40.0),)
    told = replace(
        made[1],
        results=summarize_methods(rows, "supervised", "top1"),
        baseline="supervised",
        entries={"kpn": {}, "steps": {}, "supervised": {}},
    )
    publish(told, tmp_path)
    _, _, text = (tmp_path / "compare.md").read_text().partition("## What was chosen\n\n")
    lines = text.partition("\n\n")[0].splitlines()
    assert lines[0] == "- kpn, seed 0: a.1 &#62; b.1, of 3 routes" and len(lines) == 3
    assert lines[1].startswith("- steps, seed 0: steps wider, wider") and "all is in compare.json" in lines[1]
    assert len(lines[1]) < 260 and lines[2] == "- steps, seed 1: end good"
    kept = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert kept[0]["runs"][0]["notes"]["routes"] == routes and kept[4]["runs"][0]["notes"] is None
    assert "What was chosen" not in (made[0] / "compare.md").read_text()  # neither alone nor kd chose anything


def test_only_seeds_that_both_have_are_paired():
    rows = {"a": (a_run(0, 50.0), a_run(1, 60.0)), "b": (a_run(1, 61.0), a_run(2, 90.0))}
    _, b = summarize_methods(rows, "a", "top1")
    assert b.mean == 75.5 and b.difference == 1.0
    assert b.interval is None and b.verdict == "one seed: no interval"


def test_several_settings_of_a_method_are_told_apart_by_what_differs():
    plain_kd, hot, nested = KD(), KD(temperature=8.0), Variant("hot", KD(temperature=8.0))
    assert compare_module.labels([plain_kd, SUPERVISED()]) == ["kd", "supervised"]
    assert compare_module.labels([plain_kd, hot]) == ["kd(temperature=4.0)", "kd(temperature=8.0)"]
    config = blobs(methods=(plain_kd,), variants=(nested, Variant("big", SUPERVISED(), family("big"))))
    assert [(c.label, c.model) for c in compare_module.list_entries(config)] == [
        ("kd", family("small")),
        ("hot", family("small")),
        ("big", family("big")),
    ]


def test_names_on_the_command_line_choose_settings_from_the_configuration_or_defaults():
    config = blobs(methods=(KD(temperature=8.0),), variants=(Variant("big", SUPERVISED(), family("big")),))
    chosen = compare_module.apply_options(config, ("fine_tune", "kd", "big"), 5, "kd")
    assert chosen.compare.methods == (FINE_TUNE(), KD(temperature=8.0))
    assert chosen.compare.variants == config.compare.variants and chosen.compare.seeds == 5
    assert compare_module.apply_options(config, (), None, None) == config
    big = compare_module.apply_options(config, ("big",), None, None)
    assert [entry.label for entry in compare_module.list_entries(big)] == ["big"]


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        (
            lambda: compare_module.apply_options(blobs(), ("supervsed",), None, None),
            "no method and no variant `supervsed`",
            "`supervised`",
        ),
        (
            lambda: compare_module.apply_options(blobs(), ("curriculum",), None, None),
            "`curriculum` cannot be used with its defaults alone: base is missing",
            "`compare: {methods: [{use: curriculum, ...}]}`",
        ),
        (lambda: compare_module.apply_options(blobs(), (), 0, None), "seeds is 0", "1 or more"),
        (
            lambda: compare_module.apply_options(blobs(), ("kd", "kd"), None, None),
            "two entries are called `kd`",
            "keep one",
        ),
        (lambda: blobs(variants=(Variant("kd", SUPERVISED()),)), "two entries are called `kd`", "another name"),
        (lambda: blobs(baseline="supervsed"), "baseline `supervsed` is not among", "`supervised`"),
        (lambda: blobs(methods=()), "no entries", "supervised"),
        (lambda: Variant("a/b", SUPERVISED()), "a/b", "slash"),
    ],
)
def test_mistakes_are_found_before_anything_is_taught(change, says, hint, tmp_path):
    with pytest.raises(EdgekdError, match=says) as error:
        compared(tmp_path, change())
    assert hint in error.value.hint
    assert not list(tmp_path.iterdir())


def test_a_yaml_file_can_hold_the_whole_comparison(tmp_path):
    overrides = (
        "compare.seeds=4",
        "compare.methods=[{use: kd}]",
        "compare.variants=[{name: x, method: {use: supervised}}]",
    )
    config = load_config("digits", overrides, (), small=False)
    assert [c.label for c in compare_module.list_entries(config)] == ["kd", "x"]
    assert config.compare.seeds == 4
    with pytest.raises(ConfigError, match="seeds is 0"):
        load_config("digits", ("compare.seeds=0",), (), small=False)
