"""Latency budgets: what a network costs on a target, and which student ships there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.core.artifact import File
from edgekd.core.trial import BenchResult, Contestant, Interval, Measurement
from edgekd.stages.bench.assign import assigned
from edgekd.stages.export.export import ExportConfig
from edgekd.stages.quantize.calibrate import CalibConfig, CalibrationSet, collect
from edgekd.stages.quantize.quantize import QuantizeConfig
from edgekd.stages.training.price import Priced
from edgekd.targets.cpu import Cpu
from tests import zoo

ACCURACY = {"small int8": 0.7, "middle int8": 0.8, "large int8": 0.9, "large fp32": 0.9, "large fp16": 0.9}


def measured(name, role="student", precision="int8", **readings):
    contestant = Contestant(f"{name} {precision}", role, "any", precision, File.of(Path(__file__)), 1, 1)
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
    result = assigned(bench, budget, ACCURACY)
    assert result.ships == f"{ships} int8" and not result.warnings


def test_of_equals_the_faster_ships(bench):
    assert assigned(bench, None, dict.fromkeys(ACCURACY, 0.5)).ships == "small int8"


def test_where_none_is_fast_enough_none_ships_and_a_warning_says_so(bench):
    result = assigned(bench, 0.9, ACCURACY)
    assert not result.ships
    assert result.warnings == ("no student is within the budget of 0.9 ms: the fastest takes 1 ms (median)",)


def test_a_student_that_answers_otherwise_on_the_device_never_ships(bench):
    measurements = tuple(
        replace(m, astray="41 % agree") if "large int8" in m.contestant.name else m for m in bench.measurements
    )
    assert assigned(replace(bench, measurements=measurements), None, ACCURACY).ships == "middle int8"


@pytest.fixture
def priced(tmp_path):
    task = zoo.blobs_task(tmp_path / "data")
    (tmp_path / "calib").mkdir()
    calib: CalibrationSet = collect(tmp_path / "calib", task, CalibConfig(images=16), "blobs")
    return Priced(Cpu(), calib, ExportConfig(), QuantizeConfig())


def test_a_larger_network_costs_more(tmp_path, priced):
    torch.manual_seed(0)
    assert priced.possible()
    small, large = (priced.price_ms(tmp_path / "price", zoo.Toy(width).eval()) for width in (4, 192))
    assert 0 < 2 * small < large
    assert not (tmp_path / "price").exists()


def test_pricing_leaves_the_network_as_it_was(tmp_path, priced):
    network = zoo.Toy().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    priced.price_ms(tmp_path / "price", network)
    assert network.training
    assert all(np.array_equal(value, before[name]) for name, value in network.state_dict().items())


def test_where_there_is_no_int8_the_fastest_floats_ship(bench):
    floats = [m for m in bench.measurements if m.contestant.precision != "int8"]
    both = replace(bench, measurements=(*floats, measured("large", precision="fp16", p50_ms=0.4)))
    assert assigned(both, None, ACCURACY).ships == "large fp16"
    assert assigned(replace(bench, measurements=tuple(floats)), None, ACCURACY).ships == "large fp32"


@pytest.mark.parametrize(
    ("fp16", "ships"), [(Interval(2.5, 2.6, 2.7), "large fp16"), (Interval(1.9, 2.2, 2.5), "large int8")]
)
def test_int8_that_is_slower_beyond_doubt_does_not_ship(bench, fp16, ships):
    rows = (measured("large", p50_ms=1.0), measured("large", precision="fp16", p50_ms=0.9))
    both = tuple(replace(m, speedup=ratio) for m, ratio in zip(rows, (Interval(1.9, 2.0, 2.1), fp16), strict=True))
    assert assigned(replace(bench, measurements=both), None, ACCURACY).ships == ships
