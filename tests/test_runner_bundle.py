"""The runner on bundles: whole runs with onnxruntime, and everything that can go wrong with a folder or a machine."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekd.stages.bench.runner import runner_path
from edgekd.targets._jetpack import table
from edgekd.utils import cpu
from edgekd_runner import board, system_files
from edgekd_runner.bundle import read_bundle
from edgekd_runner.bundle_collect import recommend_engine
from edgekd_runner.bundle_verify import compare_logits
from edgekd_runner.child_process import explain_failure
from edgekd_runner.doctor import list_differences
from edgekd_runner.errors import RunnerError
from edgekd_runner.files import sha256
from edgekd_runner.machine import memory_gib
from edgekd_runner.rounds import Rounds
from tests.standins import bundles
from tests.standins.bundles import PROTOCOL, engine, make_bundle, read_result, run, start, write_manifest

COMMANDS = ("doctor", "build", "verify", "bench", "energy", "collect")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_bundle(tmp_path_factory.mktemp("measured"))
    for command in COMMANDS:
        code, lines = run(command, home)
        assert code == 0 and not any("error" in line for line in lines), (command, lines)
    return home


def test_one_file_holds_everything_that_was_found(measured: Path) -> None:
    result = read_result(measured, "result")
    assert result["bundle"] == sha256(measured / "manifest.json")
    assert (result["schema"], result["name"], result["target"]) == (2, "tiny", "cpu")
    for command in COMMANDS[:-1]:
        assert result[command] == read_result(measured, command), command
    assert set(result["files"]) == {"samples.npz", "logits-0.npy", "logits-1.npy"}
    for name, facts in result["files"].items():
        path = measured / "results" / name
        assert facts == {"sha256": sha256(path), "bytes": path.stat().st_size}


def test_every_engine_answers_all_inputs_as_the_host_expects(measured: Path) -> None:
    inputs = np.load(measured / "inputs.npy")
    for index, name in enumerate(("teacher", "student")):
        logits = np.load(measured / "results" / f"logits-{index}.npy")
        np.testing.assert_allclose(
            logits, bundles.compute_expected(measured / "models" / f"{name}.onnx", inputs), rtol=1e-5
        )
        fact = read_result(measured, "verify")["engines"][index]
        assert fact["passes"] and fact["agreement"] == 100 and fact["verify_images"] == 8 and fact["images"] == 12
        top1 = 100 * np.mean(logits.argmax(1) == np.load(measured / "labels.npy"))
        assert fact["top1"] == pytest.approx(top1)


def test_a_bench_times_every_engine_and_the_baseline_twice(measured: Path) -> None:
    bench = read_result(measured, "bench")
    names = ["teacher fp32", "student fp32", "teacher fp32 again"]
    manifest = json.loads((measured / "manifest.json").read_text())
    assert [model["name"] for model in bench["models"]] == names
    assert bench["models"][1]["sha256"] == manifest["files"]["models/student.onnx"]["sha256"]
    assert bench["protocol"] == PROTOCOL and bench["runtime"]["name"] == "onnxruntime"
    assert not bench["resumed"] and bench["invalid"] == [] and not bench["locked"]
    with np.load(measured / "results" / "samples.npz") as samples:
        assert samples["names"].tolist() == names and (samples["process"] == 0).all()
        assert len(samples["ns"]) == 3 * PROTOCOL["rounds"] * PROTOCOL["calls_per_round"]
        for index, model in enumerate(bench["models"]):
            assert model["median_ms"] == pytest.approx(np.median(samples["ns"][samples["model"] == index]) / 1e6)


def test_the_fastest_student_that_passes_is_recommended(measured: Path) -> None:
    assert read_result(measured, "bench")["recommended"]["name"] == "student fp32"
    assert read_result(measured, "result")["recommended"]["name"] == "student fp32"
    manifest = {"engines": [engine("t", "teacher", "t"), engine("a", "student", "a"), engine("b", "student", "b")]}
    verified = {"engines": [{"name": name, "passes": name != "a"} for name in "tab"]}
    assert recommend_engine(manifest, verified, {"t": 0.1, "a": 0.2, "b": 0.3})["name"] == "b"
    verified["engines"][2]["passes"] = False
    assert recommend_engine(manifest, verified, {"t": 0.1, "a": 0.2, "b": 0.3})["name"] is None
    assert recommend_engine(manifest, None, {"t": 0.1})["reason"] == "nothing is verified yet"


def test_without_a_power_sensor_energy_ends_well_and_says_why(measured: Path) -> None:
    assert "no power sensor" in read_result(measured, "energy")["reason"]


def test_what_is_finished_is_not_done_again(measured: Path) -> None:
    results = measured / "results"
    names = ["samples.npz", "logits-0.npy", "logits-1.npy"]
    before = [(results / name).stat().st_mtime_ns for name in names]
    for command in ("verify", "bench"):
        assert run(command, measured)[0] == 0
    assert [(results / name).stat().st_mtime_ns for name in names] == before
    assert not list(results.glob("*.tmp")) and not (results / "bench.state").exists()


# --- bundles that are not whole ---


def manifest_with(home: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = home / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def cut(home: Path) -> None:
    path = home / "models" / "student.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def tampered(home: Path) -> None:
    path = home / "models" / "student.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def linked_outside(home: Path) -> None:
    path = home / "models" / "student.onnx"
    path.rename(home.parent / "student.onnx")
    path.symlink_to(home.parent / "student.onnx")


def naming(name: str) -> Callable[[Path], None]:
    facts = {"sha256": "", "bytes": 1}
    return lambda home: manifest_with(home, lambda manifest: manifest["files"].update({name: facts}))


def setting(**values: Any) -> Callable[[Path], None]:
    return lambda home: manifest_with(home, lambda manifest: manifest.update(values))


def twins(home: Path) -> None:
    manifest_with(home, lambda manifest: manifest.update(engines=manifest["engines"] * 2))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "`models/student.onnx` has 13"),
        (tampered, "`models/student.onnx` changed since the bundle was written"),
        (lambda home: (home / "inputs.npy").unlink(), "`inputs.npy` is missing in the bundle"),
        (lambda home: (home / "manifest.json").unlink(), "is no bundle"),
        (lambda home: (home / "manifest.json").write_text("{"), "is no bundle"),
        (linked_outside, "`models/student.onnx` in the manifest leads out of the bundle"),
        (naming("../student.onnx"), "`../student.onnx` in the manifest leads out"),
        (naming("models/../../x"), "leads out of the bundle"),
        (naming("/etc/passwd"), "`/etc/passwd` in the manifest leads out"),
        (naming("models\\x"), "leads out of the bundle"),
        (setting(schema=1), "this runner reads bundles of schema 2, this one has 1"),
        (setting(runtime="abacus"), "this runner has no runtime `abacus`"),
        (setting(engines=[]), "the bundle has no engine"),
        (setting(inputs="elsewhere.npy"), "the manifest records no hash of `elsewhere.npy`"),
        (setting(protocol=PROTOCOL | {"rounds": 0}), "the protocol times no call"),
        (setting(threads="many"), "the manifest has no proper `threads`"),
        (twins, "engines of the bundle share a name"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    home = make_bundle(tmp_path / "bundle")
    spoil(home)
    with pytest.raises(RunnerError) as caught:
        read_bundle(home)
    assert words in caught.value.error and caught.value.hint and caught.value.code == 2


def test_a_link_within_the_bundle_is_fine(tmp_path: Path) -> None:
    home = make_bundle(tmp_path / "bundle")
    (tmp_path / "link").symlink_to(home)
    assert read_bundle(tmp_path / "link")["name"] == "tiny"


def test_a_tampered_bundle_ends_every_command_with_2(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    tampered(home)
    code, lines = run("build", home)
    assert code == 2 and "changed since" in lines[-1]["error"] and "copy the bundle again" in lines[-1]["hint"]
    assert not (home / "results").exists()


# --- runs that are cut off ---


def processes(home: Path) -> list[int]:
    """Of the runner, on this bundle."""
    listed = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for path in listed:
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(home).encode() in words and str(runner_path()).encode() in words:
            found.append(int(path.name))
    return found


def rounds(process: subprocess.Popen[str], count: int) -> None:
    """Wait until so many rounds are kept."""
    for line in process.stdout or ():
        if json.loads(line).get("progress", 0) >= count:
            return


def vanished(home: Path) -> bool:
    for _ in range(100):
        if not processes(home):
            return True
        time.sleep(0.05)
    return False


LONG = {"protocol": PROTOCOL | {"rounds": 40, "calls_per_round": 2000}}


def test_a_killed_bench_goes_on_where_it_was(tmp_path: Path) -> None:
    home = make_bundle(tmp_path, protocol=PROTOCOL | {"rounds": 12, "calls_per_round": 400})
    assert run("build", home)[0] == 0
    with start("bench", home) as process:
        rounds(process, 3)
        process.kill()
    assert vanished(home), "the child that timed ends with its parent"
    kept = len(list((home / "results" / "bench.state").glob("round-*.npz")))
    assert 3 <= kept < 12 and not (home / "results" / "bench.json").exists()
    code, lines = run("bench", home)
    assert code == 0 and lines[-1]["progress"] == 12
    bench = read_result(home, "bench")
    assert bench["resumed"] and len(bench["processes"]) == 2 and len(bench["operating_points"]) == 2
    with np.load(home / "results" / "samples.npz") as samples:
        process_of, round_of, model = samples["process"], samples["round"], samples["model"]
    assert (np.diff(round_of) >= 0).all() and set(round_of) == set(range(12)) and len(round_of) == 12 * 3 * 400
    assert set(process_of[round_of < 3]) == {0} and set(process_of[round_of == 11]) == {1}
    assert all(len(set(process_of[round_of == number])) == 1 for number in range(12))
    again = np.random.RandomState(0)
    for number in range(12):
        assert model[round_of == number][::400].tolist() == again.permutation(3).tolist(), "the order of one seed"


def test_a_bench_of_another_bundle_does_not_go_on(tmp_path: Path) -> None:
    key, rounds = ["a", 1], Rounds(str(tmp_path), ["a", 1])
    rounds.save(0, [1, 2, 3, 4], [1, 0], {"models": [], "conditions": {}})
    assert Rounds(str(tmp_path), key).done == [0]
    assert Rounds(str(tmp_path), ["b", 1]).done == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_within_seconds_and_keeps_what_is_done(tmp_path: Path, number: signal.Signals) -> None:
    home = make_bundle(tmp_path, **LONG)
    assert run("build", home)[0] == 0
    with start("bench", home) as process:
        rounds(process, 1)
        asked = time.monotonic()
        process.send_signal(number)
        said, _ = process.communicate(timeout=10)
    assert time.monotonic() - asked < 5 and process.returncode == 1
    last = json.loads(said.splitlines()[-1])
    assert number.name in last["error"] and "continues" in last["hint"]
    assert vanished(home) and list((home / "results" / "bench.state").glob("round-*.npz"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    home = make_bundle(tmp_path, **LONG)
    assert run("build", home)[0] == 0
    with start("bench", home) as process:
        rounds(process, 1)
        code, lines = run("verify", home)
        process.terminate()
        process.communicate()
    assert code == 1 and f"(process {process.pid})" in lines[-1]["error"]


# --- engines and machines that fail ---


def test_one_engine_that_cannot_be_built_does_not_stop_the_others(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    (home / "models" / "teacher.onnx").write_bytes(b"no model")
    write_manifest(home, json.loads((home / "manifest.json").read_text()))
    code, lines = run("build", home)
    assert code == 0 and any("`teacher fp32` was not built" in line.get("warning", "") for line in lines)
    assert "error" in read_result(home, "build")["engines"][0]
    for command in ("verify", "bench", "collect"):
        assert run(command, home)[0] == 0
    assert [model["name"] for model in read_result(home, "bench")["models"]] == [
        "student fp32",
        "student fp32 again",
    ]
    assert read_result(home, "verify")["engines"][0]["index"] == 1 and (home / "results" / "logits-1.npy").exists()


def test_a_bundle_of_which_nothing_can_be_built_says_why(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    for path in (home / "models").iterdir():
        path.write_bytes(b"no model")
    write_manifest(home, json.loads((home / "manifest.json").read_text()))
    code, lines = run("build", home)
    assert code == 1 and lines[-1]["error"].startswith("no engine could be built") and lines[-1]["hint"]
    assert run("bench", home)[0] == 1


def test_nothing_is_verified_or_timed_before_it_is_built(tmp_path: Path) -> None:
    code, lines = run("bench", make_bundle(tmp_path))
    assert code == 1 and lines[-1]["error"] == "nothing is built yet" and "build --bundle" in lines[-1]["hint"]


def test_answers_that_differ_from_the_hosts_do_not_pass() -> None:
    expected = np.eye(5, dtype=np.float32)
    row = {"agreement": 99.0}
    judged = compare_logits(row, expected[::-1], expected, None)
    assert not judged["passes"] and judged["reason"] == "20.00 % of the classes agree, 99.00 % must"
    assert compare_logits({"agreement": 0}, expected[::-1], expected, None)["passes"], "maps are not judged"
    spoiled = expected.copy()
    spoiled[4, 0] = np.nan
    judged = compare_logits(row, spoiled, expected, None)
    assert not judged["passes"] and "not finite" in judged["reason"] and "max_difference" not in judged
    assert "shape (5, 4)" in compare_logits(row, expected[:, :4], expected, None)["reason"]


def test_a_wrong_answer_is_told_and_recorded(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    path = home / "expected" / "student.npy"
    np.save(path, -np.load(path))
    write_manifest(home, json.loads((home / "manifest.json").read_text()))
    assert run("build", home)[0] == 0
    code, lines = run("verify", home)
    assert code == 0 and any("does not answer as on the host" in line.get("warning", "") for line in lines)
    assert [fact["passes"] for fact in read_result(home, "verify")["engines"]] == [True, False]


def test_missing_packages_are_named_with_their_remedy(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    code = (
        "import runpy, sys; sys.modules['numpy'] = sys.modules['onnxruntime'] = None;"
        f"sys.argv = ['runner.pyz', '_child', 'doctor', '--bundle', {str(home)!r}, '--out', '.', '--spec', '{{}}'];"
        f"runpy.run_path({str(runner_path())!r}, run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    missing = json.loads(ran.stdout.splitlines()[-1])["result"]["missing"]
    assert [lack["package"] for lack in missing] == ["numpy", "onnxruntime"]
    assert all("-m pip install" in lack["hint"] for lack in missing)


def little_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))


def test_a_full_disk_is_told_in_words_and_loses_nothing(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    assert run("build", home)[0] == 0
    before = read_result(home, "build")
    code, lines = run("verify", home, preexec_fn=little_disk)
    assert code == 1 and "the disk is full" in lines[-1]["hint"], lines
    assert read_result(home, "build") == before and not (home / "results" / "verify.json").exists()
    assert run("verify", home)[0] == 0


def test_results_of_another_bundle_are_not_collected(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    assert run("build", home)[0] == 0
    manifest_with(home, lambda manifest: manifest.update(name="another"))
    code, lines = run("collect", home)
    assert code == 1 and "no result of this bundle" in lines[-1]["error"]


@pytest.mark.parametrize(
    ("code", "text", "words"),
    [
        (-9, "", "killed it, most likely because memory ran out"),
        (-11, "Loading\nplan", "it ended with SIGSEGV: Loading; plan"),
        (3, "", "it ended with exit code 3: it printed nothing"),
    ],
)
def test_the_end_of_a_child_is_told_in_words(code: int, text: str, words: str) -> None:
    problem = explain_failure({}, text, code)
    assert words in problem.error and problem.hint and problem.code == 1


# --- doctor ---


def pretend(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_runner_knows_the_modules_of_the_table_of_boards() -> None:
    assert {module: row.name for row in table().boards for module in row.modules} == board.MODULES


def test_doctor_reads_board_and_system_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_files, "ROOT", str(tmp_path))
    pretend(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
            "proc/meminfo": "MemTotal:  7800000 kB\nMemAvailable:  600000 kB\nSwapFree:  0 kB\n",
        },
    )
    assert board.identify_board()["name"] == "orin-nano" and board.identify_board()["model"].startswith(
        "NVIDIA Jetson Orin Nano"
    )
    assert board.l4t_version() == "36.4.3" and memory_gib()["MemAvailable"] == 0.57
    seen = {"board": board.identify_board(), "versions": {"tensorrt": "10.3.0"}, "memory_gib": memory_gib()}
    bundle = {"board": "agx-orin", "tensorrt": "8.6.2"}
    told = [difference["what"] for difference in list_differences(bundle, seen | {"disk_free_gib": 0.4})]
    assert told[0] == "the bundle is for the board agx-orin, this is orin-nano"
    assert told[1] == "the bundle is for TensorRT 8.6.2, this is 10.3.0"
    assert "0.6 GiB of memory" in told[2] and "0.4 GiB of disk" in told[3]
    seen["memory_gib"] = {"MemAvailable": 4.0}
    assert not list_differences({"board": "orin-nano", "tensorrt": "10.3.0"}, seen | {"disk_free_gib": 9.0})


def test_doctor_of_another_machine_says_that_it_is_no_jetson(measured: Path) -> None:
    doctor = read_result(measured, "doctor")
    assert doctor["l4t"] is None and set(doctor["versions"]) == {"numpy", "onnxruntime"} and doctor["missing"] == []
    assert doctor["machine"]["cores"] >= 1 and doctor["disk_free_gib"] > 0 and doctor["trtexec"] is None
    assert "reason" in doctor["power"]


# --- OpenVINO ---


def test_openvino_is_served_by_the_same_commands(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    rows = [engine(f"student {one}", "student", "student.onnx", compute_precision=one) for one in ("fp32", "native")]
    home = make_bundle(tmp_path, "openvino", rows)
    for command in ("build", "verify", "bench"):
        code, lines = run(command, home)
        assert code == 0, lines
    assert (
        read_result(home, "verify")["engines"][0]["passes"]
        and read_result(home, "bench")["runtime"]["name"] == "openvino"
    )
    exact, native = (model["compute_precision"] for model in read_result(home, "bench")["models"][:2])
    assert exact == "fp32" and native == ("bf16" if {"avx512_bf16", "amx_bf16"} & set(cpu.flags()) else "fp32")


def test_the_models_in_bundles_of_this_file_are_whole(tmp_path: Path) -> None:
    home = make_bundle(tmp_path)
    for path in (home / "models").iterdir():
        onnx.checker.check_model(onnx.load(path), full_check=True)
