"""The main job, end to end and in a real process: a smoke build of the digits, and what it leaves behind."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnxruntime
import pytest

from edgekd.pipelines import unchanged
from edgekd.pipelines.build_result import build_summary
from edgekd.pipelines.deploy import with_selection
from edgekd.targets.cpu import Cpu
from tests.test_regressions import bench, record, row

ROOT = Path(__file__).parent.parent


def edgekd(*words, cwd, check=True, **kwargs):
    command = [sys.executable, "-m", "edgekd", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, **kwargs)
    if check:
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    home = tmp_path_factory.mktemp("build")
    done = edgekd("build", "digits", "--smoke", "--target", "cpu", "--out", "out", "--json", cwd=home)
    return home, json.loads(done.stdout)


def test_a_latency_budget_that_nothing_meets_is_told_at_once_and_to_machines(caplog):
    late = with_selection(bench(row("kd int8", 2.5), selected=""), Cpu(budget_ms=1.0), record().students)
    said = "no student is within the budget of 1 ms: the fastest takes 2.5 ms (median)"
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", f"cpu: {said}")]
    assert (
        build_summary(record(late))["warnings"] == {"cpu": (said,)} and build_summary(record(bench()))["warnings"] == {}
    )


def test_a_build_measures_teacher_student_and_baselines(built):
    home, summary = built
    models = summary["targets"]["cpu"]
    assert list(models) == ["teacher fp32", "kpn fp32", "kpn int8", "supervised fp32", "kd fp32"]
    assert all(0 <= m["top1"] <= 100 and m["p50_ms"] > 0 for m in models.values())
    assert models["kpn int8"]["agreement"] > 80


def test_the_score_is_what_the_file_answers_in_its_runtime(built):
    home, summary = built
    steps = home / "out" / "steps"
    inputs = np.load(next(steps.glob("test-inputs-*/inputs.npy")))
    labels = np.load(next(steps.glob("data-*/test-labels.npy")))
    session = onnxruntime.InferenceSession(next(steps.glob("quantize-kpn-cpu-*/kpn-int8.onnx")))
    logits = np.concatenate([session.run(None, {"image": x[None]})[0] for x in inputs])
    want = 100 * (logits.argmax(1) == labels).mean()
    assert summary["targets"]["cpu"]["kpn int8"]["top1"] == pytest.approx(want)


def test_the_report_is_there_in_three_forms_and_needs_no_network(built):
    out = built[0] / "out"
    html = (out / "report.html").read_text()
    assert "kpn int8" in html and "<script" not in html and "http://" not in html and "https://" not in html
    assert "kpn int8" in (out / "report.md").read_text()
    record = json.loads((out / "report.json").read_text())
    assert {r["method"] for r in record["students"]} == {"kpn", "supervised", "kd"}
    assert [r["won"] for r in record["students"][0]["notes"]["routes"]].count(True) == 1
    assert record["benches"][0]["machine"]["processor"]


def test_the_calibration_set_is_kept_with_its_manifest(built):
    kept = built[0] / "calib_data" / "digits-smoke"
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["split"] == "train" and manifest["count"] == 16
    assert hashlib.sha256((kept / "images.npz").read_bytes()).hexdigest() == manifest["file"]["sha256"]


def test_a_second_build_makes_nothing_new(built):
    home, _ = built
    steps = home / "out" / "steps"
    before = {p: p.stat().st_mtime_ns for p in steps.rglob("*") if p.name != "lock"}
    done = edgekd("build", "digits", "--smoke", "--target", "cpu", "--out", "out", "--json", cwd=home)
    assert {p: p.stat().st_mtime_ns for p in steps.rglob("*") if p.name != "lock"} == before
    assert json.loads(done.stdout) == built[1]
    assert "..." not in done.stderr


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["onnxscript"] = None
sys.argv = ["edgekd", *sys.argv[1:]]
runpy.run_module("edgekd", run_name="__main__")
"""


