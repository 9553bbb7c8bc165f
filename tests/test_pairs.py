"""Every method meets networks of different families and images of other shapes: it learns, or it refuses in words.

New files in methods/ are found by themselves.
"""

import dataclasses

import pytest
import torch

from edgekd.core import plugins
from edgekd.core.method import Batch, TrainingContext
from edgekd.errors import EdgekdError
from edgekd.methods.kd import KD
from edgekd.models.imagenet_resnet import ImagenetResNetModel
from edgekd.models.mobilenet_v2 import MobileNetV2Model
from edgekd.models.mobilenet_v3 import MobileNetV3Model
from edgekd.models.resnet import ResNet
from edgekd.models.shufflenet import ShuffleNetModel
from edgekd.models.vgg import VGGModel
from edgekd.models.wide_resnet import WideResNetModel
from edgekd.tasks.classification import Classification
from edgekd.training.trainer import freeze
from tests import zoo

SETTINGS = {
    "assistant": {"assistants": (ResNet(8, 2),)},
    "kpn": {"receptive_tolerance": 0.5},
}  # where a method cannot do with its defaults
# Nothing to start from in another family; nothing to skip without repeated blocks; one teacher. All others learn.
REFUSES = {"fine_tune", "depth_dynamic", "multi_teacher"}
SQUARE, SPECTROGRAM, PHOTO = (1, 16, 16), (1, 40, 100), (3, 224, 224)
CASES = {
    "resnet to mobilenet_v2": (ResNet(8, 4), MobileNetV2Model(0.1, 0.1, 2), SQUARE),
    "vgg to shufflenet": (VGGModel((4, 8, 8), (1, 1, 1)), ShuffleNetModel((4, 8, 8, 8, 8), (1, 3, 1), 3), SPECTROGRAM),
    "wide_resnet to mobilenet_v3": (WideResNetModel(10, 0.25), MobileNetV3Model(0.1, 0.1, 3), SPECTROGRAM),
    "imagenet_resnet to vgg": (ImagenetResNetModel(18, 0.1, 5), VGGModel((4,) * 6, (1,) * 6), PHOTO),
}


def a_method(name):
    cls = plugins.load("methods", name)
    nested = {f.name: KD() for f in dataclasses.fields(cls) if f.type == "Method"}
    return cls(**nested, **SETTINGS.get(name, {}))


def a_context(name, teacher, student, shape, home):
    """One batch of images, and networks with random weights."""
    torch.manual_seed(0)
    count = 3 if shape == PHOTO else 4
    batch = Batch(torch.randn(count, *shape), torch.arange(count) % zoo.CLASSES, torch.arange(count), 0.5)
    teachers = 2 if name == "multi_teacher" and shape == SQUARE else 1
    lesson = TrainingContext(
        student.build(zoo.CLASSES, shape[0]),
        tuple(teacher.build(zoo.CLASSES, shape[0]) for _ in range(teachers)),
        10,
        zoo.CLASSES,
        lambda _: iter([batch]),
        Classification(),
        build=lambda family: family.build(zoo.CLASSES, shape[0]),
        quant_spec=lambda network: zoo.drafted(home, network, inputs=batch.images.numpy()),
    )
    freeze(lesson)
    return lesson


@pytest.mark.parametrize("name", plugins.names("methods"))
@pytest.mark.parametrize("case", CASES)
def test_a_method_learns_from_another_family_or_refuses_in_words(name, case, tmp_path):
    lesson = a_context(name, *CASES[case], tmp_path)
    try:
        phase = next(a_method(name).phases(lesson))
    except EdgekdError as error:
        assert error.hint and name in REFUSES, error
        return
    for module in phase.trains:
        module.train().requires_grad_(True)
    losses = phase.loss(next(lesson.first_batches(1)))
    total = torch.stack([value.float() for value in losses.values()]).sum()
    total.backward()
    gradients = [p.grad for module in phase.trains for p in module.parameters() if p.grad is not None]
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients), "nothing learns"
