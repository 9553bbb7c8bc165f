"""A few of the faults that `make torture` tries often: nothing is lost by any of them."""

from __future__ import annotations

import random
import signal
from dataclasses import replace

import pytest

from tests import torture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> torture.Bench:
    return torture.Bench.at(tmp_path_factory.mktemp("torture") / "builds", "--set", "student.baselines=[]")


def test_nothing_is_lost_by_kills(bench: torture.Bench) -> None:
    row = torture.killed(bench, 2, random.Random(1))
    assert row.tries == 2 and not row.lost


def test_nothing_is_lost_by_a_stop_which_ends_in_time(bench: torture.Bench) -> None:
    row = torture.stopped(bench, 1, random.Random(2), signal.SIGTERM)
    assert row.tries == 1 and not row.lost


def test_a_clock_that_is_set_back_changes_nothing(bench: torture.Bench) -> None:
    row = torture.earlier(bench, random.Random(3))
    assert row.tries == 2 and not row.lost


def test_a_fault_that_loses_something_is_seen(bench: torture.Bench) -> None:
    """The test of the tests: students that learn otherwise are not the same."""
    row, out = torture.Row("none"), bench.home / "other"
    assert not bench.build(out, "--set", "student.train.lr=0.05").returncode
    bench = replace(bench, hashes=torture.hashes(out))
    bench.again(row, bench.home / "whole")
    assert row.lost == ["the next build made other files"]
