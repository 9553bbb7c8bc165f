"""What every plug-in promises; a new file in a plug-in folder is found here without being listed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.config import load_config
from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.dataset import SPLITS, Dataset
from edgekd.core.model import Model
from edgekd.core.quant_scheme import QuantScheme
from edgekd.core.target import Target
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.stages.quantize.calibration_set import collect_calibration_set
from edgekd.training import checkpoint

MODELS = {"python": {"function": "tests.zoo:Toy"}}  # settings that have no default
DENSE = {"unet", "scenes"}  # their answers are maps
EVERY = [(folder, name) for folder in plugins.FOLDERS for name in plugins.names(folder)]


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_every_plugin_says_what_it_is(folder, name):
    assert plugins.summary(folder, name).strip()


@pytest.mark.parametrize("name", plugins.names("models"))
def test_a_family_answers_logits_and_survives_its_checkpoint(name, tmp_path):
    family = serialization.from_json(Model, {"use": name, **MODELS.get(name, {})})
    torch.manual_seed(0)
    made, again = (family.build(classes=3, channels=1).eval() for _ in range(2))
    x = torch.randn(2, 1, 8, 8)
    checkpoint.save(made, tmp_path / "w.safetensors")
    checkpoint.load(again, tmp_path / "w.safetensors")
    with torch.no_grad():
        answer = made(x)
        assert answer.shape == ((2, 3, 8, 8) if name in DENSE else (2, 3)) and answer.dtype == torch.float32
        assert torch.equal(again(x), answer)


@pytest.fixture
def sources(tmp_path):
    """Settings that have no default."""
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for name in ("cat", "dog"):
            home = tmp_path / part / name
            home.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).save(home / f"{i}.png")
    return {"folder": {"root": str(tmp_path)}, "scenes": {"train": 6, "valid": 3, "test": 2}}


@pytest.mark.parametrize("name", plugins.names("data"))
def test_a_source_gives_three_disjoint_splits_of_all_classes(name, sources):
    source = serialization.from_json(Dataset, {"use": name, **sources.get(name, {})})
    content = source.read(None)
    splits = [getattr(content, split) for split in SPLITS]
    assert len({s.images.shape[1:] for s in splits}) == 1
    for split in splits:
        assert split.images.dtype == np.uint8 and split.images.ndim == 4
        assert len(split.images) == len(split.labels)
        if name in DENSE:
            height, width = split.images.shape[1:3]
            assert split.labels.dtype == np.float32
            assert split.labels.shape[1:] == (len(content.classes), height, width)
            continue
        assert split.labels.dtype == np.int64
        assert set(split.labels.tolist()) == set(range(len(content.classes)))
    seen = [{image.tobytes() for image in split.images} for split in splits]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert source.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("name", plugins.names("targets"))
def test_a_target_has_a_scheme_and_says_what_is_missing(name):
    target = serialization.from_json(Target, {"use": name})
    assert isinstance(target.scheme, QuantScheme)
    assert isinstance(target.unavailable_reason(), str)
    assert isinstance(target.runtime, str)


def test_the_calibration_set_that_ships_is_what_the_recipe_makes(tmp_path):
    config = load_config("digits", (), (), False)
    task = prepare_dataset(tmp_path, config.data, None)
    made = collect_calibration_set(tmp_path, task, config.calibration, "digits")
    shipped = Path(__file__).parent.parent / "calib_data" / "digits"
    old, new = (json.loads((home / "manifest.json").read_text()) for home in (shipped, made.manifest.path.parent))
    assert old["indices"] == new["indices"] and old["split"] == "train"
    with np.load(shipped / "images.npz") as before, np.load(made.images.path) as after:
        assert np.allclose(before["image"], after["image"], atol=1e-5)
    assert File.of(shipped / "images.npz").sha256 == old["file"]["sha256"]
