"""The bundle: whole, the same bytes every time, refused by name where a device would refuse it, and it runs."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from sklearn.datasets import load_digits
from torch import nn

from edgekd.core.artifact import File
from edgekd.core.step_cache import StepCache
from edgekd.errors import ConfigError, ModelError, StaleArtifact
from edgekd.onnx import inspect
from edgekd.stages.bench.config import BenchConfig
from edgekd.stages.device.bundle import BundleConfig, BundleModel, BundleRequest, copy_bundle, write_bundle
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.quantize import Int8Options, write_int8_files
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate_step
from edgekd.targets.cpu import Cpu
from edgekd.targets.jetson import Jetson
from edgekd.targets.tensorrt import TensorRt
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from tests import zoo

USUAL = BundleConfig()
QUICK = BenchConfig(rounds=3, calls_per_round=4, warmup_s=0.0, metrics=("p50_ms",))
ORIN = Jetson()
THOR = Jetson(jetpack="7.0", board="thor")
DLA = Jetson(jetpack="5.1", board="agx-orin", dla=True)


class Net(nn.Module):
    """A residual block; (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.branch = self.conv(1, width), self.conv(width, width)
        self.down, self.head = self.conv(width, 2 * width, 2), nn.Linear(2 * width * 16, 10)

    def conv(self, entering, leaving, stride=1):
        return nn.Sequential(nn.Conv2d(entering, leaving, 3, stride, 1, bias=False), nn.BatchNorm2d(leaving))

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.branch(x)).relu()
        return self.head(self.down(x).relu().flatten(1))


@pytest.fixture(scope="module")
def digits():
    """Network inputs and labels, training and test data."""
    data = load_digits()
    images = ((data.images[:, None] - 4.9) / 6.0).astype(np.float32)
    return images[:1200], data.target[:1200], images[1200:], data.target[1200:]


@pytest.fixture(scope="module")
def network(digits):
    torch.manual_seed(0)
    net, (images, labels) = Net(), (torch.from_numpy(a) for a in digits[:2])
    optimiser = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for _ in range(4):
        for part in torch.randperm(len(images)).split(48):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[part]), labels[part]).backward()
            optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def files(digits, tmp_path_factory):
    home = tmp_path_factory.mktemp("files")
    np.savez(home / "calib.npz", image=digits[0][:64])
    np.save(home / "inputs.npy", digits[2])
    np.save(home / "labels.npy", digits[3])
    return [File.of(home / name) for name in ("calib.npz", "inputs.npy", "labels.npy")]


@pytest.fixture(scope="module")
def sent(network, digits, files, tmp_path_factory):
    """The network as a teacher and as a student, by target."""
    exported, ranges, made = {}, {}, {}
    for target in (Cpu(), ORIN, THOR, DLA):
        out = tmp_path_factory.mktemp("sent")
        asked = min(20, target.deployment_plan.opset or 20)
        if asked not in exported:
            exported[asked] = export(out, "net", network, digits[0][:16], zoo.logits(10), ExportConfig(opset=asked))
            ranges[asked] = calibrate_step(out, exported[asked], files[0], QuantizeConfig())
        fp32, int8 = exported[asked].single, None
        if target.scheme.format != "calibration_cache":
            int8 = write_int8_files(out, exported[asked], files[0], ranges[asked], Int8Options(target.scheme)).single
        teacher = BundleModel("teacher", "teacher", "supervised", True, fp32)
        made[target] = (teacher, BundleModel("net", "student", "any", True, fp32, int8, ranges[asked]))
    return made


def make(out, target, networks, files, config=USUAL, **changes):
    out.mkdir(parents=True, exist_ok=True)
    request = BundleRequest("digits", "it", target, networks, *files, Classification(), config, QUICK)
    return write_bundle(out, replace(request, **changes))


