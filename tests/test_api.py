"""The Python API: live networks and arrays go in, networks and files come out; nothing else is needed."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekd
from edgekd.errors import DataError
from tests.test_pipeline import edgekd as command

ROOT = Path(__file__).parent.parent
NINE = ("distill", "export", "quantize", "benchmark", "explain", "lint", "compare", "build", "load_config")


def net(width=4):
    torch.manual_seed(width)
    layers = (nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 2))


def samples(count=64, kind=np.float32):
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    images = random.normal(0, 0.3, (count, 1, 8, 8)) + labels[:, None, None, None]
    if kind == np.uint8:
        return np.clip(80 * images.transpose(0, 2, 3, 1) + 60, 0, 255).astype(np.uint8), labels
    return images.astype(np.float32), labels


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        images, labels = samples()
        return torch.from_numpy(images[index]), int(labels[index])


def test_all_that_is_offered_is_there_with_a_docstring():
    for name in edgekd.__all__:
        assert getattr(edgekd, name) is not None
    assert all(inspect.getdoc(getattr(edgekd, name)) for name in NINE)
    assert edgekd.methods.KD(temperature=2).temperature == 2
    assert isinstance(edgekd.models.ResNet(depth=8, width=4).build(10, 1), nn.Module)
    with pytest.raises(AttributeError):
        edgekd.methods.Nothing  # noqa: B018
    with pytest.raises(AttributeError):
        edgekd.nothing  # noqa: B018


def test_importing_edgekd_imports_next_to_nothing():
    code = "import edgekd, sys; assert not {'numpy', 'torch', 'pydantic', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("data", [samples(), samples(kind=np.uint8), Pairs()], ids=["float32", "uint8", "Dataset"])
def test_live_networks_distil_from_data_in_memory(data):
    student, teacher = net(), net(8)
    before = [tensor.clone() for tensor in (*student.state_dict().values(), *teacher.state_dict().values())]
    result = edgekd.distill(student, teacher, train=data, epochs=8, config=None)
    after = [*student.state_dict().values(), *teacher.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the user's networks stay as they are"
    assert type(result.network) is nn.Sequential and not torch.equal(result.network[0].weight, student[0].weight)
    assert result.valid_accuracy is not None and "validation accuracy" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["phases"][0]["epochs"] == 8


def test_without_a_teacher_it_is_supervised_and_training_starts_from_the_weights_of_the_student():
    images, labels = samples()
    trained = edgekd.distill(net(), train=(images, labels), epochs=12)
    assert trained.valid_accuracy == 1.0
    again = edgekd.distill(trained.network, train=(images, labels), epochs=1)
    assert again.valid_accuracy >= 0.5


def test_data_that_do_not_fit_are_refused():
    images, labels = samples()
    with pytest.raises(DataError, match="targets"):
        edgekd.distill(net(), train=(images, labels[:-1]), epochs=1)
    with pytest.raises(DataError, match="valid"):
        edgekd.distill(net(), train=(images, labels), valid=(images[:, :, :4], labels), epochs=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("files")
    images, _ = samples()
    fp32 = edgekd.export(edgekd.distill(net(), net(8), train=samples(), epochs=2), home / "s.onnx", images=images)
    return fp32, edgekd.quantize(fp32, home / "s.int8.onnx", calibration=images, target="cpu")


def test_files_go_from_function_to_function_and_print_as_the_command_does(files, tmp_path):
    images, labels = samples()
    fp32, int8 = files
    assert Path(fp32).is_file() and int8.path.name == "s.int8.onnx"
    assert int8.to_dict()["precision"] == "int8" and "int8" in str(int8)
    bench = edgekd.benchmark([fp32, int8], images=images, labels=labels, smoke=True)
    rows = {m["model"]["name"]: m["metrics"] for m in json.loads(json.dumps(bench.to_dict()))["measurements"]}
    assert rows["s.int8.onnx"]["p50_ms"] > 0 and "top1" in rows["s.onnx"]
    assert "A/A control" in str(bench)
    explanation = edgekd.explain(int8, fp32, images=images)
    assert explanation.to_dict()["agreement"] is not None and str(explanation)
    verdict = edgekd.lint(fp32, "6.2")
    done = command("lint", fp32.path, "--jetpack", "6.2", cwd=tmp_path, check=False)
    assert done.stdout == f"{verdict}\n"


def test_configurations_are_loaded_with_overrides():
    config = edgekd.load_config("digits", {"student.epochs": 3, "targets": [{"use": "cpu", "threads": 2}]})
    assert config.student.epochs == 3 and config.targets[0].threads == 2
    assert edgekd.load_config("digits", ["student.epochs=3"], smoke=True).name == "digits-smoke"
    with pytest.raises(edgekd.EdgekdError, match="epochs"):
        edgekd.load_config("digits", {"student.epoch": 3})


TINY = ["teacher.model.width=4", "student.baselines=[]", "student.epochs=1", "images_per_class=10"]


@pytest.mark.slow
def test_a_build_from_python_is_that_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = edgekd.load_config("digits", [*TINY, "student.method={use: kd}"], smoke=True)
    result = edgekd.build(config, out="out")
    assert result.selected["cpu"].path.is_file() and result.report.is_file() and result.exit_code == 0
    assert json.loads(json.dumps(result.to_dict()))["name"] == "digits-smoke"
    assert "<html" in result._repr_html_() and "speed-up" in str(result)
    again = edgekd.build(config, out="out")
    assert again == result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "own_network"])
def test_the_examples_run(name, tmp_path):
    words = [sys.executable, ROOT / "examples" / f"{name}.py", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "validation accuracy" in done.stdout and not list(tmp_path.iterdir())
