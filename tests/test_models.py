"""Families of networks: as large as published, for images of any shape, with layers to tap, exported and in INT8."""

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.core import plugins, serialization
from edgekd.core.artifact import File
from edgekd.core.model import Model
from edgekd.errors import ConfigError
from edgekd.models._blocks import Add, InvertedResidual, init_weights
from edgekd.models.shufflenet import Shuffle
from edgekd.models.vgg import VGG
from edgekd.onnx import inspect, session
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.quantize import QuantizeConfig, quantize
from edgekd.training.feature_hooks import FeatureExtractor
from edgekd.training.layer_discovery import cut_layers, drop_aliases, filter_cuts, is_cut, trace_layers
from tests import zoo

SMALL = {  # of each family, for the tests that run it; 5 halvings where the family has the choice
    "resnet": {"depth": 8, "width": 4},
    "imagenet_resnet": {"depth": 18, "width": 0.0625},
    "wide_resnet": {"depth": 10, "width": 0.5},
    "mobilenet_v2": {"width": 0.25, "depth": 0.4},
    "mobilenet_v3": {"width": 0.5, "depth": 0.6},
    "shufflenet": {"widths": [8, 8, 16, 32, 32], "blocks": [2, 2, 2]},
    "vgg": {"widths": [4, 8, 8, 16], "convs": [1, 2, 1, 1]},
}
BOTTLENECKS = ("imagenet_resnet", {"depth": 50, "width": 0.0625})
EVERY = [*SMALL.items(), BOTTLENECKS]
RESIDUAL = [pair for pair in EVERY if pair[0] not in ("shufflenet", "vgg")]
HALVED = [pair for pair in EVERY if pair[0] not in ("resnet", "wide_resnet", "vgg")]


def family(name, settings):
    return serialization.from_json(Model, {"use": name, **settings})


def built(name, settings, channels=1, classes=5):
    """With BatchNorm statistics as after some training."""
    torch.manual_seed(0)
    network = family(name, settings).build(classes, channels).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(4, channels, 32, 32))
    return network.eval()


def test_every_family_is_tested_here():
    assert set(SMALL) == set(plugins.names("models")) - {"python", "unet"}  # unet answers with maps: test_dense.py


# published sizes


def macs(network, x):
    """Of convolutions and linear layers."""
    total = []

    def count(module, _args, made):
        total.append(module.weight[0].numel() * made[0].numel() if made.ndim == 4 else module.weight.numel())

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    network(x)
    return sum(total)


@pytest.mark.parametrize(
    ("name", "settings", "classes", "size", "parameters", "millions"),
    [
        ("imagenet_resnet", {"depth": 18}, 1000, 224, 11_689_512, 1814),
        ("imagenet_resnet", {"depth": 34}, 1000, 224, 21_797_672, 3664),
        ("imagenet_resnet", {"depth": 50}, 1000, 224, 25_557_032, 4089),
        ("mobilenet_v2", {}, 1000, 224, 3_504_872, 301),
        ("mobilenet_v3", {}, 1000, 224, 2_542_856, 56.5),
        ("shufflenet", {}, 1000, 224, 2_278_604, 145),
        # of the distillation benchmarks on CIFAR-100
        ("resnet", {"depth": 20}, 100, 32, 278_324, 40.8),
        ("wide_resnet", {"depth": 16, "width": 2.0}, 100, 32, 703_284, 101),
        ("wide_resnet", {"depth": 40, "width": 1.0}, 100, 32, 569_780, 83),
        ("wide_resnet", {"depth": 40, "width": 2.0}, 100, 32, 2_255_156, 328),
        ("vgg", {}, 100, 32, 3_963_556, 96),
        ("vgg", {"convs": [2, 2, 2, 4]}, 100, 32, 9_459_236, 285),
    ],
)
def test_published_networks_have_their_published_size(name, settings, classes, size, parameters, millions):
    with torch.device("meta"):  # shapes without numbers
        network = family(name, settings).build(classes, 3).eval()
        found = macs(network, torch.empty(1, 3, size, size))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert found / 1e6 == pytest.approx(millions, rel=6e-3)