def test_a_build_that_has_nothing_to_do_needs_no_torch(built):
    home, summary = built
    words = ["build", "digits", "--smoke", "--target", "cpu", "--out", "out", "--json"]
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == summary
    other = subprocess.run(
        [*command, "--set", "student.epochs=3"], capture_output=True, text=True, cwd=home, env=environment
    )
    assert other.returncode == 1 and "torch" in other.stderr, "anything else is built"


CHANGES = {  # of anything that a build depends on, or wrote
    "a step": lambda home: next(home.glob("out/steps/export-kpn-*/kpn.onnx")).write_bytes(b"x"),
    "the entry of a step": lambda home: next(home.glob("out/steps/report-*/step.json")).write_text("{}"),
    "the report": lambda home: (home / "out/report.html").write_text("x"),
    "an artifact": lambda home: next(home.glob("out/artifacts/cpu/*.onnx")).unlink(),
    "the calibration set": lambda home: (home / "calib_data/digits-smoke/images.npz").unlink(),
    "the snapshot": lambda home: (home / "out/steps/unchanged.json").write_text("[]"),
    "a result": lambda home: (
        (home / "out/bundle-cpu/results").mkdir(parents=True),
        (home / "out/bundle-cpu/results/result.json").write_text(""),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_noticed(built, change, tmp_path, monkeypatch):
    shutil.copytree(built[0], tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    path = Path("out/steps/unchanged.json")
    text = path.read_text().replace(str(built[0]), str(tmp_path / "b"))  # the copy is in another folder
    path.write_text(text)
    request = json.loads(text)["request"]
    assert unchanged.load_unchanged(Path("out"), request)
    assert not unchanged.load_unchanged(Path("out"), request | {"bundles": True})
    CHANGES[change](tmp_path / "b")
    assert not unchanged.load_unchanged(Path("out"), request)


def test_another_environment_is_noticed(built):
    request = json.loads((built[0] / "out/steps/unchanged.json").read_text())["request"]
    assert request["environment"].keys() == unchanged.environment().keys()
    assert unchanged.load_unchanged(built[0] / "out", request)
    for key in request["environment"]:
        other = request | {"environment": request["environment"] | {key: "other"}}
        assert not unchanged.load_unchanged(built[0] / "out", other)


def test_a_report_is_written_again_from_its_json(built, tmp_path):
    shutil.copytree(built[0] / "out", tmp_path / "out", ignore=shutil.ignore_patterns("steps"))
    (tmp_path / "out" / "report.html").unlink()
    edgekd("report", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "report.html").read_bytes() == (built[0] / "out" / "report.html").read_bytes()


def test_a_changed_artefact_is_refused(built, tmp_path):
    shutil.copytree(built[0] / "out", tmp_path / "out")
    model = next((tmp_path / "out" / "steps").glob("export-kpn-*/kpn.onnx"))
    model.write_bytes(model.read_bytes() + b"x")
    done = edgekd("build", "digits", "--smoke", "--target", "cpu", "--out", "out", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "changed since it was recorded" in done.stderr


def test_a_killed_build_goes_on_and_ends_with_the_same_students(built, tmp_path):
    words = ["build", "digits", "--smoke", "--target", "cpu", "--out", "out"]
    command = [sys.executable, "-m", "edgekd", *words]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    place = str(tmp_path / "out" / "steps" / "distill-kpn-*" / ".work" / "*" / "epoch.pt")
    while not glob(place) and time.monotonic() < until:  # noqa: PTH207 - a Path minds folders that vanish
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    edgekd(*words, cwd=tmp_path)
    for pattern in ("teacher-*/teacher.safetensors", "distill-*/*.safetensors", "quantize-*/*.onnx"):
        whole = {p.name: p.read_bytes() for p in (built[0] / "out" / "steps").glob(pattern)}
        resumed = {p.name: p.read_bytes() for p in (tmp_path / "out" / "steps").glob(pattern)}
        assert whole == resumed and whole


def test_stages_work_alone_on_files_of_any_origin(built, tmp_path):
    steps = built[0] / "out" / "steps"
    model = next(steps.glob("export-supervised-*/supervised.onnx"))
    calib = built[0] / "calib_data" / "digits-smoke" / "images.npz"
    weights = next(steps.glob("distill-supervised-*/supervised.safetensors"))
    made = edgekd("quantize", model, "--calib", calib, "--target", "cpu", "-o", "q.onnx", "--json", cwd=tmp_path)
    assert json.loads(made.stdout)["precision"] == "int8"
    words = ["--model", "resnet:depth=8,width=16", "--checkpoint", weights, "--images", calib, "--classes", "10"]
    edgekd("export", *words, "-o", "again.onnx", cwd=tmp_path)
    done = edgekd("bench", "again.onnx", "q.onnx", "--target", "cpu", "--smoke", "--json", cwd=tmp_path)
    assert [m["model"]["name"] for m in json.loads(done.stdout)["measurements"]] == ["again.onnx", "q.onnx"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["build", "digit"], 2, "did you mean `digits`?"),
        (["build", "--target", "cpuu"], 2, "did you mean `cpu`?"),
        (["build", "--set", "student.epoch=3"], 2, "student has no `epoch`"),
        (["build", "--set", "teacher.checkpoint=none.pt", "--smoke"], 2, "there is no file `none.pt`"),
        (["build", "cifar10", "--set", "data.root=nowhere"], 2, "there is no folder `nowhere/train`"),
        (["quantize", "none.onnx", "--calib", "x.npz", "-o", "y.onnx"], None, "none.onnx"),
        (["bench", "none.onnx"], None, "none.onnx"),
        (["report", "nowhere"], 2, "report.json"),
        (["list", "method"], 2, "did you mean `methods`?"),
        (["bild"], 2, "bild"),
        (["build", "--out"], 2, "--out"),
    ],
)
def test_a_mistake_ends_with_a_sentence_a_hint_and_the_right_code(words, code, says, tmp_path):
    done = edgekd(*words, cwd=tmp_path, check=False)
    assert done.returncode in ((1, 2) if code is None else (code,))
    assert says in done.stderr
    assert done.stdout == ""


def test_init_writes_a_configuration_that_builds(tmp_path):
    edgekd("init", cwd=tmp_path)
    assert "# " in (tmp_path / "edgekd.yaml").read_text()
    again = edgekd("init", cwd=tmp_path, check=False)
    assert again.returncode == 2 and "exists" in again.stderr
    made = edgekd("distill", "edgekd.yaml", "--smoke", "--set", "student.baselines=[]", "--json", cwd=tmp_path)
    assert [row["name"] for row in json.loads(made.stdout)] == ["teacher", "kpn", "supervised"]


def test_list_and_doctor_speak_to_machines_too(tmp_path):
    assert "kpn" in json.loads(edgekd("list", "methods", "--json", cwd=tmp_path).stdout)["methods"]
    assert {"what", "fine", "detail", "fix", "needed"} == set(
        json.loads(edgekd("doctor", "--json", cwd=tmp_path).stdout)[0]
    )


@pytest.mark.slow
def test_gates_decide_the_exit_code(tmp_path):
    small = ["--set", "images_per_class=60", "--set", "teacher.epochs=2", "--set", "student.epochs=2"]
    small += ["--set", "student.method={use: kd}", "--set", "student.baselines=[]"]
    quick = [
        "--set",
        "bench.rounds=4",
        "--set",
        "bench.metrics=[top1, agreement, p50_ms]",
        "--set",
        "calibration.images=16",
    ]
    gates = {
        0: "[{metric: macs, max: 1e12}]",
        3: "[{metric: macs, max: 1e12}, {metric: top1, min: 100.1}]",
        4: "[{metric: macs, max: 1e12}, {metric: macs, max: 1, target: jetson}]",
    }
    for code, asked in gates.items():
        words = ["build", "digits", *small, *quick, "--set", f"gates={asked}", "--out", "run", "--json", "-t", "cpu"]
        words += ["-t", "jetson"] if code == 4 else []
        done = edgekd(*words, cwd=tmp_path, check=False)
        assert done.returncode == code, done.stderr
        outcomes = [gate["outcome"] for gate in json.loads(done.stdout)["gates"]]
        assert outcomes[0] == "passed" and outcomes[-1] == {0: "passed", 3: "failed", 4: "undecided"}[code]
        suite = ElementTree.parse(tmp_path / "run" / "junit.xml").getroot()
        assert suite.get("tests") == str(len(outcomes))


# the manifest


@pytest.fixture
def sent(built, tmp_path):
    """A copy of the build, as somebody else has it."""
    shutil.copytree(built[0] / "out", tmp_path / "sent")
    return tmp_path / "sent"


def ships(out):
    """The file for the CPU: INT8, or FP32 where that was measurably faster."""
    (path,) = (out / "artifacts" / "cpu").iterdir()
    return path


def test_a_build_is_as_it_was_left_until_a_file_changes(sent):
    assert edgekd("verify", sent, cwd=sent).stdout.endswith("all as they were\n")
    weights = next(sent.glob("steps/distill-kpn-*/kpn.safetensors"))
    for path in (sent / "report.html", weights, ships(sent)):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        done = edgekd("verify", sent, "--json", cwd=sent, check=False)
        (found,) = json.loads(done.stdout)["findings"]
        assert done.returncode == 1 and found["file"] == str(path.relative_to(sent)) and "changed" in found["what"]
        path.write_bytes(before)
    (sent / "report.md").unlink()
    assert "report.md: is gone" in edgekd("verify", sent, cwd=sent, check=False).stdout


def test_the_manifest_itself_cannot_be_rewritten_unseen(sent):
    """Who changes what it says must change what ships, too."""
    manifest = json.loads((sent / "manifest.json").read_text())
    manifest["provenance"]["gates"] = [{"outcome": "passed"}]
    (sent / "manifest.json").write_text(json.dumps(manifest))
    assert "is not what its hash was taken of" in edgekd("verify", sent, cwd=sent, check=False).stdout
    told = json.dumps(manifest["provenance"], sort_keys=True).encode()
    (sent / "manifest.json").write_text(json.dumps(manifest | {"sha256": hashlib.sha256(told).hexdigest()}))
    assert "is stamped with another manifest" in edgekd("verify", sent, cwd=sent, check=False).stdout


def test_what_ships_is_the_measured_file_with_the_hash_of_the_manifest(built):
    import onnx

    out = built[0] / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    path = ships(out)
    name = path.name.replace("-fp32", "")  # as the export calls it
    shipped, measured = onnx.load(path), onnx.load(next(out.glob(f"steps/*-kpn-*/{name}")))
    added = {p.key: p.value for p in shipped.metadata_props if p not in measured.metadata_props}
    assert added == {"edgekd.manifest": manifest["sha256"]} and shipped.graph == measured.graph
    origins = manifest["provenance"]["sources"]
    for name in ("train-images.npy", "test-labels.npy"):
        assert origins["data"][name] == hashlib.sha256(next(out.glob(f"steps/data-*/{name}")).read_bytes()).hexdigest()


def test_a_build_that_was_sent_without_its_steps_can_be_verified(sent):
    shutil.rmtree(sent / "steps")
    done = edgekd("verify", sent, cwd=sent)
    assert "not here, so not looked at: steps" in done.stdout and "all as they were" in done.stdout


def test_no_manifest_can_point_outside_of_its_build(sent):
    (sent.parent / "other").write_text("secret")
    manifest = json.loads((sent / "manifest.json").read_text())
    manifest["files"]["../other"] = hashlib.sha256(b"secret").hexdigest()
    (sent / "manifest.json").write_text(json.dumps(manifest))
    assert "../other: lies outside of the build" in edgekd("verify", sent, cwd=sent, check=False).stdout


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 99}', '{"schema": 1, "files": []}'])
def test_what_is_no_manifest_is_refused_in_words(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    done = edgekd("verify", tmp_path, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_what_was_put_beside_what_ships_is_found(sent):
    shutil.copyfile(ships(sent), sent / "artifacts" / "cpu" / "better.onnx")
    done = edgekd("verify", sent, cwd=sent, check=False)
    assert done.returncode == 1 and "artifacts/cpu/better.onnx: was not made by this build" in done.stdout
