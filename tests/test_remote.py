"""Over SSH, against a real OpenSSH server on loopback: what survives, what is refused, and in which words."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.config import load_config
from edgekd.core.artifact import File
from edgekd.core.step_cache import StepCache
from edgekd.errors import Busy, ConfigError, EdgekdError, StaleArtifact, TargetUnavailable
from edgekd.pipelines.deploy import adapt_to_device
from edgekd.pipelines.run import Run
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.bench.runner import pack_runner
from edgekd.stages.device.bundle import Bundle
from edgekd.stages.device.bundle_readme import RUN_SCRIPT
from edgekd.stages.device.job_log import JobLog
from edgekd.stages.device.remote import DeviceInfo, measure, probe
from edgekd.stages.device.results import build_bench_result
from edgekd.stages.device.ssh import ConnectionLost, Device, agent_path, call_agent, parse_address, select_device
from edgekd.targets.cpu import this_arch
from edgekd.utils.cpu import flags
from tests import sshd
from tests.standins.bundles import PROTOCOL, engine, make_bundle, write_manifest

ROUNDS, CALLS = 40, 3000  # a round of these toys takes long enough to be interrupted
HOW = BenchConfig(rounds=3, metrics=("top1", "p50_ms"))
needs_server = pytest.mark.skipif(bool(sshd.lacking()), reason=sshd.lacking() or "-")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    made = sshd.make(tmp_path_factory.mktemp("sshd"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def own_ssh_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "server" in request.fixturenames:
        monkeypatch.setenv("EDGEKD_SSH_CONFIG", str(request.getfixturevalue("server").config))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return a_bundle(tmp_path_factory.mktemp("bundle"))


def a_bundle(home: Path, **changes: Any) -> Bundle:
    """As a build makes them, of two tiny networks."""
    rows = [engine(f"{name} fp32", name, f"{name}.onnx", predicts_labels=True) for name in ("teacher", "student")]
    make_bundle(home, engines=rows)
    manifest = json.loads((home / "manifest.json").read_text())
    (home / "run.sh").write_text(RUN_SCRIPT)
    pack_runner(home / "runner.pyz")
    write_manifest(home, manifest | {"protocol": PROTOCOL | {"rounds": ROUNDS, "calls_per_round": CALLS}} | changes)
    return Bundle(File.of(home / "manifest.json"))


def at(folder: Path, python: str = sys.executable) -> Device:
    return parse_address(f"ssh://device{folder}?python={python}")


def python_with(path: Path, words: str) -> str:
    """A program that stands in for Python on the device, and does something before it."""
    path.write_text(f"#!/bin/sh\n{words.replace('PYTHON', sys.executable)}\n")
    path.chmod(0o755)
    return str(path)


def wait_for(there: Callable[[], Any]) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def descendants(pid: int) -> list[int]:
    """Of a process, the oldest first."""
    try:
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def runner_of(folder: Path) -> int:
    """The runner that measures there now."""
    pids = descendants(json.loads((folder / "job.json").read_text())["pid"])
    return next(pid for pid in pids if b"bench" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))


class Call(threading.Thread):
    """A host that measures, in the background."""

    def __init__(self, out: Path, bundle: Bundle, to: Device) -> None:
        super().__init__()
        out.mkdir()
        self.words, self.made, self.error = (out, bundle, to), None, None
        self.start()

    def run(self) -> None:
        try:
            self.made = measure(*self.words)
        except EdgekdError as error:
            self.error = error


class Story:
    """A run that lost its connections, was watched from a second place, was killed, and was taken up again."""

    def __init__(self, server: sshd.Server, bundle: Bundle, home: Path) -> None:
        self.there, self.said = home / "there", []
        handler = logging.Handler()
        handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger("edgekd")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        first = Call(home / "first", bundle, at(self.there))
        wait_for(lambda: self.rounds() > 3)
        runner = runner_of(self.there)
        os.kill(runner, signal.SIGSTOP)  # on a fast machine it would end before both are connected again
        pid = json.loads((self.there / "job.json").read_text())["pid"]
        second = Call(home / "second", bundle, at(self.there))
        wait_for(lambda: any("runs already" in line for line in self.said))
        wait_for(lambda: server.steady(2))
        self.cut = server.cut()
        wait_for(lambda: sum("trying again" in line for line in self.said) >= 2)
        self.went_on = json.loads((self.there / "job.json").read_text())["pid"] == pid and os.kill(pid, 0) is None
        wait_for(lambda: server.steady(2))  # both are connected again
        before = self.rounds()
        os.kill(runner, signal.SIGCONT)
        wait_for(lambda: self.rounds() > before)
        os.kill(runner, signal.SIGKILL)
        self.left = self.rounds()
        for call in (first, second):
            call.join(60)
        self.errors = [first.error, second.error]
        third = Call(home / "third", bundle, at(self.there))
        third.join(120)
        assert not third.error, third.error
        self.made, self.bundle = third.made, bundle
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)

    def rounds(self) -> int:
        return len(list(self.there.glob("results/bench.state/round-*.npz")))


@pytest.fixture(scope="module")
def story(server: sshd.Server, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKD_SSH_CONFIG", str(server.config))
        yield Story(server, bundle, tmp_path_factory.mktemp("story"))


@slow
@needs_server
def test_a_lost_connection_does_not_end_the_job_and_is_taken_up_again(story):
    assert story.cut >= 2 and story.went_on


@slow
@needs_server
def test_a_second_host_picks_up_the_job_that_runs(story):
    assert sum("runs already" in line for line in story.said) == 1
    assert sum("sending" in line for line in story.said) == 1


@slow
@needs_server
def test_a_killed_job_is_told_and_goes_on_where_it_stopped(story):
    for error in story.errors:
        assert "was ended by signal 9" in error.what and "still runs" in error.hint
    assert 0 < story.left < ROUNDS
    bench = story.made.read()["bench"]
    assert bench["resumed"] and len(bench["processes"]) == 2
    with np.load(story.made.array("samples.npz")) as samples:
        assert sorted(set(samples["round"].tolist())) == list(range(ROUNDS))
        assert set(samples["process"].tolist()) == {0, 1}


@slow
@needs_server
def test_the_result_is_a_comparison_like_that_of_this_machine(story, tmp_path):
    result = build_bench_result(tmp_path, story.bundle, story.made, HOW)
    assert [m.model.name for m in result.measurements] == ["teacher fp32", "student fp32"]
    assert result.aa_ratio.low <= result.aa_ratio.estimate <= result.aa_ratio.high and result.measurements[1].speedup
    with np.load(story.made.array("samples.npz")) as samples:
        own = np.sort(samples["ns"][samples["model"] == 1])
    assert result.measurements[1].metrics["p50_ms"] == pytest.approx(own[len(own) // 2 - 1] / 1e6, rel=1e-6)
    labels = np.load(story.bundle.folder / "labels.npy")
    top1 = 100 * (np.load(story.made.array("logits-1.npy")).argmax(1) == labels).mean()
    assert result.measurements[1].metrics["top1"] == pytest.approx(top1)
    assert result.machine.processor and result.runtime.name == "onnxruntime" and result.protocol["processes"] == 2


@slow
@needs_server
def test_what_is_measured_there_is_not_measured_again(story, server, tmp_path):
    before = (story.there / "results" / "samples.npz").stat().st_mtime_ns
    again = measure(tmp_path, story.bundle, at(story.there))
    assert again.read() == story.made.read()
    assert (story.there / "results" / "samples.npz").stat().st_mtime_ns == before


@slow
@needs_server
@pytest.mark.parametrize("what", ["samples", "other"])
def test_a_result_that_was_tampered_with_is_refused(what, story, server, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(story.there, there)
    path = there / "results" / ("samples.npz" if what == "samples" else "result.json")
    if what == "samples":
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    else:  # the models of it are others than those of the bundle
        found = json.loads(path.read_text())
        found["bench"]["models"][0]["sha256"] = "0" * 64
        path.write_text(json.dumps(found))
    (tmp_path / "out").mkdir()
    with pytest.raises(StaleArtifact, match="not as the device wrote it" if what == "samples" else "no engine of this"):
        measure(tmp_path / "out", story.bundle, at(there))


@needs_server
def test_only_what_differs_is_copied_and_what_an_earlier_bundle_left_goes(bundle, server, tmp_path):
    from edgekd.stages.device.remote import send_files

    there = tmp_path / "there"
    there.mkdir()
    (there / "mine.txt").write_text("of the user")
    send_files(at(there), bundle)
    names = {str(p.relative_to(bundle.folder)) for p in bundle.folder.rglob("*") if p.is_file()}
    assert names <= {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}
    assert not list(there.rglob("*.partial"))
    student, teacher = there / "models" / "student.onnx", there / "models" / "teacher.onnx"
    before = teacher.stat().st_mtime_ns
    student.write_bytes(b"cut off")
    send_files(at(there), bundle)
    assert student.read_bytes() == (bundle.folder / "models" / "student.onnx").read_bytes()
    assert teacher.stat().st_mtime_ns == before
    other = a_bundle(tmp_path / "other", labels=None)
    (other.folder / "labels.npy").unlink()
    send_files(
        at(there),
        Bundle(File.of(write_manifest(other.folder, json.loads(other.manifest.path.read_text())) / "manifest.json")),
    )
    assert not (there / "labels.npy").exists() and (there / "mine.txt").exists()


@needs_server
def test_another_bundle_at_work_in_the_folder_is_left_alone(bundle, server, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"bundle": "another", "pid": 4242}))
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", hold, str(tmp_path / "job.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(Busy, match="process 4242"):
            measure(tmp_path, bundle, at(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


# --- refused, in words ---


def told(error: EdgekdError, *words: str) -> None:
    text = str(error)
    assert all(word in text for word in words), text
    assert "Traceback" not in text


@needs_server
@pytest.mark.parametrize("known", ["another", "none"])
def test_a_host_key_that_is_not_known_is_never_accepted(known, server, tmp_path, monkeypatch):
    lines = "" if known == "none" else f"[127.0.0.1]:{server.port} {' '.join(sshd.key(tmp_path / 'k').split()[:2])}\n"
    (tmp_path / "known_hosts").write_text(lines)
    config = server.config.read_text().replace(f"{server.home}/known_hosts", f"{tmp_path}/known_hosts")
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("EDGEKD_SSH_CONFIG", str(tmp_path / "config"))
    with pytest.raises(TargetUnavailable) as failure:
        probe(tmp_path, at(tmp_path))
    words = ("not the one that is known", "ssh-keygen -R") if known == "another" else ("is not known", "fingerprint")
    told(failure.value, "host key of device", "nothing was sent", *words)
    assert not isinstance(failure.value, ConnectionLost)  # no other try would help
    assert (tmp_path / "known_hosts").read_text() == lines


@needs_server
def test_a_key_that_is_not_taken_is_told(server, tmp_path, monkeypatch):
    sshd.key(tmp_path / "stranger")
    config = server.config.read_text().replace(f"{server.home}/user_key", f"{tmp_path}/stranger")
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("EDGEKD_SSH_CONFIG", str(tmp_path / "config"))
    with pytest.raises(TargetUnavailable) as failure:
        probe(tmp_path, at(tmp_path))
    told(failure.value, "device does not let you in", "ssh-copy-id device", "ssh-add")


@needs_server
@pytest.mark.parametrize("address", ["ssh://device:1/x", "ssh://there-is-none.invalid/x"])
def test_a_device_that_cannot_be_reached_is_told_at_once(address, server, tmp_path, monkeypatch):
    if "device" not in address:
        (tmp_path / "config").write_text("")
        monkeypatch.setenv("EDGEKD_SSH_CONFIG", str(tmp_path / "config"))
    with pytest.raises(ConnectionLost) as failure:
        probe(tmp_path, parse_address(address))
    told(failure.value, "cannot be reached", "is it on")


@needs_server
def test_a_device_without_python_is_told(server, tmp_path):
    with pytest.raises(TargetUnavailable) as failure:
        probe(tmp_path, at(tmp_path, "python3.999"))
    told(failure.value, "there is no `python3.999` on device", "?python=")


@needs_server
def test_a_device_without_numpy_is_told_with_what_to_type_there(bundle, server, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(EdgekdError) as failure:
        measure(tmp_path, bundle, at(tmp_path / "there", python))
    told(failure.value, "No module named 'numpy'", "onnxruntime", "-m pip install numpy", "same command again")


@needs_server
def test_a_folder_that_cannot_be_made_is_told(bundle, server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EdgekdError) as failure:
        measure(tmp_path, bundle, at(tmp_path / "file" / "there"))
    told(failure.value, "device: not a directory", "hint:")


@needs_server
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_is_told(bundle, server, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(EdgekdError) as failure:
        measure(tmp_path, bundle, at(tmp_path / "closed" / "there"))
    told(failure.value, "permission denied", "may write to")


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(place)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@needs_server
def test_a_full_disk_is_told_before_and_during_the_copy(bundle, server, little_disk, tmp_path, monkeypatch):
    from edgekd.stages.device import remote

    with pytest.raises(EdgekdError) as failure:
        measure(tmp_path, bundle, at(little_disk / "there"))
    told(failure.value, "is full", "are free", "free some space")
    monkeypatch.setattr(remote, "SPARE_BYTES", -(1 << 30))  # as if others filled it meanwhile
    with pytest.raises(EdgekdError) as failure:
        measure(tmp_path, bundle, at(little_disk / "there"))
    told(failure.value, "no space left on device", "free some space")
    assert not list((little_disk / "there").rglob("*.partial"))


def test_without_ssh_on_this_machine_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetUnavailable, match="no program `ssh`"):
        call_agent(parse_address("ssh://device/x"), "probe")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("scp://pi@host/folder", "by SSH only"),
        ("pi@host:/folder", "by SSH only"),
        ("host/folder", "no `ssh://`"),
        ("ssh://host", "names no folder"),
        ("ssh://host/", "names no folder"),
        ("ssh://host/~/", "names no folder"),
        ("ssh:///folder", "names no host"),
        ("ssh://-oProxyCommand=x/folder", "names no host"),
        ("ssh://pi:secret@host/folder", "holds a password"),
        ("ssh://host:big/folder", "no address"),
        ("ssh://host/folder?pyhton=x", "more than an address"),
    ],
)
def test_an_address_of_another_kind_is_refused_with_an_example(address, words):
    with pytest.raises(ConfigError, match=words) as failure:
        parse_address(address)
    assert "ssh" in failure.value.hint and "secret" not in str(failure.value)


def test_an_address_is_read_as_people_write_it():
    assert parse_address("ssh://pi@Pi4.local:2222/home/pi/edge kd") == Device(
        "pi@Pi4.local", 2222, "/home/pi/edge kd", "python3"
    )
    assert parse_address("ssh://board/~/edgekd?python=/opt/v/bin/python") == Device(
        "board", None, "~/edgekd", "/opt/v/bin/python"
    )
    assert parse_address("ssh://[fe80::1]:22/x").name == "fe80::1"


def test_a_job_that_left_no_exit_code_is_told_as_gone():
    error = JobLog().error("board")
    told(error, "the job is gone", "still runs")


def test_the_device_needs_python_3_6_and_the_standard_library_only():
    import ast

    tree = ast.parse(agent_path().read_text(), feature_version=(3, 6))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    assert names <= sys.stdlib_module_names


@needs_server
def test_a_device_says_what_it_is(server, tmp_path):
    assert probe(tmp_path, at(tmp_path)) == DeviceInfo(os.uname().machine, tuple(sorted(flags())))


@needs_server
@pytest.mark.skipif(this_arch() != "x86", reason="only on x86 do weights depend on the processor")
@pytest.mark.parametrize("said", ["flags\t\t: fpu avx2 avx512f", "vendor_id\t: none", "flags : avx2 avx512_vnni"])
def test_weights_fit_the_processor_of_the_device_or_all_where_it_does_not_tell(said, server, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{said}\n")
    shown = f"mount --bind {tmp_path}/cpuinfo /proc/cpuinfo"
    if os.geteuid() or subprocess.run(["unshare", "-m", "sh", "-c", shown], check=False, stderr=-3).returncode:
        pytest.skip("only root can show a process another processor")
    python = python_with(tmp_path / "python", f'exec unshare -m sh -c \'{shown} && exec PYTHON "$@"\' sh "$@"')
    run = Run(load_config("digits", (), ("cpu",), True), StepCache(tmp_path / "steps"))
    config = adapt_to_device(run, at(tmp_path, python))
    (target,) = config.targets
    assert target.scheme.reduce_range == ("vnni" not in said)
    assert bool(target.deployment_plan.instead) == ("vnni" not in said)


# --- clocks ---


@needs_server
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can lock clocks")
def test_clocks_are_locked_there_if_asked_and_a_result_with_free_clocks_is_not_taken_for_it(server, tmp_path):
    quick = a_bundle(tmp_path / "bundle", protocol=PROTOCOL)
    clocks, calls = tmp_path / "bin" / "jetson_clocks", tmp_path / "calls"
    clocks.parent.mkdir()
    clocks.write_text(f'#!/bin/sh\necho "clocks $1" >>{calls}\n[ "$1" != --store ] || echo >"$2"\n')
    clocks.chmod(0o755)
    free = at(tmp_path / "there", python_with(tmp_path / "python", f'PATH={tmp_path}/bin:$PATH exec PYTHON "$@"'))
    locked, found = replace(free, lock_clocks=True), []
    for number, to in enumerate((free, locked, locked, free)):
        (tmp_path / str(number)).mkdir()
        bench = measure(tmp_path / str(number), quick, to).read()["bench"]
        found.append((bench["locked"], calls.read_text().split("\n")[:-1] if calls.exists() else []))
    once = ["clocks --store", "clocks ", "clocks --restore"]
    assert found == [(False, []), (True, once), (True, once), (False, once)]


def test_clocks_of_a_device_that_is_not_roots_are_refused_before_anything_is_sent(tmp_path):
    code = "import os; os.geteuid = lambda: 1000\n" + agent_path().read_text()
    wanted = {"folder": str(tmp_path / "there"), "options": ["--lock-clocks"], "bundle": "", "files": {}}
    code += f"\nsys.exit(main('list_missing', {wanted!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "only root" in done.stderr and "ssh://root@host/folder" in done.stderr
    assert not (tmp_path / "there").exists()


def test_locked_clocks_are_asked_of_a_device_only():
    assert select_device(None, False) is None
    one, other = (select_device("ssh://board/x", lock) for lock in (False, True))
    assert one != other and (one.options, other.options) == ([], ["--lock-clocks"])
    with pytest.raises(ConfigError, match="is for a device") as failure:
        select_device(None, True)
    assert "--device" in failure.value.hint