def normalised(conv, bn):
    """The keys of a convolution without bias and the BatchNorm behind it."""
    return {f"{conv}.weight"} | {
        f"{bn}.{what}" for what in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize(("depth", "counts", "convs"), [(18, (2, 2, 2, 2), 2), (50, (3, 4, 6, 3), 3)])
def test_checkpoints_of_torchvision_fit_the_imagenet_resnet(depth, counts, convs):
    wanted = normalised("conv1", "bn1") | {"fc.weight", "fc.bias"}
    for layer, count in enumerate(counts, 1):
        for block in range(count):
            at = f"layer{layer}.{block}"
            wanted = wanted.union(*(normalised(f"{at}.conv{i}", f"{at}.bn{i}") for i in range(1, convs + 1)))
        if layer > 1 or convs == 3:
            wanted |= normalised(f"layer{layer}.0.downsample.0", f"layer{layer}.0.downsample.1")
    with torch.device("meta"):
        assert set(family("imagenet_resnet", {"depth": depth}).build(10, 3).state_dict()) == wanted


def test_checkpoints_of_torchvision_fit_the_shufflenet():
    wanted = normalised("conv1.0", "conv1.1") | normalised("conv5.0", "conv5.1") | {"fc.weight", "fc.bias"}
    for stage, count in ((2, 4), (3, 8), (4, 4)):
        for unit in range(count):
            at = f"stage{stage}.{unit}.branch2"
            wanted = wanted.union(*(normalised(f"{at}.{i}", f"{at}.{i + 1}") for i in (0, 3, 5)))
        at = f"stage{stage}.0.branch1"
        wanted = wanted.union(*(normalised(f"{at}.{i}", f"{at}.{i + 1}") for i in (0, 2)))
    with torch.device("meta"):
        assert set(family("shufflenet", {}).build(10, 3).state_dict()) == wanted


def test_older_checkpoints_fit_the_resnet():
    wanted = normalised("stem.0", "stem.1") | {"head.weight", "head.bias"}
    for stage in (1, 2, 3):
        at = f"stage{stage}.0"
        wanted = wanted.union(*(normalised(f"{at}.conv{i}", f"{at}.bn{i}") for i in (1, 2)))
        if stage > 1:
            wanted |= normalised(f"{at}.shortcut.0", f"{at}.shortcut.1")
    assert set(family("resnet", {"depth": 8}).build(10, 3).state_dict()) == wanted


# images of any shape


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_answers_images_of_any_shape(name, settings):
    for shape in ((1, 16, 16), (3, 32, 32), (1, 40, 100), (3, 224, 224), (2, 33, 17)):
        network = family(name, settings).build(7, shape[0]).eval()
        with torch.no_grad():
            assert network(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "settings"), HALVED)
def test_the_map_is_halved_as_often_as_asked(name, settings):
    for halvings in (2, 3, 4):
        network = family(name, {**settings, "halvings": halvings}).build(5, 1).eval()
        sizes = {layer.size for layer, _ in trace_layers(network, torch.randn(2, 1, 64, 64))}
        assert min(sizes)[0] == 64 >> halvings and len(sizes) >= halvings


def test_images_too_small_for_vgg_are_refused():
    with pytest.raises(ConfigError, match="4x9 cannot be halved between 4 stages") as caught:
        VGG((2, 2, 2, 2), (1, 1, 1, 1), 3, 1)(torch.zeros(1, 1, 4, 9))
    assert "8 pixels" in caught.value.hint


# learning


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_a_loss_reaches_every_parameter(name, settings):
    torch.manual_seed(0)
    network = family(name, settings).build(5, 1).train()
    nn.functional.cross_entropy(network(torch.randn(4, 1, 32, 32)), torch.arange(4)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(("name", "settings"), [*EVERY, ("mobilenet_v2", {}), ("mobilenet_v3", {}), ("shufflenet", {})])
def test_a_fresh_network_tells_images_apart(name, settings):
    """Before BatchNorm has seen any: of a signal that fades away, layer by layer, float32 would lose the difference."""
    torch.manual_seed(0)
    network = family(name, settings).build(5, 1).eval()
    with torch.no_grad():
        answers = network(torch.randn(4, 1, 32, 32))
    assert 1e-4 < answers.std(0).mean() / answers.abs().mean() < 1e4


def test_a_depthwise_convolution_begins_with_the_fan_of_one_channel():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(512, 512, 3, groups=512), nn.Conv2d(64, 128, 3, groups=2))
    init_weights(network)
    assert network[0].weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert network[1].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert not network[0].bias.any()


# what the pieces compute


def test_a_shuffle_interleaves_two_halves():
    left, right = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    want = np.stack([left.numpy(), right.numpy()], 2).reshape(2, 6, 4, 5)
    assert np.array_equal(Shuffle()(left, right).numpy(), want)


def test_half_of_the_channels_pass_a_unit_of_the_shufflenet():
    network = built("shufflenet", SMALL["shufflenet"])
    with torch.no_grad():
        _, seen = FeatureExtractor(network, "stage3.0", "stage3.1")(torch.randn(2, 1, 64, 64))
    assert torch.equal(seen["stage3.1"][:, 0::2], seen["stage3.0"][:, :8])


