"""A checkpoint of the user's own becomes one ONNX file, or none."""

import numpy as np
import pytest
from torch import nn

from edgekd.errors import ConfigError, ParityError
from edgekd.stages.export.checkpoint import export_checkpoint
from edgekd.stages.export.export import ExportConfig
from edgekd.training import checkpoint
from tests import zoo


@pytest.fixture
def given(tmp_path):
    checkpoint.save(zoo.Toy(), tmp_path / "toy.safetensors")
    images = np.random.default_rng(0).standard_normal((4, 1, 8, 8), np.float32)
    np.save(tmp_path / "images.npy", images)
    return "tests.zoo:Toy", tmp_path / "toy.safetensors", tmp_path / "images.npy", 3


def test_one_file_comes_out(given, tmp_path):
    made = export_checkpoint(tmp_path / "out" / "toy.onnx", *given, ExportConfig(), False)
    assert made.file.path == tmp_path / "out" / "toy.onnx" and made.input.shape == (1, 1, 8, 8)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["toy.onnx"]


def test_a_file_that_fails_parity_is_not_left_behind(given, tmp_path):
    broken = zoo.Toy()
    nn.init.constant_(broken.head.bias, float("nan"))  # equal to nothing, on any processor
    checkpoint.save(broken, tmp_path / "toy.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    (tmp_path / "toy.onnx").write_bytes(b"an older one")
    with pytest.raises(ParityError):
        export_checkpoint(tmp_path / "toy.onnx", *given, ExportConfig(), False)
    assert (tmp_path / "toy.onnx").read_bytes() == b"an older one"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "toy.onnx"])


def test_another_ending_is_refused(given, tmp_path):
    with pytest.raises(ConfigError, match="is no name for an ONNX file"):
        export_checkpoint(tmp_path / "toy.pt", *given, ExportConfig(), False)
