"""Preparation for INT8: the same answers, equal ranges, corrected biases, smoothed outliers, and what is refused."""

import logging
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgekd.config import load_config, with_device_settings
from edgekd.core.artifact import File
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.errors import ConfigError, ModelError, ParityError
from edgekd.onnx import session
from edgekd.pipelines import build as build_module
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize import preparation
from edgekd.stages.quantize.calibration_cache import quantize_to_cache
from edgekd.stages.quantize.channel_scaling import ChannelRange, find_scalable_channels, scale_channels
from edgekd.stages.quantize.equalize import equalization_factors, find_equalizable
from edgekd.stages.quantize.preparation import channel_ranges, prepare_file, prepare_files
from edgekd.stages.quantize.quantize import Int8Options, quantize, quantize_file, snr_db, write_int8
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate, load_prepared
from edgekd.stages.quantize.smoothquant import find_smoothable, smoothing_factors
from tests.test_quant_aware import pictures
from tests.test_quantize import foreign, noise

EQUAL, SMOOTH, CORRECT = (
    QuantizeConfig(**{key: on})
    for key, on in (("cross_layer_equalization", True), ("smoothquant_alpha", 0.5), ("bias_correction", True))
)
RANDOM = np.random.default_rng(0)


def saved(path, nodes, constants, entering, leaving, opset=17):
    """A graph from `x` to `y`; shapes without the batch, which is 1."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *shape])
        for name, shape in (("x", entering), ("y", leaving))
    ]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def constants_of(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def gap(one, other, inputs):
    want, got = (session.run_model(path, inputs) for path in (one, other))
    return np.abs(want - got).max() / np.abs(want).max()


# networks that hold every kind of seam


class Chain(nn.Module):
    """Convolutions of all kinds with what may stand between them; (N, 1, 8, 8) to (N, 3)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False)
        self.widened = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8)
        self.narrowed, self.up = nn.Conv2d(16, 6, 1), nn.ConvTranspose2d(6, 5, 2, 2)
        self.last, self.hidden, self.head = nn.Conv2d(5, 7, 3), nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x):
        x = self.grouped(F.max_pool2d(F.relu(self.first(x)), 3, 1, 1))
        x = self.narrowed(F.relu(self.widened(x)))
        x = self.last(F.leaky_relu(self.up(x)))
        return self.head(F.relu(self.hidden(F.relu(x).mean((2, 3)))))


class Inverted(nn.Module):
    """A depthwise convolution between two others, ReLU6 and a skip; (N, 1, 8, 8) to (N, 3)."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 12, 1)
        self.spatial, self.project = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(4, 3)
        wide, narrow = torch.logspace(-1.5, 1.2, 12), torch.logspace(0.3, -2, 12)  # as uneven as in trained networks
        with torch.no_grad():
            self.expand.weight *= wide.reshape(-1, 1, 1, 1)
            self.spatial.weight *= (narrow / wide).reshape(-1, 1, 1, 1)
            self.project.weight /= narrow.reshape(1, -1, 1, 1)
            self.expand.bias *= wide
            self.spatial.bias *= narrow

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.spatial(F.relu6(self.expand(x))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a normalization; three products for queries or one for all."""

    def __init__(self, width, apart):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.together = None if apart else nn.Linear(width, 3 * width)
        self.out, self.wide, self.narrow = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        y = self.before(x)
        q, k, v = (self.q(y), self.k(y), self.v(y)) if self.together is None else self.together(y).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        return x + self.narrow(F.gelu(self.wide(self.after(x))))


