"""A network that its method shortened or widened is built again from its weights."""

import pytest
import torch
from torch import nn

from edgekd.errors import ModelError
from edgekd.models.resnet import ResNet
from edgekd.training.architecture_diff import ArchitectureDiff, apply_diff, diff_architectures


def test_an_unchanged_network_needs_no_surgery():
    assert diff_architectures(ResNet(8, 4).build(3, 1), ResNet(8, 4).build(3, 1)) == ArchitectureDiff()


def test_a_shortened_and_widened_network_is_built_again():
    built, made = ResNet(20, 4).build(3, 1), ResNet(20, 4).build(3, 1)
    del made.stage2[1:]
    block = made.stage1[0]
    block.conv1, block.bn1 = nn.Conv2d(4, 7, 3, 1, 1, bias=False), nn.BatchNorm2d(7)
    block.conv2 = nn.Conv2d(7, 4, 3, 1, 1, bias=False)
    surgery = diff_architectures(built, made)
    assert surgery.lengths == {"stage2": 1}
    assert surgery.channels == {"stage1.0.conv1": (4, 7), "stage1.0.bn1": (7, 7), "stage1.0.conv2": (7, 4)}
    again = apply_diff(built, surgery)
    again.load_state_dict(made.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(x), made.eval()(x))
    assert len(built.stage2) == 3, "what is operated on is a copy"


def test_a_widened_depthwise_convolution_keeps_its_form():
    def net(width):
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, 2, 1, 1, width), nn.Conv2d(width, 2, 1))

    again = apply_diff(net(4), diff_architectures(net(4), net(6)))
    assert (again[1].groups, again[1].stride, again[1].padding) == (6, (2, 2), (1, 1))


def test_other_changes_are_refused():
    made = ResNet(8, 4).build(3, 1)
    made.extra = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="cannot be rebuilt from its family: extra.bias, extra.weight differ"):
        diff_architectures(ResNet(8, 4).build(3, 1), made)