@pytest.fixture(scope="module")
def made(sent, files, tmp_path_factory):
    """A bundle for each target."""
    return {t: make(tmp_path_factory.mktemp("bundle"), t, networks, files) for t, networks in sent.items()}


def answers(path, images):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    return np.concatenate([session.run(None, {"image": x[None]})[0] for x in images])


def everything(folder):
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


def test_the_manifest_names_every_file_with_its_hash(made):
    for one in made.values():
        listed = one.read()["files"]
        found = {name: hashlib.sha256(content).hexdigest() for name, (content, _) in everything(one.folder).items()}
        del found["manifest.json"]
        assert {name: facts["sha256"] for name, facts in listed.items()} == found
        assert all((one.folder / name).stat().st_size == facts["bytes"] for name, facts in listed.items())
        assert str(one.folder) not in one.manifest.path.read_text()


def test_the_manifest_says_what_the_runner_needs(made):
    told = made[Cpu()].read()
    assert (told["schema"], told["name"], told["target"], told["runtime"], told["threads"]) == (
        2, "digits", "it", "onnxruntime", 1)  # fmt: skip
    assert (told["jetpack"], told["board"], told["tensorrt"]) == (None, None, None)
    assert told["protocol"]["rounds"] == 3 and told["protocol"]["warmup_calls"] > 0
    assert [(e["name"], e["role"], e["model"], e["precisions"]) for e in told["engines"]] == [
        ("teacher fp32", "teacher", "models/teacher-fp32.onnx", ["fp32"]),
        ("net fp32", "student", "models/net-fp32.onnx", ["fp32"]),
        ("net int8", "student", "models/net-int8.onnx", ["int8"]),
    ]
    assert all(
        e["agreement"] >= 98 and e["macs"] > 0 and e["parameters"] > 0 and e["predicts_labels"] for e in told["engines"]
    )


def test_inputs_are_test_images_of_all_classes_with_their_labels(made, digits):
    folder = made[Cpu()].folder
    inputs, labels = np.load(folder / "inputs.npy"), np.load(folder / "labels.npy")
    assert inputs.dtype == np.float32 and len(inputs) == len(labels) == len(digits[2])
    where = {image.tobytes(): label for image, label in zip(digits[2], digits[3], strict=True)}
    assert all(where[image.tobytes()] == label for image, label in zip(inputs, labels, strict=True))
    assert set(labels[:64]) == set(range(10))


def test_fewer_images_are_asked_for_fewer(sent, files, tmp_path):
    one = make(tmp_path, Cpu(), sent[Cpu()], files, BundleConfig(images=20, verify_images=8))
    assert len(np.load(tmp_path / "inputs.npy")) == len(np.load(tmp_path / "labels.npy")) == 20
    assert one.read()["verify_images"] == 8 and np.load(tmp_path / "expected/net-int8.npy").shape == (8, 10)
    with pytest.raises(ConfigError, match="bundle.verify_images is 9, bundle.images 8"):
        BundleConfig(images=8, verify_images=9)


def test_expected_answers_are_those_of_the_file_without_optimisation(made):
    for one in made.values():
        told, inputs = one.read(), np.load(one.folder / "inputs.npy")
        for engine in told["engines"]:
            expected = np.load(one.folder / engine["expected"])
            assert expected.dtype == np.float32 and len(expected) == told["verify_images"] == 256
            assert np.array_equal(expected, answers(one.folder / engine["model"], inputs[:256]))


def test_int8_and_fp16_files_are_as_accurate_as_the_network(made):
    for target in (Cpu(), ORIN, THOR):
        folder = made[target].folder
        labels = np.load(folder / "labels.npy")[:256]
        right = {e["name"]: 100 * (np.load(folder / e["expected"]).argmax(1) == labels).mean()
                 for e in made[target].read()["engines"]}  # fmt: skip
        assert right["net fp32"] > 85
        assert all(abs(share - right["net fp32"]) <= 2 for share in right.values()), right


