"""Nothing in the pipeline assumes class logits: answers may be a number for every pixel."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from edgekd.config import configured
from edgekd.core import plugins
from edgekd.core.bench_result import Trial
from edgekd.data.scenes import FOCAL, Scenes, directions, scene, sphere
from edgekd.errors import ConfigError
from edgekd.models.unet import UNetModel
from edgekd.pipelines.build import build
from edgekd.stages.distill.dataset import prepare
from edgekd.training.losses import imitation, supervised

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


def a_trial(answer, truth):
    maps = [np.array(v, np.float32).reshape(1, 1, 1, -1) for v in (answer, truth)]
    return Trial(np.zeros(0), np.zeros(0), maps[0], maps[0] + 0.5, maps[1])


def test_metrics_of_maps_by_hand():
    trial = a_trial([1.0, 2.0, 4.0, 9.0], [1.2, 2.0, 2.0, NAN])
    said = {name: plugins.load("metrics", name)()(trial) for name in ("delta1", "rmse", "deviation")}
    assert said == pytest.approx({"delta1": 200 / 3, "rmse": np.sqrt((0.2**2 + 2**2) / 3), "deviation": 0.5}, rel=1e-5)


def test_pixels_and_samples_without_a_label_say_nothing():
    answer, truth = torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[3.0, NAN]]]])
    assert supervised(answer, truth).item() == 2.0
    assert supervised(answer, torch.full_like(truth, NAN)).item() == 0.0
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert supervised(logits, torch.tensor([1, -1])).item() == pytest.approx(np.log(1 + np.exp(-1)))
    assert supervised(logits, torch.tensor([-1, -1])).item() == 0.0
    assert imitation(answer, answer + 2, 4.0).item() == 2.0


def test_the_answer_has_the_size_of_the_image():
    for height, width in ((12, 20), (13, 19)):
        assert UNetModel(4, 2).build(3, 1)(torch.randn(2, 1, height, width)).shape == (2, 3, height, width)


def test_a_dense_task_is_built_to_the_report(tmp_path):
    config = configured("depth", ("teacher.model.width=8", "data.height=16", "data.width=24"), (), True)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, labels_per_class=6, unlabelled=8))
    record = build(config, tmp_path / "out", tmp_path / "calib", "")
    assert record.data.student_train == 6
    teacher, student, int8, alone = record.benches[0].measurements
    assert all({"delta1", "rmse", "p50_ms"} <= set(m.readings) for m in (teacher, student, int8, alone))
    assert "top1" not in int8.readings
    html = (tmp_path / "out" / "report.html").read_text()
    assert "delta1" in html and "top-1" not in html
    manifest = json.loads((tmp_path / "calib" / config.name / "manifest.json").read_text())
    assert manifest["per_class"] == {}


def test_a_task_with_maps_for_labels_is_dense(tmp_path):
    task = prepare(tmp_path, Scenes(16, 24, 4, 2, 2), None)
    assert task.dense and task.answer(2) == (2, 1, 16, 24)


def test_scenes_too_small_to_show_anything_are_refused():
    with pytest.raises(ConfigError, match="height is 4"):
        Scenes(height=4)
