"""Latency budgets: what a network costs on a target, and which student ships there."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.config import BuildConfig, StudentConfig, TeacherConfig
from edgekd.core.artifact import File, Weights
from edgekd.core.augment import Augment
from edgekd.core.bench_result import BenchmarkEntry, BenchResult, Interval, Measurement
from edgekd.core.dataset import Dataset, DatasetSplits, SplitArrays
from edgekd.methods.depth_dynamic import DepthDynamic
from edgekd.models.python import Python
from edgekd.models.vgg import VGGModel
from edgekd.pipelines.build import build
from edgekd.pipelines.deploy import with_selection
from edgekd.pipelines.target_probe import BuildTargetProbe
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.selection import select_model
from edgekd.stages.export.export import ExportConfig
from edgekd.stages.quantize.calibration_set import CalibrationConfig, CalibrationSet, collect_calibration_set
from edgekd.stages.quantize.quantize import QuantizeConfig
from edgekd.targets.cpu import Cpu
from edgekd.training.trainer import TrainConfig
from tests import zoo

ACCURACY = {"small int8": 0.7, "middle int8": 0.8, "large int8": 0.9, "large fp32": 0.9, "large fp16": 0.9}


def measured(name, role="student", precision="int8", **readings):
    contestant = BenchmarkEntry(f"{name} {precision}", role, "any", precision, File.of(Path(__file__)), 1, 1)
    return Measurement(contestant, readings, None, "")


@pytest.fixture
def bench():
    return BenchResult(
        "cpu", "", None, None, {}, None, (),
        (
            measured("teacher", "teacher", "fp32", p50_ms=9.0, top1=99.0),
            measured("small", p50_ms=1.0, top1=99.0),  # the best of the test images: they must not choose
            measured("middle", p50_ms=2.0, top1=80.0),
            measured("large", p50_ms=3.0, top1=90.0),
            measured("large", precision="fp32", p50_ms=0.5, top1=99.0),
        ),
        None, "", 0.0,
    )  # fmt: skip


@pytest.mark.parametrize(("budget", "ships"), [(None, "large"), (3.0, "large"), (2.9, "middle"), (1.5, "small")])
def test_the_most_accurate_student_within_the_budget_ships(bench, budget, ships):
    result = select_model(bench, budget, ACCURACY)
    assert result.selected == f"{ships} int8" and not result.warnings


def test_of_equals_the_faster_ships(bench):
    assert select_model(bench, None, dict.fromkeys(ACCURACY, 0.5)).selected == "small int8"


def test_where_none_is_fast_enough_none_ships_and_a_warning_says_so(bench):
    result = select_model(bench, 0.9, ACCURACY)
    assert not result.selected
    assert result.warnings == ("no student is within the budget of 0.9 ms: the fastest takes 1 ms (median)",)


def test_a_student_that_answers_otherwise_on_the_device_never_ships(bench):
    measurements = tuple(
        replace(m, mismatch="41 % agree") if "large int8" in m.model.name else m for m in bench.measurements
    )
    assert select_model(replace(bench, measurements=measurements), None, ACCURACY).selected == "middle int8"


@pytest.fixture
def priced(tmp_path):
    task = zoo.blobs_dataset(tmp_path / "data")
    (tmp_path / "calib").mkdir()
    calib: CalibrationSet = collect_calibration_set(tmp_path / "calib", task, CalibrationConfig(images=16), "blobs")
    return BuildTargetProbe(Cpu(), calib, ExportConfig(), QuantizeConfig())


def test_a_larger_network_costs_more(tmp_path, priced):
    torch.manual_seed(0)
    assert priced.can_measure()
    small, large = (priced.latency_ms(tmp_path / "price", zoo.Toy(width).eval()) for width in (4, 192))
    assert 0 < 2 * small < large
    assert not (tmp_path / "price").exists()


def test_pricing_leaves_the_network_as_it_was(tmp_path, priced):
    network = zoo.Toy().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    priced.latency_ms(tmp_path / "price", network)
    assert network.training
    assert all(np.array_equal(value, before[name]) for name, value in network.state_dict().items())


def test_where_there_is_no_int8_the_fastest_floats_ship(bench):
    floats = [m for m in bench.measurements if m.model.precision != "int8"]
    both = replace(bench, measurements=(*floats, measured("large", precision="fp16", p50_ms=0.4)))
    assert select_model(both, None, ACCURACY).selected == "large fp16"
    assert select_model(replace(bench, measurements=tuple(floats)), None, ACCURACY).selected == "large fp32"


@pytest.mark.parametrize(
    ("fp16", "ships"), [(Interval(2.5, 2.6, 2.7), "large fp16"), (Interval(1.9, 2.2, 2.5), "large int8")]
)
def test_int8_that_is_slower_beyond_doubt_does_not_ship(bench, fp16, ships):
    rows = (measured("large", p50_ms=1.0), measured("large", precision="fp16", p50_ms=0.9))
    both = tuple(replace(m, speedup=ratio) for m, ratio in zip(rows, (Interval(1.9, 2.0, 2.1), fp16), strict=True))
    assert select_model(replace(bench, measurements=both), None, ACCURACY).selected == ships


# --- of a target, and of a whole build ---


@pytest.mark.parametrize(("budget", "ships"), [(None, "large"), (3.0, "large"), (2.9, "middle"), (1.5, "small")])
def test_a_targets_own_budget_and_the_accuracy_on_validation_data_choose(bench, budget, ships):
    here = File.of(Path(__file__))
    students = [Weights(here, n, "any", 1, a, 0.0) for n, a in {"small": 0.7, "middle": 0.8, "large": 0.9}.items()]
    result = with_selection(bench, Cpu(budget_ms=budget), students)
    assert result.selected == f"{ships} int8" and not result.warnings


@dataclass(frozen=True)
class Stripes(Dataset):
    """Upright stripes, level ones, and a chequerboard of 8x8 pixels: alike in every pixel and mean."""

    @property
    def task(self):
        return "classification"

    @property
    def augment(self):
        return Augment(crop=1, flip=True)

    def read(self, limit):
        along = np.indices((8, 8)) % 2
        kinds = np.stack([along[0], along[1], along.sum(0) % 2])

        def some(count):
            labels = np.arange(count) % 3
            images = (kinds[labels] + np.arange(count)[:, None, None] // 3) % 2  # either colour first
            return SplitArrays((255 * images[..., None]).astype(np.uint8), labels)

        return DatasetSplits(some(48), some(24), some(24), ("upright", "level", "both"))


class Block(nn.Module):
    """A residual block that costs as much as `inner` says, and sees `kernel` pixels at once."""

    def __init__(self, inner, kernel):
        super().__init__()
        entering = nn.Conv2d(8, inner, kernel, padding="same", bias=False)
        self.branch = nn.Sequential(
            entering, nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, 8, kernel, padding="same")
        )

    def forward(self, x):
        return x + self.branch(x)


class Graded(nn.Module):
    """A user's network: its second block makes it a hundred times as dear, and lets it see more than single pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 1)
        self.blocks = nn.ModuleList([Block(2, 1), Block(256, 3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.relu().mean((2, 3)))


def two_targets(roomy, tight):
    method = DepthDynamic(num_subnets=1, teacher_weight=0, kd_weight=0, attention_weight=0)
    return BuildConfig(
        "two",
        Stripes(),
        TeacherConfig(VGGModel((4,), (1,)), epochs=1),
        StudentConfig(Python("graded:Graded"), method, epochs=8, train=TrainConfig(16, 0.05)),
        (Cpu(threads=1, budget_ms=roomy), Cpu(threads=2, budget_ms=tight)),
        calibration=CalibrationConfig(images=8),
        bench=BenchConfig(rounds=4, calls_per_round=20, warmup_s=0.0, processes=1, metrics=("p50_ms",)),
    )


def test_every_target_gets_the_most_accurate_subnet_within_its_budget(tmp_path, monkeypatch):
    """Budgets from what a first build measured decide beyond doubt in a second one, which measures nothing anew."""
    code = "".join(map(inspect.getsource, (Block, Graded)))
    (tmp_path / "graded.py").write_text(f"from torch import nn\n\n\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    first = build(two_targets(None, None), tmp_path / "out", tmp_path / "calib", "")
    accuracy = {s.name: s.valid_accuracy for s in first.students}
    assert accuracy["depth_dynamic"] > accuracy["depth_dynamic-depth-1"]
    took = {m.model.name: m.metrics["p50_ms"] for m in first.benches[1].measurements}
    part, whole = (
        [took[f"{name} {p}"] for p in ("fp32", "int8")] for name in ("depth_dynamic-depth-1", "depth_dynamic")
    )
    assert max(part) < min(whole), "the second block costs a hundred times as much"
    tight = (max(part) + min(whole)) / 2
    again = build(two_targets(1e6, tight), tmp_path / "out", tmp_path / "calib", "")
    assert [bench.measurements for bench in again.benches] == [bench.measurements for bench in first.benches]
    ships = [{bench.target: bench.selected.partition(" ")[0] for bench in made.benches} for made in (first, again)]
    assert ships[0] == {"cpu-1t": "depth_dynamic", "cpu-2t": "depth_dynamic"}
    assert ships[1] == {"cpu-1t": "depth_dynamic", "cpu-2t": "depth_dynamic-depth-1"}
