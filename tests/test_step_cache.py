"""No step runs twice, none is half done, and a killed one goes on where it stopped."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgekd.core import serialization, step_cache
from edgekd.core.artifact import File, Weights
from edgekd.core.step_cache import WORK_DIR, StepCache, code_key
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
    cache = StepCache(tmp_path)
    assert cache.step("a", make, "x") == cache.step("a", make, "x")
    assert runs(tmp_path) == ["x"]


def test_other_arguments_settings_or_names_make_anew(tmp_path):
    cache = StepCache(tmp_path)
    cache.step("a", make, "x", KD())
    cache.step("a", make, "y", KD())
    cache.step("a", make, "x", KD(kd_weight=0.5))
    cache.step("b", make, "x", KD())
    assert runs(tmp_path) == ["x", "y", "x", "x"]


def test_a_failed_step_leaves_no_whole_directory(tmp_path):
    with pytest.raises(OSError, match="no"):
        StepCache(tmp_path).step("a", fail, "x")
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]


def test_a_changed_or_lost_artefact_is_refused(tmp_path):
    made = StepCache(tmp_path).step("a", make, "x")
    made.file.path.write_text("other")
    with pytest.raises(StaleArtifact, match="changed since it was recorded"):
        StepCache(tmp_path).step("a", make, "x")
    made.file.path.unlink()
    with pytest.raises(StaleArtifact, match="is gone"):
        StepCache(tmp_path).step("a", make, "x")


def test_the_manifest_holds_inputs_output_versions_and_seconds(tmp_path):
    made = StepCache(tmp_path).step("a", make, "x", KD())
    entry = json.loads((made.file.path.parent / "step.json").read_text())
    name, settings = entry["args"][0]
    assert name == "x" and settings["use"] == "kd" and settings["temperature"] == 4.0
    assert entry["output"]["file"]["sha256"] == made.file.sha256
    assert "torch" in entry["code"]["versions"]
    assert entry["seconds"] >= 0


def test_the_code_of_a_step_is_all_that_it_runs_through():
    base = code_key("edgekd.stages.distill.dataset")
    assert base == code_key("edgekd.stages.distill.dataset")
    assert base["sha256"] != code_key("edgekd.stages.distill.dataset", KD())["sha256"]
    assert set(base["versions"]) == {"numpy"}


EDITS = {  # of a module -> whether a step runs again
    "a comment": ("x = 1\n", "x = 1  # why\n", False),
    "a docstring": ('def f():\n    """Do."""\n', 'def f():\n    """Do so."""\n', False),
    "the format": ("x = [1, 2]\n", "x = [\n    1,\n    2,\n]\n", False),
    "what an error says": ("raise ValueError('a', hint='b')\n", "raise ValueError('c')\n", False),
    "what a log says": ("log.info('a %d', 1)\n", "log.info('b')\n", False),
    "the kind of an error": ("raise ValueError('a')\n", "raise TypeError('a')\n", True),
    "a constant": ("x = 1\n", "x = 2\n", True),
    "an operator": ("x = 1 + y\n", "x = 1 - y\n", True),
    "a default": ("def f(x=1): ...\n", "def f(x=2): ...\n", True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_only_what_a_module_does_counts(edit, tmp_path, monkeypatch):
    before, after, counts = EDITS[edit]
    (tmp_path / "edited.py").write_text(before)
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for content in (before, after):
        (tmp_path / "edited.py").write_text(content)
        for cached in (step_cache.syntax_tree, step_cache.syntax_hash, step_cache.imports):
            cached.cache_clear()
        keys.append(code_key("edited")["sha256"])
    assert (keys[0] != keys[1]) is counts


def test_an_edited_comment_in_training_retrains_nobody_and_an_edited_constant_does(monkeypatch):
    source = Path(step_cache.find_spec("edgekd.training.losses").origin).read_text()
    tree = step_cache.syntax_tree

    def key(text: str) -> str:
        monkeypatch.setattr(step_cache, "syntax_tree", lambda m: ast.parse(text) if m.endswith("losses") else tree(m))
        step_cache.syntax_hash.cache_clear()
        return code_key("edgekd.stages.distill.distill", KD())["sha256"]

    first = key(source)
    assert key(f"# a comment\n{source}") == first
    assert key(source.replace('"""', '"""Now, ', 1)) == first
    assert key(f"{source}\nCONSTANT = 1\n") != first
    step_cache.syntax_hash.cache_clear()


def test_tools_and_records_are_not_keyed_and_all_that_computes_is():
    assert not step_cache.is_unkeyed("edgekd.core.dataset") and not step_cache.is_unkeyed("edgekd.core.splits")
    assert step_cache.is_unkeyed("edgekd.utils.text") and step_cache.is_unkeyed("edgekd.core.step_cache")
    for name in step_cache.UNKEYED_MODULES:
        assert step_cache.find_spec(name), name


def test_foreign_code_is_part_of_the_key(tmp_path, monkeypatch):
    from edgekd.models.python import Python

    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("def net(): ...\n")
    before = code_key("edgekd.stages.distill.dataset", Python("theirs:net"))
    (tmp_path / "theirs.py").write_text("def net(): return 1\n")
    assert code_key("edgekd.stages.distill.dataset", Python("theirs:net")) != before
    sys.path.remove(str(tmp_path))


def test_a_second_build_in_the_same_folder_is_refused_with_the_first_one_s_pid(tmp_path):
    with StepCache(tmp_path).locked():
        other = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"in use by a running build (process {os.getpid()})" in other.stderr
    with StepCache(tmp_path).locked():
        pass


HOLD = """
import sys
from pathlib import Path
from edgekd.core.step_cache import StepCache
with StepCache(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_build_is_gone(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=str(child.pid)), StepCache(tmp_path).locked():
        pass
    child.kill()
    child.communicate()
    with StepCache(tmp_path).locked():
        pass


TEACH = """
import sys
from pathlib import Path
from edgekd.core.augment import Augment
from edgekd.core.step_cache import StepCache
from edgekd.training.trainer import TrainConfig
from edgekd.methods.supervised import Supervised
from edgekd.models.resnet import ResNet
from edgekd.stages.distill.distill import distill
from edgekd.stages.distill.setup import TrainingPlan
from tests import zoo

home = Path(sys.argv[1])
dataset = zoo.blobs_dataset(home / "data")
plan = TrainingPlan(12, TrainConfig(batch=16, precision="fp32"), Augment(1, True), 0)
cache = StepCache(home / "steps")
with cache.locked():
    (trained,) = cache.step("teach", distill, "s", dataset, ResNet(8, 8), Supervised(), plan, ())
print(trained.weights.file.sha256, len(trained.weights.phases[0].curve))
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
    cache = StepCache(tmp_path)
    cache.step("a", make, "x", KD())
    cache.step("a", make, "x", replace(KD(), kd_weight=0.9))
    assert runs(tmp_path) == ["x"]


def test_what_a_step_goes_on_from_stays_until_the_step_is_whole(tmp_path, monkeypatch):
    def keep_and_make(out: Path, text: str) -> Made:
        (out / WORK_DIR).mkdir(exist_ok=True)
        (out / WORK_DIR / "state").write_text("half")
        return make(out, text)

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        StepCache(tmp_path).step("a", keep_and_make, "x")
    assert list(tmp_path.rglob("state"))
    StepCache(tmp_path).step("a", keep_and_make, "x")
    assert not list(tmp_path.rglob("state"))


def test_how_weights_came_to_be_is_no_part_of_the_key(tmp_path):
    (tmp_path / "w").write_text("w")
    slow = Weights(File.of(tmp_path / "w"), "s", "kd", 1, 0.5, 100.0)
    assert serialization.cache_key(slow) == serialization.cache_key(replace(slow, seconds=1.0, valid_accuracy=None))
    assert serialization.to_json(slow) != serialization.to_json(replace(slow, seconds=1.0))


def test_other_circumstances_make_anew(tmp_path):
    cache = StepCache(tmp_path)
    for runtime in ("1.0", "1.0", "1.1"):
        cache.depends_on({"runtime": runtime}).step("a", make, "x")
    assert runs(tmp_path) == ["x", "x"]
    assert set(cache.seconds) == {"a"}


@pytest.mark.parametrize("entry", ["no json", '{"seconds": 1, "finished": "", "output": {"text": "x"}}', None])
def test_a_step_that_another_version_wrote_is_put_aside_and_made_again(entry, tmp_path, caplog):
    home = StepCache(tmp_path).step("a", make, "x").file.path.parent
    (home / "step.json").write_text(entry) if entry else (home / "step.json").unlink()
    again = [StepCache(tmp_path).step("a", make, "x") for _ in range(2)]
    assert again[0] == again[1] and runs(tmp_path) == ["x", "x"]
    assert "another version of edgekd may have written it" in caplog.text
    assert (tmp_path / f"{home.name}.unreadable" / "made.txt").read_text() == "x"


def test_what_does_not_count_is_made_again(tmp_path):
    for counts in (True, False, True):
        StepCache(tmp_path).depends_on(None, is_valid=lambda made, counts=counts: counts).step("a", make, "x")
    assert runs(tmp_path) == ["x", "x"]


def test_pruning_leaves_the_steps_that_were_asked_for(tmp_path):
    StepCache(tmp_path).step("a", make, "old")
    with pytest.raises(OSError, match="no"):
        StepCache(tmp_path).step("b", fail, "half")
    cache = StepCache(tmp_path)
    kept = [cache.depends_on(place).step(f"c{place}", make, "new").file.path.parent for place in range(2)]
    cache.prune()
    assert sorted(path for path in tmp_path.iterdir() if path.is_dir()) == sorted(kept)


def test_a_deletion_that_was_interrupted_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    made = StepCache(tmp_path).step("a", make, "x")

    def killed(place, **_):
        (place / "made.txt").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("edgekd.core.step_cache.shutil.rmtree", lambda place, **more: more or killed(place))
        StepCache(tmp_path).prune()
    assert StepCache(tmp_path).step("a", make, "x") == made


def test_what_does_not_count_stays_until_there_is_another(tmp_path):
    StepCache(tmp_path).step("a", make, "x")

    def interrupted(out: Path, text: str) -> Made:
        raise KeyboardInterrupt

    interrupted.__module__ = make.__module__
    with pytest.raises(KeyboardInterrupt):
        StepCache(tmp_path).depends_on(None, is_valid=lambda made: False).step("a", interrupted, "x")
    assert StepCache(tmp_path).step("a", make, "x").text == "x" and runs(tmp_path) == ["x"]