def test_an_inverted_residual_adds_its_input_where_shapes_agree():
    x = torch.randn(2, 8, 6, 6)
    for width, stride, same in ((8, 1, True), (8, 2, False), (16, 1, False)):
        block = InvertedResidual(8, 48, width, 3, stride, nn.ReLU6).eval()
        nn.init.zeros_(block.project[1].weight)
        with torch.no_grad():
            assert torch.equal(block(x), x if same else torch.zeros(2, width, 6 // stride, 6 // stride))


# layers to tap


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_layers_are_found_at_every_size(name, settings):
    """In a fresh network the same as in a trained one: methods look before the first phase."""
    network, fresh = built(name, settings), family(name, settings).build(5, 1).eval()
    x = torch.randn(2, 1, 32, 24)
    sizes = {layer.size for layer, _ in trace_layers(network, x)}
    found = cut_layers(network, x)
    assert {layer.path for layer in cut_layers(fresh, x)} == {layer.path for layer in found}
    assert {layer.size for layer in found} == sizes and len(sizes) >= 3
    every = drop_aliases(trace_layers(network, x))
    assert filter_cuts(network, every, x) == [layer for layer in every if is_cut(network, layer.path, x)]
    assert len(found) < len(dict(network.named_modules())) / 3


@pytest.mark.parametrize(("name", "settings"), RESIDUAL)
def test_every_sum_of_a_residual_block_can_be_tapped_before_its_activation(name, settings):
    network = built(name, settings)
    joins = [path for path, module in network.named_modules() if type(module).__name__ == Add.__name__]
    with torch.no_grad():
        _, seen = FeatureExtractor(network, *joins)(torch.randn(2, 1, 32, 32))
    assert len(seen) == len(joins) > 0 and all((made < 0).any() for made in seen.values())


# mistakes


@pytest.mark.parametrize(
    ("name", "settings", "said", "hint"),
    [
        ("resnet", {"depth": 18}, "depth is 18", "6n+2"),
        ("imagenet_resnet", {"depth": 20}, "depth is 20, which this family has not", "18, 34, 50"),
        ("imagenet_resnet", {"width": 0.0}, "width is 0.0", "positive multiplier"),
        ("imagenet_resnet", {"halvings": 6}, "halvings is 6", "3 for 32"),
        ("wide_resnet", {"depth": 20}, "depth is 20", "6n+4"),
        ("wide_resnet", {"width": -1.0}, "width is -1.0", "positive multiplier"),
        ("mobilenet_v2", {"width": float("nan")}, "width is nan", "positive multiplier"),
        ("mobilenet_v2", {"depth": 0.0}, "depth is 0.0", "positive multiplier"),
        ("mobilenet_v2", {"halvings": -1}, "halvings is -1", "2 for 16"),
        ("mobilenet_v3", {"width": 0.0}, "width is 0.0", "positive multiplier"),
        ("mobilenet_v3", {"depth": float("inf")}, "depth is inf", "positive multiplier"),
        ("mobilenet_v3", {"halvings": 9}, "halvings is 9", "3 for 32"),
        ("shufflenet", {"widths": (24, 116, 232, 464)}, "widths is", "five numbers"),
        ("shufflenet", {"widths": (24, 115, 232, 464, 1024)}, "widths is", "even"),
        ("shufflenet", {"blocks": (4, 0, 4)}, "blocks is", "1 block or more"),
        ("shufflenet", {"halvings": 7}, "halvings is 7", "3 for 32"),
        ("vgg", {"widths": ()}, "widths is", "each stage"),
        ("vgg", {"widths": (8, 0, 8, 8)}, "widths is", "each stage"),
        ("vgg", {"convs": (1, 1)}, "convs is .* for 4 stages", "each stage"),
    ],
)
def test_settings_that_make_no_network_are_refused(name, settings, said, hint):
    with pytest.raises(ConfigError, match=said) as caught:
        plugins.load("models", name)(**settings)
    assert hint in caught.value.hint


# export and INT8


@pytest.mark.parametrize(("name", "settings"), [pair for pair in SMALL.items() if pair[0] != "resnet"])
def test_exports_and_runs_in_int8(name, settings, tmp_path):
    """The CIFAR ResNet is exported in other files."""
    halved = {"halvings": 3} if name in dict(HALVED) else {}
    network = built(name, {**settings, **halved})
    images = torch.randn(64, 1, 16, 16).numpy()
    exported = export(
        tmp_path, "student", network, images, zoo.logits(5), ExportConfig()
    )  # proves that it answers alike
    np.savez(tmp_path / "images.npz", image=images)
    scheme = plugins.load("targets", "cpu")().scheme
    int8 = quantize(tmp_path, exported, File.of(tmp_path / "images.npz"), scheme, QuantizeConfig())
    assert exported.single.macs == int8.single.macs == macs(network, torch.from_numpy(images[:1]))
    want = session.run_model(exported.dynamic.file.path, images)
    for model in (int8.single, int8.dynamic):
        got = session.run_model(model.file.path, images)
        assert np.corrcoef((want - want.mean(0)).ravel(), (got - got.mean(0)).ravel())[0, 1] > 0.9
    found = inspect.facts(exported.dynamic.file.path).nodes
    assert not {"Shape", "Gather", "ConstantOfShape", "If", "Loop"} & set(found), "computes with its batch size"
