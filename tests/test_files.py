"""A full disk: no half file stays behind, and the message says what happened."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest

from edgekd.stages.bench.runner import runner_path
from edgekd.utils.arrays import save_array
from tests.test_runner import doubler, job

FULL = "/dev/full"  # a device of Linux on which every write fails like on a full disk


def test_an_array_is_read_back_as_it_was(tmp_path):
    array = np.arange(6, dtype=np.int64).reshape(2, 3).T
    save_array(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_a_full_disk_is_told_by_its_number_and_leaves_the_old_file(tmp_path):
    save_array(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy.partial").symlink_to(FULL)
    with pytest.raises(OSError) as error:
        save_array(tmp_path / "a.npy", np.ones(3))
    assert error.value.errno == errno.ENOSPC
    assert not np.load(tmp_path / "a.npy").any()
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("name", ["logits-0.npy", "result.json"])
def test_the_runner_tells_a_full_disk_in_a_line_of_json(tmp_path, name):
    path = job(tmp_path, [doubler(tmp_path / "a.onnx")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{name}.tmp").symlink_to(FULL)
    words = [sys.executable, str(runner_path()), "predict", "--job", str(path), "--out", str(tmp_path / "out")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    last = json.loads(ran.stdout.splitlines()[-1])
    assert ran.returncode == 1 and ran.stderr == ""
    assert last["error"] and "free some space" in last["hint"]
    assert not (tmp_path / "out" / "result.json").exists()
