"""No step runs twice, none is half done, and a killed one goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgekd.core import serialization
from edgekd.core.artifact import File, Weights
from edgekd.core.step_cache import KEEP, Ledger, code
from edgekd.errors import Busy, StaleArtifact
from edgekd.methods.kd import KD


@dataclass(frozen=True)
class Made:
    file: File
    text: str


def make(out: Path, text: str, method: KD | None = None) -> Made:
    with (out.parent / "runs.txt").open("a") as log:
        log.write(f"{text}\n")
    (out / "made.txt").write_text(text)
    return Made(File.of(out / "made.txt"), text)


def fail(out: Path, text: str) -> Made:
    (out / "half.txt").write_text(text)
    raise OSError("no")


def runs(root):
    return (root / "runs.txt").read_text().split()


def test_the_same_step_is_made_once(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.step("a", Made, make, "x") == ledger.step("a", Made, make, "x")
    assert runs(tmp_path) == ["x"]


def test_other_arguments_settings_or_names_make_anew(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.step("a", Made, make, "x", KD())
    ledger.step("a", Made, make, "y", KD())
    ledger.step("a", Made, make, "x", KD(weight=0.5))
    ledger.step("b", Made, make, "x", KD())
    assert runs(tmp_path) == ["x", "y", "x", "x"]


def test_a_failed_step_leaves_no_whole_directory(tmp_path):
    with pytest.raises(OSError, match="no"):
        Ledger(tmp_path).step("a", Made, fail, "x")
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]


def test_a_changed_or_lost_artefact_is_refused(tmp_path):
    made = Ledger(tmp_path).step("a", Made, make, "x")
    made.file.path.write_text("other")
    with pytest.raises(StaleArtifact, match="changed since it was recorded"):
        Ledger(tmp_path).step("a", Made, make, "x")
    made.file.path.unlink()
    with pytest.raises(StaleArtifact, match="is gone"):
        Ledger(tmp_path).step("a", Made, make, "x")


def test_the_manifest_holds_inputs_output_versions_and_seconds(tmp_path):
    made = Ledger(tmp_path).step("a", Made, make, "x", KD())
    entry = json.loads((made.file.path.parent / "step.json").read_text())
    name, settings = entry["args"][0]
    assert name == "x" and settings["use"] == "kd" and settings["temperature"] == 4.0
    assert entry["output"]["file"]["sha256"] == made.file.sha256
    assert "torch" in entry["code"]["versions"]
    assert entry["seconds"] >= 0


def test_the_code_of_a_step_is_all_that_it_runs_through():
    base = code("edgekd.stages.distill.dataset")
    assert base == code("edgekd.stages.distill.dataset")
    assert base["sha256"] != code("edgekd.stages.distill.dataset", KD())["sha256"]
    assert set(base["versions"]) == {"numpy"}


def test_foreign_code_is_part_of_the_key(tmp_path, monkeypatch):
    from edgekd.models.python import Python

    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("def net(): ...\n")
    before = code("edgekd.stages.distill.dataset", Python("theirs:net"))
    (tmp_path / "theirs.py").write_text("def net(): return 1\n")
    assert code("edgekd.stages.distill.dataset", Python("theirs:net")) != before
    sys.path.remove(str(tmp_path))


def test_a_second_build_in_the_same_folder_is_refused_with_the_first_one_s_pid(tmp_path):
    with Ledger(tmp_path).locked():
        other = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"in use by a running build (process {os.getpid()})" in other.stderr
    with Ledger(tmp_path).locked():
        pass


HOLD = """
import sys
from pathlib import Path
from edgekd.core.step_cache import Ledger
with Ledger(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_build_is_gone(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=str(child.pid)), Ledger(tmp_path).locked():
        pass
    child.kill()
    child.communicate()
    with Ledger(tmp_path).locked():
        pass


TEACH = """
import sys
from pathlib import Path
from edgekd.core.step_cache import Ledger
from edgekd.core.dataset import Augment
from edgekd.training.trainer import TrainConfig
from edgekd.methods.supervised import Supervised
from edgekd.models.resnet import ResNet
from edgekd.stages.distill.distill import distill
from edgekd.stages.distill.setup import Course
from edgekd.training.trained_model import Trained
from tests import zoo

home = Path(sys.argv[1])
task = zoo.blobs_task(home / "data")
course = Course(12, TrainConfig(batch=16, precision="fp32"), Augment(1, True), 0)
ledger = Ledger(home / "steps")
with ledger.locked():
    (made,) = ledger.step("teach", tuple[Trained, ...], distill, "s", task, ResNet(8, 8), Supervised(), course, ())
print(made.weights.file.sha256, len(made.weights.phases[0].curve))
"""


def teach(home):
    command = [sys.executable, "-c", TEACH, str(home)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def test_a_killed_training_goes_on_and_ends_bit_equal(tmp_path):
    whole, _ = teach(tmp_path / "whole").communicate()
    child = teach(tmp_path / "killed")
    until = time.monotonic() + 60
    while not list((tmp_path / "killed").rglob("epoch.pt")) and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert list((tmp_path / "killed").rglob("epoch.pt")), "it was to be killed in the middle of a phase"
    resumed, _ = teach(tmp_path / "killed").communicate()
    assert resumed == whole
    assert resumed.split()[1] == "12"


def test_dataclasses_are_keyed_by_what_they_hold(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.step("a", Made, make, "x", KD())
    ledger.step("a", Made, make, "x", replace(KD(), weight=0.9))
    assert runs(tmp_path) == ["x"]


def test_what_a_step_goes_on_from_stays_until_the_step_is_whole(tmp_path, monkeypatch):
    def keep_and_make(out: Path, text: str) -> Made:
        (out / KEEP).mkdir(exist_ok=True)
        (out / KEEP / "state").write_text("half")
        return make(out, text)

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        Ledger(tmp_path).step("a", Made, keep_and_make, "x")
    assert list(tmp_path.rglob("state"))
    Ledger(tmp_path).step("a", Made, keep_and_make, "x")
    assert not list(tmp_path.rglob("state"))


def test_how_weights_came_to_be_is_no_part_of_the_key(tmp_path):
    (tmp_path / "w").write_text("w")
    slow = Weights(File.of(tmp_path / "w"), "s", "kd", 1, 0.5, 100.0)
    assert serialization.facts(slow) == serialization.facts(replace(slow, seconds=1.0, valid_accuracy=None))
    assert serialization.dump(slow) != serialization.dump(replace(slow, seconds=1.0))


def test_other_circumstances_make_anew(tmp_path):
    ledger = Ledger(tmp_path)
    for runtime in ("1.0", "1.0", "1.1"):
        ledger.given({"runtime": runtime}).step("a", Made, make, "x")
    assert runs(tmp_path) == ["x", "x"]
    assert set(ledger.seconds) == {"a"}


@pytest.mark.parametrize("entry", ["no json", '{"seconds": 1, "finished": "", "output": {"text": "x"}}', None])
def test_a_step_that_another_version_wrote_is_put_aside_and_made_again(entry, tmp_path, caplog):
    home = Ledger(tmp_path).step("a", Made, make, "x").file.path.parent
    (home / "step.json").write_text(entry) if entry else (home / "step.json").unlink()
    again = [Ledger(tmp_path).step("a", Made, make, "x") for _ in range(2)]
    assert again[0] == again[1] and runs(tmp_path) == ["x", "x"]
    assert "another version of edgekd may have written it" in caplog.text
    assert (tmp_path / f"{home.name}.unreadable" / "made.txt").read_text() == "x"


def test_what_does_not_count_is_made_again(tmp_path):
    for counts in (True, False, True):
        Ledger(tmp_path).given(None, counts=lambda made, counts=counts: counts).step("a", Made, make, "x")
    assert runs(tmp_path) == ["x", "x"]


def test_pruning_leaves_the_steps_that_were_asked_for(tmp_path):
    Ledger(tmp_path).step("a", Made, make, "old")
    with pytest.raises(OSError, match="no"):
        Ledger(tmp_path).step("b", Made, fail, "half")
    ledger = Ledger(tmp_path)
    kept = [ledger.given(place).step(f"c{place}", Made, make, "new").file.path.parent for place in range(2)]
    ledger.prune()
    assert sorted(path for path in tmp_path.iterdir() if path.is_dir()) == sorted(kept)


def test_a_deletion_that_was_interrupted_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    made = Ledger(tmp_path).step("a", Made, make, "x")

    def killed(place, **_):
        (place / "made.txt").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("edgekd.core.step_cache.shutil.rmtree", lambda place, **more: more or killed(place))
        Ledger(tmp_path).prune()
    assert Ledger(tmp_path).step("a", Made, make, "x") == made


def test_what_does_not_count_stays_until_there_is_another(tmp_path):
    Ledger(tmp_path).step("a", Made, make, "x")

    def interrupted(out: Path, text: str) -> Made:
        raise KeyboardInterrupt

    interrupted.__module__ = make.__module__
    with pytest.raises(KeyboardInterrupt):
        Ledger(tmp_path).given(None, counts=lambda made: False).step("a", Made, interrupted, "x")
    assert Ledger(tmp_path).step("a", Made, make, "x").text == "x" and runs(tmp_path) == ["x"]
