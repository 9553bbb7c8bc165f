"""Regression of maps, such as depth: from the data set to the report."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from edgekd.config import load_config
from edgekd.core.augment import Augment
from edgekd.core.bench_result import Samples
from edgekd.core.task import OutputSpec
from edgekd.data.scenes import FOCAL, Scenes, directions, scene, sphere
from edgekd.errors import ConfigError, DataError
from edgekd.models.unet import UNetModel
from edgekd.pipelines.build import build
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression

NAN = float("nan")


class Level:
    """A random number generator that never tilts the camera."""

    def uniform(self, low, high):
        return low


def test_depth_is_the_distance_along_the_optical_axis():
    rays = directions(Level(), 4, 6)
    assert np.allclose(rays[..., 2], 1)
    assert np.allclose(rays[0, 0], [-2.5 / (6 * FOCAL), -1.5 / (6 * FOCAL), 1])
    straight = np.array([[[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]])
    assert sphere(straight, np.array([0.0, 0.0, 4.0]), 1.5).tolist() == [[2.5, np.inf]]


def test_a_scene_is_the_same_from_the_same_seed_and_has_dropouts():
    (a, depth), (b, _) = (scene(np.random.default_rng(7), 24, 40) for _ in range(2))
    assert np.array_equal(a, b) and a.shape == (24, 40, 3) and depth.shape == (24, 40)
    assert 0 < np.isnan(depth).mean() < 0.1 and np.nanmin(depth) > 0


def some_samples(maps, targets):
    maps, targets = (np.array(v, np.float32).reshape(1, 1, 1, -1) for v in (maps, targets))
    return Samples(np.zeros(0), np.zeros(0), (maps,), (maps + 0.5,), targets)


def test_metrics_of_maps_by_hand():
    samples = some_samples([1.0, 2.0, 4.0, 9.0], [1.2, 2.0, 2.0, NAN])
    values = {name: metric.compute(samples) for name, metric in Regression().metrics().items()}
    expected = {"delta1": 200 / 3, "rmse": np.sqrt((0.2**2 + 2**2) / 3), "mae_vs_fp32": 0.5}
    assert values == pytest.approx(expected, rel=1e-5)


def test_losses_of_maps_by_hand():
    maps, targets = torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[3.0, NAN]]]])
    assert Regression().loss(maps, targets).item() == 2.0
    assert Regression().distill_loss(maps, maps + 2, 4.0).item() == 2.0


def test_a_mirrored_image_has_a_mirrored_map_and_no_depth_comes_in_from_outside():
    images = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4, 1).expand(60, 3, 4, 1)
    targets = images.permute(0, 3, 1, 2).float() + 1
    moved, maps = Regression().transform(images, targets, Augment(crop=1, flip=True), np.random.default_rng(0))
    known = ~maps.isnan()
    assert torch.equal(maps[known], moved.permute(0, 3, 1, 2).float()[known] + 1)
    assert 0 < known.float().mean() < 1 and len({tuple(m.flatten().tolist()) for m in moved}) == 18


def test_the_answer_has_the_size_of_the_image():
    for height, width in ((12, 20), (13, 19)):
        assert UNetModel(4, 2).build(3, 1)(torch.randn(2, 1, height, width)).shape == (2, 3, height, width)


def test_a_regression_is_built_to_the_report(tmp_path):
    config = load_config("depth", ("teacher.model.width=8", "data.height=16", "data.width=24"), (), True)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, labels_per_class=6, unlabelled=8))
    record = build(config, tmp_path / "out", tmp_path / "calib", "")
    assert record.data.student_train == 6
    teacher, student, int8, alone = record.benches[0].measurements
    assert all({"delta1", "rmse", "p50_ms"} <= set(m.metrics) for m in (teacher, student, int8, alone))
    assert "top1" not in int8.metrics
    html = (tmp_path / "out" / "report.html").read_text()
    assert "delta1" in html and "top-1" not in html
    manifest = json.loads((tmp_path / "calib" / config.name / "manifest.json").read_text())
    assert manifest["per_class"] == {}


def test_a_data_set_says_its_task(tmp_path):
    dataset = prepare_dataset(tmp_path, Scenes(16, 24, 4, 2, 2), None)
    assert dataset.task == Regression() and dataset.outputs() == (OutputSpec("logits", (1, 16, 24)),)
    with pytest.raises(DataError, match="class numbers"):
        prepare_dataset(tmp_path, Scenes(16, 24, 4, 2, 2), None, task=Classification())


def test_scenes_too_small_to_show_anything_are_refused():
    with pytest.raises(ConfigError, match="height is 4"):
        Scenes(height=4)