class Vision(nn.Module):
    """A vision transformer of two blocks; (N, 1, 8, 8) to (N, 3)."""

    def __init__(self, width=16):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(Block(width, False), Block(width, True))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)
        for block in self.blocks:  # the same function with outliers behind normalizations, as large networks have them
            for norm, takers in (
                (block.before, (block.q, block.k, block.v, block.together)),
                (block.after, [block.wide]),
            ):
                with torch.no_grad():
                    norm.weight[::5] *= 40
                    for taker in filter(None, takers):
                        taker.weight[:, ::5] /= 40

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Gives a network as exported files, its calibration images as a file, and as an array; exports each once."""

    @cache
    def export_once(build, opset=20):
        folder, images = tmp_path_factory.mktemp(build.__name__), pictures(48)
        np.savez(folder / "images.npz", image=images)
        torch.manual_seed(0)
        files = export(folder, "student", build().eval(), images, None, ExportConfig(opset=opset))
        return files, File.of(folder / "images.npz"), images

    return export_once


# seams


KINDS = [(Chain, 7, 20), (Vision, 4, 20), (Vision, 4, 13), (Inverted, 2, 20)]


@pytest.mark.parametrize(("build", "count", "opset"), KINDS)
def test_any_factors_leave_the_function_as_it_is(made, tmp_path, build, count, opset):
    files, _, images = made(build, opset)
    for source in (files.single, files.dynamic):
        model = load_prepared(source.file.path)
        factors = {
            seam.tensor: RANDOM.uniform(0.3, 3, seam.size)
            for seam in find_scalable_channels(model)
            if seam.path.limit == np.inf
        }
        clipped = [seam for seam in find_scalable_channels(model) if seam.path.limit == 6]
        assert len(factors) + len(clipped) == count
        assert sorted(scale_channels(model, factors)) == sorted(factors)
        onnx.save(model, tmp_path / "scaled.onnx")
        assert gap(source.file.path, tmp_path / "scaled.onnx", images) < 1e-5


def test_what_more_than_one_layer_reads_or_a_curve_bends_is_no_seam(made):
    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            y = F.relu(self.a(x.expand(-1, 4, -1, -1)))
            z = F.hardswish(self.b(y))
            return (self.c(z) + y).mean((2, 3))  # y is read twice, z is bent

    assert not list(find_scalable_channels(onnx.load(made(Bent)[0].single.file.path)))


def test_a_constant_that_others_use_is_copied(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("Conv", ["c", "w", "b"], ["d"]),
        helper.make_node("Conv", ["d", "w", "b"], ["y"]),
    ]
    constants = {"w": RANDOM.standard_normal((2, 2, 1, 1), np.float32), "b": RANDOM.standard_normal(2, np.float32)}
    path = saved(tmp_path / "tied.onnx", nodes, constants, (2, 4, 4), (2, 4, 4))
    model = onnx.load(path)
    scale_channels(model, {"c": np.array([2.0, 0.5])})
    onnx.save(model, tmp_path / "scaled.onnx")
    assert gap(path, tmp_path / "scaled.onnx", noise(4, (2, 4, 4))) < 1e-6
    assert np.array_equal(constants_of(tmp_path / "scaled.onnx")["w"], constants["w"])  # the last layer's


# equalization


def test_two_layers_by_hand(tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "w2"], ["y"]),
    ]
    numbers = {"w1": [[4, -1], [0.5, 1]], "b1": [2, -0.25], "w2": [[1, -0.5], [2, 4]]}
    constants = {name: np.array(value, np.float32) for name, value in numbers.items()}
    path = saved(tmp_path / "two.onnx", nodes, constants, (2,), (2,))
    inputs = RANDOM.uniform(0, 1, (64, 2)).astype(np.float32)
    prepare_file(path, tmp_path / "equal.onnx", inputs, EQUAL)
    made = constants_of(tmp_path / "equal.onnx")
    # channel 0: ranges 4 and 1, s = 2; channel 1: ranges 1 and 4, s = 1/2; both become 2
    np.testing.assert_allclose(made["w1"], [[2, -0.5], [1, 2]], rtol=1e-6)
    np.testing.assert_allclose(made["b1"], [1, -0.5], rtol=1e-6)
    np.testing.assert_allclose(made["w2"], [[2, -1], [1, 2]], rtol=1e-6)
    assert gap(path, tmp_path / "equal.onnx", inputs) < 1e-6


def test_a_depthwise_convolution_and_its_neighbours_end_with_equal_ranges(made):
    model = onnx.load(made(Inverted)[0].dynamic.file.path)
    found = find_equalizable(model)
    one, two = (seam.tensor for seam in found)
    small = ChannelRange(np.zeros(12), np.array([1.0] + [1e-9] * 11))  # the first channel may not grow
    scale_channels(model, equalization_factors(model, found, dict.fromkeys((one, two), small)))
    weights = {t.name: np.abs(numpy_helper.to_array(t)) for t in model.graph.initializer}
    expand, spatial = weights["expand.weight"].max((1, 2, 3)), weights["spatial.weight"].max((1, 2, 3))
    project = weights["project.weight"].max((0, 2, 3))
    np.testing.assert_allclose(expand[1:], spatial[1:], rtol=1e-3)
    np.testing.assert_allclose(spatial[1:], project[1:], rtol=1e-3)
    assert expand[0] <= spatial[0] * 1.001


def test_no_channel_outgrows_its_tensor_and_one_that_a_clip_cuts_keeps_its_scale(made, tmp_path):
    files, images, inputs = made(Inverted)
    model = onnx.load(files.dynamic.file.path)
    axes = {seam.tensor: seam.producer.axis for seam in find_scalable_channels(model)}
    before = channel_ranges(model, axes, inputs)
    after = channel_ranges(onnx.load(prepare_files(tmp_path, files, images, EQUAL).dynamic.file.path), axes, inputs)
    cut = np.concatenate([one.highest >= 6 for one in before.values()])
    assert 0 < cut.sum() < len(cut)
    for tensor in axes:
        old, new = before[tensor].highest, after[tensor].highest
        np.testing.assert_allclose(new[old >= 6], old[old >= 6], rtol=1e-4)
        assert (new[old < 6] <= min(6, old.max()) * 1.0001).all()
        assert not np.allclose(new, old)


@pytest.mark.parametrize("build", [Chain, Vision])
def test_prepared_files_answer_as_before_and_keep_their_form(made, tmp_path, build):
    files, images, inputs = made(build)
    config = replace(EQUAL, smoothquant_alpha=0.5)
    found = prepare_files(tmp_path, files, images, config)
    for old, new in ((files.single, found.single), (files.dynamic, found.dynamic)):
        assert (new.name, new.input, new.opset, new.ir, new.macs) == (old.name, old.input, old.opset, old.ir, old.macs)
        assert new.file.sha256 != old.file.sha256
        assert gap(old.file.path, new.file.path, inputs) < 1e-5
    one, other = constants_of(found.single.file.path), constants_of(found.dynamic.file.path)
    assert all(np.array_equal(one[name], other[name]) for name in one.keys() & other.keys())


def test_one_scale_for_a_whole_weight_is_enough_after_equalization(made, tmp_path):
    files, _, inputs = made(Inverted)
    for name in ("ort-x86", "tensorrt"):
        want, ratios = session.run_model(files.dynamic.file.path, pictures(64, 5)), []
        for equalize in (False, True):
            config = QuantizeConfig(per_channel=False, cross_layer_equalization=equalize)
            quantize_file(files.dynamic.file.path, tmp_path / "q.onnx", inputs, QUANT_SCHEMES[name], config)
            ratios.append(snr_db(want, session.run_model(tmp_path / "q.onnx", pictures(64, 5))))
        assert ratios[1] > ratios[0] + 6


def test_files_of_other_exporters_are_equalized_too(tmp_path, caplog):
    caplog.set_level(logging.INFO, "edgekd")
    path = foreign(tmp_path / "foreign.onnx")  # nodes without names, an unfolded BatchNorm, a Constant node
    made = quantize_file(
        path, tmp_path / "q.onnx", noise(), QUANT_SCHEMES["ort-x86"], replace(EQUAL, bias_correction=True)
    )
    assert made.precision == "int8" and made.name == "q" and made.opset == 13
    assert "equalized: 1 tensor" in caplog.text and "biases corrected in 2 of 2 layers" in caplog.text
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".onnx"].count("q.onnx") == 1


# smoothing


def test_smoothing_is_the_formula_of_the_paper(made):
    files, _, inputs = made(Vision)
    model = onnx.load(files.dynamic.file.path)
    found = find_smoothable(model)
    seen = channel_ranges(model, {seam.path.end: seam.path.axis for seam in found}, inputs)
    factors = smoothing_factors(model, found, seen, 0.7)
    torch.manual_seed(0)
    network = Vision()
    with torch.no_grad():
        x = network.patches(torch.from_numpy(inputs)).flatten(2).transpose(1, 2)
        first, second = network.blocks
        apart = second.before(first(x))
        (tensor,) = [seam.tensor for seam in found if len(seam.path.consumers) == 3]
        weights = torch.cat([second.q.weight, second.k.weight, second.v.weight]).abs().amax(0)
        want = apart.abs().amax((0, 1)) ** 0.7 / weights**0.3
    np.testing.assert_allclose(factors[tensor], want.numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["ort-x86", "tensorrt"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_smoothing_a_transformer_with_outliers_gives_back_what_int8_lost(made, tmp_path, name, per_channel):
    files, images, _ = made(Vision)
    fresh, ratios = pictures(64, 3), []
    want = session.run_model(files.dynamic.file.path, fresh)
    for alpha in (0.0, 0.5):
        config = QuantizeConfig(smoothquant_alpha=alpha, per_channel=per_channel)
        int8 = quantize(tmp_path, files, images, QUANT_SCHEMES[name], config)
        ratios.append(snr_db(want, session.run_model(int8.dynamic.file.path, fresh)))
        assert gap(int8.single.file.path, int8.dynamic.file.path, fresh) < 0.1  # a step of INT8 here and there
    assert ratios[1] > ratios[0] + 3


def test_channels_that_are_always_0_or_that_no_weight_takes_keep_their_scale(tmp_path):
    weight = np.array([[1, 2], [0, 0], [3, 1]], np.float32)
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["y"]),
    ]
    constants = {"g": np.array([2, 1, 0], np.float32), "b": np.zeros(3, np.float32), "w": weight}
    path = saved(tmp_path / "n.onnx", nodes, constants, (4, 3), (4, 2))
    model, inputs = onnx.load(path), noise(8, (4, 3))
    found = find_smoothable(model)
    (factors,) = smoothing_factors(model, found, channel_ranges(model, {"n": -1}, inputs), 0.5).values()
    normal = session.run_model(path, inputs)  # of channel 0 alone: y_0 = n_0
    np.testing.assert_allclose(factors, [np.sqrt(np.abs(normal[..., 0]).max() / 2), 1, 1], rtol=1e-5)


# bias correction


def convolved(x, weight, stride, pad, groups):
    """By loops; (C, H, W) to (O, H', W')."""
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad)))
    outputs, size = len(weight), weight.shape[-1]
    across, own = weight.shape[1], outputs // groups
    wide = (x.shape[1] - size) // stride + 1
    y = np.zeros((outputs, wide, wide))
    for o in range(outputs):
        part = x[o // own * across :][:across]
        for i in range(wide):
            for j in range(wide):
                y[o, i, j] = (part[:, i * stride : i * stride + size, j * stride : j * stride + size] * weight[o]).sum()
    return y


@pytest.mark.parametrize(("stride", "pad", "groups"), [(1, 1, 1), (2, 1, 2), (2, 0, 4)])
@pytest.mark.parametrize(("name", "per_channel"), [("ort-x86", True), ("ort-x86", False), ("tensorrt", True)])
def test_corrected_biases_by_hand(tmp_path, stride, pad, groups, name, per_channel):
    weight = RANDOM.standard_normal((8, 4 // groups, 3, 3), np.float32)
    weight *= np.logspace(0, 1, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    node = helper.make_node(
        "Conv", ["x", "w", "b"], ["y"], pads=[pad] * 4, strides=[stride] * 2, group=groups, name="conv"
    )
    side = (6 + 2 * pad - 3) // stride + 1
    bias = RANDOM.standard_normal(8, np.float32)
    path = saved(tmp_path / "c.onnx", [node], {"w": weight, "b": bias}, (4, 6, 6), (8, side, side))
    inputs = noise(6, (4, 6, 6)) + 1
    step = np.abs(weight).max((1, 2, 3) if per_channel else None, keepdims=True) / 127
    error = np.rint(weight / step) * step - weight
    want = bias - np.mean([convolved(x, error, stride, pad, groups) for x in inputs], axis=(0, 2, 3))
    scheme = replace(QUANT_SCHEMES[name], per_channel=per_channel)
    ranges = calibrate(path, inputs, QuantizeConfig())
    write_int8(path, tmp_path / "q.onnx", inputs, ranges, Int8Options(scheme, bias_correction=True))
    made = constants_of(tmp_path / "q.onnx")
    got = made["b"] if "b" in made else made["b_quantized"] * made["b_quantized_scale"]
    np.testing.assert_allclose(got, want, atol=0 if "b" in made else made["b_quantized_scale"].max(), rtol=1e-4)
    assert np.abs(want - bias).max() > 1e-3


def test_the_mean_of_every_layer_is_that_of_fp32_again(made, tmp_path):
    """In the form that keeps weights float, so that the file without its roundings of tensors can be computed."""
    files, _, inputs = made(Chain)
    path = files.dynamic.file.path
    ranges = calibrate(path, inputs, QuantizeConfig())
    scheme = replace(QUANT_SCHEMES["tensorrt"], per_channel=False)
    write_int8(path, tmp_path / "q.onnx", inputs, ranges, Int8Options(scheme, bias_correction=True), files.single.macs)
    fp32, int8 = constants_of(path), constants_of(tmp_path / "q.onnx")
    first = torch.from_numpy(inputs)
    weight = int8["first.weight"]
    rounded = np.rint(weight / int8["first.weight_scale"]) * int8["first.weight_scale"]
    means = [
        F.conv2d(first, torch.tensor(np.float32(w)), torch.tensor(b), padding=1).mean((0, 2, 3)).numpy()
        for w, b in ((weight, fp32["first.bias"]), (rounded, int8["first.bias"]))
    ]
    np.testing.assert_allclose(*means, atol=1e-6)
    assert not np.allclose(fp32["first.bias"], int8["first.bias"], atol=1e-6)
    added = [name for name in int8 if name.endswith(".bias") and name not in fp32]
    assert len(added) == 1  # of the convolution that had none


def test_a_product_without_a_bias_is_left_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO, "edgekd")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    constants = {"w": RANDOM.standard_normal((6, 5), np.float32), "w2": RANDOM.standard_normal((5, 3), np.float32)}
    path = saved(tmp_path / "m.onnx", nodes, constants | {"b": np.zeros(3, np.float32)}, (4, 6), (4, 3))
    quantize_file(path, tmp_path / "q.onnx", noise(8, (4, 6)), QUANT_SCHEMES["tensorrt"], CORRECT)
    assert "biases corrected in 1 of 2 layers" in caplog.text


# nothing to do, and what does not go together


def test_switches_that_find_nothing_say_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "edgekd")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = saved(tmp_path / "one.onnx", nodes, {"w": RANDOM.standard_normal((6, 5), np.float32)}, (4, 6), (4, 5))
    config = QuantizeConfig(cross_layer_equalization=True, smoothquant_alpha=0.5, bias_correction=True)
    quantize_file(path, tmp_path / "q.onnx", noise(8, (4, 6)), QUANT_SCHEMES["ort-x86"], config)
    assert "equalized: nothing to do" in caplog.text and "smoothed: nothing to do" in caplog.text
    assert "biases corrected in 0 of 1 layers" in caplog.text


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_refuses_an_alpha_out_of_range(alpha):
    with pytest.raises(ConfigError, match="smoothquant_alpha is"):
        QuantizeConfig(smoothquant_alpha=alpha)


@pytest.mark.parametrize("config", [EQUAL, SMOOTH, CORRECT, QuantizeConfig(per_channel=True)])
def test_a_calibration_cache_refuses_what_would_change_its_network(made, tmp_path, config):
    files, _, inputs = made(Inverted)
    with pytest.raises(ConfigError, match="leaves the network as it is"):
        quantize_to_cache(files.single.file.path, tmp_path / "n.cache", inputs, "8.5.2", config)
    small = replace(load_config("digits", (), ("jetson",), True), quantize=config)
    with pytest.raises(ConfigError, match="leaves the network as it is"):
        with_device_settings(small, jetpack="5.1", board="xavier-nx", dla=True)


def test_learnt_ranges_refuse_what_would_change_their_network():
    sets = ("student.method={use: quant_aware, base: {use: kd}}", "quantize.cross_layer_equalization=true")
    with pytest.raises(ConfigError, match="ranges that the method learns belong to the weights"):
        load_config("digits", sets, ("cpu",), True)
    per_tensor = load_config("digits", (sets[0], "quantize.per_channel=false"), ("cpu",), True)
    assert per_tensor.quantize.per_channel is False


def test_answers_that_move_are_refused(made, tmp_path, monkeypatch):
    files, _, inputs = made(Inverted)
    monkeypatch.setattr(preparation, "TOLERANCE", -1.0)
    with pytest.raises(ParityError, match="the outputs of `student.onnx` move by"):
        prepare_file(files.single.file.path, tmp_path / "p.onnx", inputs, EQUAL)


# in a build


def test_a_build_makes_int8_of_the_prepared_network_and_measures_the_exported_one(tmp_path):
    switches = ("quantize.cross_layer_equalization=true", "quantize.bias_correction=true", "quantize.per_channel=false")
    config = load_config(
        "digits", ("student.method={use: supervised}", "student.baselines=[]", *switches), ("cpu",), True
    )
    record = build_module.build(config, tmp_path / "out", tmp_path / "calib", "edgekd")
    steps = tmp_path / "out" / "steps"
    (suited,) = steps.glob("prepare-int8-supervised-*")
    (fp32,) = steps.glob("export-supervised-*")
    (int8,) = steps.glob("quantize-supervised-cpu-*")
    shas = {m.model.name: m.model.file.sha256 for m in record.benches[0].measurements}
    assert (
        shas["supervised fp32"]
        == File.of(fp32 / "supervised.onnx").sha256
        != File.of(suited / "supervised.onnx").sha256
    )
    assert shas["supervised int8"] == File.of(int8 / "supervised-int8.onnx").sha256
    scales = [a for n, a in constants_of(int8 / "supervised-int8.onnx").items() if n.endswith("weight_scale")]
    assert scales and all(a.size == 1 for a in scales)
    inputs = np.load(next(steps.glob("test-inputs-*/inputs.npy")))
    assert gap(fp32 / "supervised.onnx", suited / "supervised.onnx", inputs) < 1e-4


# what must not be touched


def product(path, constants, *nodes):
    """x (1, 4, 4) times w, and what follows; from `x` to `y`."""
    first = helper.make_node("MatMul", ["x", "w"], ["p"])
    weight = {"w": RANDOM.normal(0, 1, (4, 4)).astype(np.float32)}
    return saved(path, [first, *nodes], weight | constants, [4, 4], [4, 4])


def test_what_is_added_to_rows_is_no_bias(tmp_path):
    """(T, 1) behind a product with as many rows as channels."""
    rows = {"b": RANDOM.normal(0, 1, (4, 1)).astype(np.float32)}
    path = product(tmp_path / "net.onnx", rows, helper.make_node("Add", ["p", "b"], ["y"]))
    inputs = RANDOM.normal(0, 1, (32, 4, 4)).astype(np.float32)
    quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES["tensorrt"], CORRECT)
    assert gap(path, tmp_path / "int8.onnx", inputs) < 0.05


def test_a_float_layer_keeps_its_bias_where_it_shares_its_weight(tmp_path):
    biases = {name: RANDOM.normal(0, 1, 4).astype(np.float32) for name in ("b", "c")}
    again = [helper.make_node("MatMul", ["r", "w"], ["q"]), helper.make_node("Add", ["q", "c"], ["y"])]
    first = [helper.make_node("Add", ["p", "b"], ["a"]), helper.make_node("Relu", ["a"], ["r"])]
    path = product(tmp_path / "net.onnx", biases, *first, *again)
    inputs = RANDOM.normal(0, 1, (32, 4, 4)).astype(np.float32)
    asked = QuantizeConfig(bias_correction=True, keep_float=("last",))
    quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES["tensorrt"], asked)
    found = constants_of(tmp_path / "int8.onnx")
    assert (found["c"] == biases["c"]).all() and (found["b"] != biases["b"]).any()


def test_a_grouped_transposed_convolution_is_quantized_without_correction(tmp_path):
    weight = {"w": RANDOM.normal(0, 1, (4, 3, 2, 2)).astype(np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2, strides=[2, 2])
    path = saved(tmp_path / "net.onnx", [node], weight, [4, 4, 4], [6, 8, 8])
    inputs = RANDOM.normal(0, 1, (16, 4, 4, 4)).astype(np.float32)
    for name in ("ort-x86", "tensorrt"):
        quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES[name], CORRECT)


def test_a_single_number_in_front_is_no_channel(tmp_path):
    one = {"two": np.float32([2]), "minus": np.float32([-1]), "w": RANDOM.normal(0, 1, (4, 4)).astype(np.float32)}
    scaled = [helper.make_node("Mul", ["x", "two"], ["m"]), helper.make_node("Add", ["m", "minus"], ["a"])]
    path = saved(tmp_path / "n.onnx", [*scaled, helper.make_node("MatMul", ["a", "w"], ["y"])], one, [4, 4], [4, 4])
    inputs = RANDOM.normal(0, 1, (16, 4, 4)).astype(np.float32)
    quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES["ort-x86"], SMOOTH)


def test_weights_of_another_type_are_refused(tmp_path):
    node = helper.make_node("Conv", ["h", "w"], ["s"])
    casts = [helper.make_node("Cast", [a], [b], to=kind) for a, b, kind in (("x", "h", 10), ("s", "y", 1))]
    weight = {"w": RANDOM.normal(0, 1, (4, 4, 1, 1)).astype(np.float16)}
    path = saved(tmp_path / "n.onnx", [casts[0], node, casts[1]], weight, [4, 4, 4], [4, 4, 4])
    inputs = RANDOM.normal(0, 1, (16, 4, 4, 4)).astype(np.float32)
    with pytest.raises(ModelError, match="could be quantized|cannot quantize"):
        quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES["tensorrt"], QuantizeConfig())
    assert not (tmp_path / "int8.onnx").exists()
