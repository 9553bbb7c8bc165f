"""Layers that are named or found: what is said where there are none, or none that fit."""

import pytest
import torch
from torch import nn

from edgekd.core.plugins import MAX_SHOWN, unknown_name
from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.layer_matching import match_layers, match_named_layers
from tests import zoo

X = torch.randn(2, 1, 8, 8)


def test_a_layer_that_does_not_exist_is_said_to_be_the_teachers_or_the_students():
    teacher, student = zoo.Toy(8).eval(), zoo.Toy(4).eval()
    for route, whose in ((("stage9", "stage2"), "teacher"), (("stage2", "stage9"), "student")):
        with pytest.raises(ConfigError, match=rf"^the {whose} \(Toy\) has no layer `stage9`") as error:
            match_named_layers(teacher, student, *route, X)
        assert "did you mean `stage3`, `stage2` or `stage1`? known: stage1, stage1.0" in error.value.hint
    for route, whose in ((("head", "stage2"), "teacher"), (("stage2", "head"), "student")):
        with pytest.raises(ConfigError, match=f"layer `head` of the {whose} gives no"):
            match_named_layers(teacher, student, *route, X)
    with pytest.raises(ConfigError, match="^Toy has no layer `stage9`"):
        FeatureExtractor(student, "stage9")


def test_of_many_known_names_the_nearest_and_the_first_are_shown():
    known = [f"layers.{n}.conv" for n in range(300)]
    hint = unknown_name("there is none", "layers.299.cnv", known).hint
    assert hint.startswith("did you mean `layers.299.conv`, ") and len(hint) < 500
    assert hint.endswith(f"layers.{MAX_SHOWN - 1}.conv, and {300 - MAX_SHOWN} more")
    assert unknown_name("there is none", "x", ["one", "two"]).hint == "known: one, two"


def test_layers_of_equal_size_that_see_too_differently_are_told_with_the_tolerance_that_suits():
    teacher = zoo.Toy().eval()  # 2 pixels at 8x8, 4 and 8 at 4x4
    student = nn.Sequential(
        nn.Conv2d(1, 4, 5, 1, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(64, 3)
    )
    with pytest.raises(ConfigError, match=r"differ by more than 0\.2 ") as error:
        match_layers(teacher, student.eval(), X, 0.2)
    assert "(teacher's, student's, in pixels: stage3.1 8, 2 6; stage1.1 2, 0 4)" in error.value.what
    assert "set receptive_tolerance to 0.25 or more" in error.value.hint
    assert [c.name for c in match_layers(teacher, student, X, 0.25)] == ["stage3.1>2"]
    with pytest.raises(ConfigError, match=r"no layer of the student has the size .*teacher: 4x4, 8x8; student: 5x5"):
        match_layers(teacher, nn.Sequential(nn.Conv2d(1, 4, 4), nn.Flatten(), nn.Linear(100, 3)).eval(), X, 0.2)