def test_strongly_typed_engines_have_their_precision_in_the_file(made):
    engines = {e["name"]: e for e in made[THOR].read()["engines"]}
    assert {name: e["model"] for name, e in engines.items()} == {
        "teacher fp32": "models/teacher-fp32.onnx", "teacher fp16": "models/teacher-fp16.onnx",
        "net fp32": "models/net-fp32.onnx", "net fp16": "models/net-fp16.onnx", "net int8": "models/net-int8.onnx",
    }  # fmt: skip
    assert all(e["typed"] for e in engines.values()) and engines["net int8"]["precisions"] == ["int8", "fp16"]
    for name in ("net fp16", "net int8"):
        model = onnx.load(made[THOR].folder / engines[name]["model"])
        kinds = {t.data_type for t in model.graph.initializer if len(t.dims) > 1}
        assert kinds == {TensorProto.FLOAT16}
    assert "QuantizeLinear" in inspect.facts(made[THOR].folder / "models/net-int8.onnx").nodes


def test_where_flags_choose_the_precision_one_file_serves_fp32_and_fp16(made):
    engines = made[ORIN].read()["engines"]
    assert [(e["model"], e["precisions"], e["typed"]) for e in engines if e["role"] == "student"] == [
        ("models/net-fp32.onnx", ["fp32"], False),
        ("models/net-fp32.onnx", ["fp16"], False),
        ("models/net-int8.onnx", ["int8", "fp16"], False),
    ]


def test_a_dla_gets_the_float_file_and_a_cache_for_its_tensorrt(made):
    engines = {e["name"]: e for e in made[DLA].read()["engines"]}
    assert set(engines) == {"teacher fp16", "net fp16", "net int8"}
    int8 = engines["net int8"]
    assert (int8["model"], int8["cache"], int8["dla"]) == ("models/net-fp32.onnx", "models/net.cache", 0)
    cache = (made[DLA].folder / int8["cache"]).read_text().splitlines()
    assert cache[0] == "TRT-8502-EntropyCalibration2"
    outputs = [n.output[0] for n in onnx.load(made[DLA].folder / int8["model"]).graph.node]
    assert {line.partition(": ")[0] for line in cache[1:]} == {"image", *outputs}


def test_a_baseline_is_built_once_and_a_teacher_of_other_classes_is_marked(sent, files, tmp_path):
    teacher, student = sent[THOR]
    networks = (replace(teacher, predicts_labels=False), replace(student, name="other", role="baseline"), student)
    engines = make(tmp_path, THOR, networks, files).read()["engines"]
    assert [e["name"] for e in engines if e["role"] == "baseline"] == ["other fp32"]
    assert [e["predicts_labels"] for e in engines if e["role"] == "teacher"] == [False, False]


def test_answers_that_are_no_classes_are_not_judged_by_classes(sent, files, tmp_path):
    np.save(tmp_path / "maps.npy", np.zeros((len(np.load(files[1].path)), 10, 8, 8), np.float32))
    one = make(tmp_path / "b", Cpu(), sent[Cpu()], files, labels=File.of(tmp_path / "maps.npy"), task=Regression())
    assert {e["agreement"] for e in one.read()["engines"]} == {0.0}


def test_the_same_build_twice_gives_the_same_bytes(made, sent, files, tmp_path):
    for target, one in made.items():
        again = make(tmp_path / target.runtime / target.label, target, sent[target], files)
        assert everything(again.folder) == everything(one.folder)


def test_what_an_interruption_left_does_not_get_into_a_bundle(sent, files, made, tmp_path):
    for half in ("models/net-fp32.onnx", "expected/net-int8.npy"):
        (tmp_path / half).parent.mkdir(parents=True)
        (tmp_path / half).write_bytes(b"half")
    make(tmp_path, Cpu(), sent[Cpu()], files)
    assert everything(tmp_path) == everything(made[Cpu()].folder)


def test_a_bundle_is_put_in_place_and_results_stay(made, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "result.json").write_text("measured")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "old.onnx").write_text("of another build")
    for _ in range(2):
        copy_bundle(made[Cpu()], tmp_path)
    found = everything(tmp_path)
    assert found.pop("results/result.json")[0] == b"measured"
    assert found == everything(made[Cpu()].folder)


def test_a_bundle_is_a_step_of_the_ledger_and_a_changed_file_is_refused(sent, files, tmp_path):
    cache = StepCache(tmp_path / "steps")
    request = BundleRequest("digits", "it", Cpu(), sent[Cpu()], *files, Classification(), BundleConfig(), QUICK)
    made = cache.step("bundle", write_bundle, request)
    copy_bundle(made, tmp_path / "out")
    assert "step.json" not in everything(tmp_path / "out")
    (made.folder / "models/net-int8.onnx").write_bytes(b"other")
    with pytest.raises(StaleArtifact, match="net-int8.onnx` changed since it was recorded"):
        copy_bundle(made, tmp_path / "out")


# what stops it


def foreign(path, nodes, shape=(1, 1, 8, 8), opset=13):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("image", shape), ("y", None))]
    graph = helper.make_graph(nodes, "foreign", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), path)
    return BundleModel("odd", "student", "any", True, inspect.describe(path, "odd", 1))


def test_an_operator_that_tensorrt_lacks_stops_the_bundle_by_the_name_of_its_node(files, tmp_path):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["image"], ["q", "s", "z"], "squeeze"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "back"),
    ]
    nano = Jetson(jetpack="4.6", board="nano")
    with pytest.raises(ModelError, match="squeeze: no TensorRT has the operator DynamicQuantizeLinear"):
        make(tmp_path / "b", nano, (foreign(tmp_path / "odd.onnx", nodes),), files)


def test_an_opset_that_tensorrt_does_not_read_stops_the_bundle(files, tmp_path):
    odd = foreign(tmp_path / "odd.onnx", [helper.make_node("Relu", ["image"], ["y"], "relu")], opset=14)
    with pytest.raises(ModelError, match="opset 14; TensorRT 8.2.1 reads 7 to 13"):
        make(tmp_path / "b", Jetson(jetpack="4.6", board="nano"), (odd,), files)


def test_a_size_that_is_not_fixed_stops_the_bundle(files, tmp_path):
    odd = foreign(tmp_path / "odd.onnx", [helper.make_node("Relu", ["image"], ["y"], "relu")], ("n", 1, 8, "w"))
    for target in (Cpu(), TensorRt()):
        with pytest.raises(ModelError, match=r"odd.onnx` has 2 dimensions without a size, as \(0, 1, 8, 0\)"):
            make(tmp_path / target.runtime, target, (odd,), files)


# what it says, and that it runs


def test_the_readme_says_what_to_type_why_and_what_was_never_measured(made):
    for target, one in made.items():
        text = (one.folder / "README.md").read_text()
        assert "\n    sh run.sh\n" in text and "edgekd import-result results/result.json" in text
        assert all(sentence[1:] in text for sentence in target.deployment_plan.why)
        assert ("no TensorRT ran" in text) == (target.runtime == "tensorrt")
        assert ("--lock-clocks" in text) == (target.deployment_plan.jetpack is not None)


def test_one_command_runs_it_from_anywhere_and_again(made, tmp_path):
    folder = copy_bundle(made[Cpu()], tmp_path / "a bundle")
    environment = os.environ | {"PYTHON": sys.executable}
    for _ in range(2):
        done = subprocess.run(["sh", str(folder / "run.sh")], capture_output=True, text=True, check=False,
                              env=environment, cwd=Path("/"))  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "results" / "result.json").read_text())
    assert result["bundle"] == made[Cpu()].manifest.sha256
    assert all(result[part] for part in ("doctor", "build", "verify", "bench"))
