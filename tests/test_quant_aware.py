"""A network that rounds as its INT8 file does: same numbers, ranges that learn, and that arrive in the file."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp
from torch import nn
from torch.nn import functional as F

from edgekd.core.artifact import File, LearnedRange
from edgekd.core.augment import Augment
from edgekd.core.method import PhaseResult, TrainingContext, run_phases
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.core.tensor_fingerprint import compute_fingerprint, nearest_fingerprint
from edgekd.errors import ConfigError, ModelError
from edgekd.methods.kd import KD
from edgekd.methods.quant_aware import QuantAware
from edgekd.methods.supervised import Supervised
from edgekd.onnx import session
from edgekd.stages.distill.setup import TrainingPlan, build_trainer
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.quant_spec import apply_learned_ranges, fingerprints
from edgekd.stages.quantize.quantize import Int8Options, write_int8_files
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate
from edgekd.tasks.classification import Classification
from edgekd.training.exported_graph import ExportedGraph
from edgekd.training.fake_quant import (
    FakeQuantModel,
    LearnedFakeQuant,
    fake_quantize_bias,
    fake_quantize_weight,
    scale_and_zero_point,
)
from edgekd.training.trainer import TrainConfig
from tests import zoo

NAMES = ("ort-x86", "ort-arm", "tensorrt")
RANGES = ((0.0, 6.0), (-1.3, 2.7), (-0.2, 0.0), (0.5, 3.1), (-1e-5, 7e-6))


class Foreign(nn.Module):
    """Somebody's code: functions, activations in place, a skip, a product, a layer that is used twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.second, self.gate = nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, zoo.CLASSES)

    def forward(self, x):
        y = F.relu6(self.norm(self.first(x)))
        z = F.relu(self.second(self.depthwise(y)), inplace=True)
        z += y
        z = F.hardswish(self.gate(z)) + torch.sigmoid(self.gate(y)) * z
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.max_pool2d(F.silu(z), 2), 1), 1))


def settled_network(build, seed=0):
    """A network whose BatchNorms have seen data, and whose answers spread."""
    torch.manual_seed(seed)
    network = build()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        for _ in range(30):
            network.train()(torch.randn(32, 1, 8, 8))
    return network.eval()


def pictures(count, seed=1):
    return np.random.default_rng(seed).standard_normal((count, 1, 8, 8), np.float32)


class Delivery:
    """What a build does with a student and its learnt ranges, at another opset than the blueprint's."""

    def __init__(self, folder, network, scheme, opset=13):
        folder.mkdir()
        images = pictures(32)
        np.savez(folder / "images.npz", image=images)
        self.folder, self.images, self.scheme = folder, File.of(folder / "images.npz"), scheme
        self.exported = export(folder, "student", network, images, None, ExportConfig(opset=opset))
        self.calibrated = calibrate(self.exported.dynamic.file.path, images, QuantizeConfig())

    def quantized(self, learnt):
        self.ranges = apply_learned_ranges(self.folder, self.exported, self.calibrated, learnt)
        return write_int8_files(self.folder, self.exported, self.images, self.ranges, Int8Options(self.scheme))


def rounding(folder, network, name):
    scheme = QUANT_SCHEMES[name]
    return FakeQuantModel(network, zoo.drafted(folder, network, scheme, pictures(32)), torch.from_numpy(pictures(2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", RANGES)
def test_scale_and_zero_point_are_those_of_onnxruntime(name, bounds):
    scheme = QUANT_SCHEMES[name]
    first, last = {"ort-x86": (0, 255), "ort-arm": (-128, 127), "tensorrt": (-127, 127)}[name]
    kind = np.uint8 if first == 0 else np.int8
    ends = [np.array(end, np.float32) for end in bounds]
    zero, scale = compute_scale_zp(*ends, kind(first), kind(last), scheme.symmetric_activation)
    got, point = scale_and_zero_point(*(torch.tensor(end) for end in ends), scheme)
    assert got.dtype == torch.float32 and got.item() == scale.item()
    assert point.item() == zero.item()


def in_onnxruntime(x, scale, zero, kind, axis=None):
    """QuantizeLinear, then DequantizeLinear."""
    constants = [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero.astype(kind), "z")]
    extra = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **extra),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **extra),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n in "xy"]
    graph = helper.make_graph(nodes, "pair", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def no_ties(x, scale, distance=1e-3):
    """Without numbers so near to the middle of two steps that a last bit decides."""
    return x[np.abs(np.abs(x / scale) % 1 - 0.5) > distance]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", RANGES[:4])
def test_a_rounder_computes_what_onnxruntime_computes(name, bounds):
    rounder = LearnedFakeQuant(*bounds, QUANT_SCHEMES[name], -np.inf, np.inf)
    low, high = rounder.bounds()
    scale, zero = (t.detach().numpy() for t in scale_and_zero_point(low, high, QUANT_SCHEMES[name]))
    x = no_ties(np.random.default_rng(0).normal(0, 4, (5000,)).astype(np.float32), scale)[None]
    want = in_onnxruntime(x, scale, zero, np.uint8 if name == "ort-x86" else np.int8)
    got = rounder(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_ends_begin_at_the_calibrated_range_and_an_end_at_zero_stays():
    rounder = LearnedFakeQuant(-1.5, 2.5, QUANT_SCHEMES["ort-x86"], -np.inf, np.inf)
    assert [end.item() for end in rounder.bounds()] == pytest.approx([-1.5, 2.5])
    rectified = LearnedFakeQuant(0.0, 2.5, QUANT_SCHEMES["ort-x86"], -np.inf, np.inf)
    assert len(list(rectified.parameters())) == 1
    rectified.high.data.mul_(3)
    assert rectified.bounds()[0] == 0


def test_a_range_does_not_leave_the_clip_before_it():
    rounder = LearnedFakeQuant(0.0, 6.0, QUANT_SCHEMES["ort-x86"], 0.0, 6.0)
    rounder.high.data.mul_(2)
    assert rounder.bounds()[1] == 6


def gradients(rounder, x):
    made = rounder(x)
    made.sum().backward()
    share = 1 / np.sqrt(x.numel() / len(x) * rounder.steps)
    return {name: p.grad.item() / share / rounder.steps for name, p in rounder.named_parameters()}


@pytest.mark.parametrize("name", ["ort-x86", "ort-arm"])
def test_beyond_the_ends_an_answer_moves_with_its_end(name):
    x = torch.tensor([[5.0, 6.0, 7.0, -4.0, -9.0]])  # three above, two below, none between
    found = gradients(LearnedFakeQuant(-1.0, 2.0, QUANT_SCHEMES[name], -np.inf, np.inf), x)
    assert found == pytest.approx({"high": 3, "low": 2}, rel=1e-2)  # but for the rounding of the zero point


def test_between_the_ends_the_step_has_the_gradient_of_lsq():
    x = torch.tensor([[0.3, 1.1, 1.9]])
    rounder = LearnedFakeQuant(0.0, 2.0, QUANT_SCHEMES["ort-x86"], -np.inf, np.inf)
    scale = 2 / 255
    want = sum(round(v / scale) - v / scale for v in (0.3, 1.1, 1.9)) / 255
    assert gradients(rounder, x)["high"] == pytest.approx(want, abs=1e-5)


def test_a_numeric_derivative_agrees_where_there_is_one():
    """Symmetric ranges: above the end the answer is 127 steps, linear in the range."""
    x = torch.tensor([[50.0, 60.0]])
    rounder = LearnedFakeQuant(-3.0, 3.0, QUANT_SCHEMES["tensorrt"], -np.inf, np.inf)
    found = gradients(rounder, x)["high"]
    with torch.no_grad():
        rounder.high.mul_(1.01)
        more = rounder(x).sum().item()
        rounder.high.mul_(0.99 / 1.01)
        less = rounder(x).sum().item()
    assert found == pytest.approx((more - less) / 0.06, rel=1e-3)


def test_gradients_pass_to_what_is_rounded_and_not_to_what_is_cut_off():
    x = torch.tensor([[-0.5, 0.5, 1.5, 2.5]], requires_grad=True)
    LearnedFakeQuant(0.0, 2.0, QUANT_SCHEMES["ort-x86"], -np.inf, np.inf)(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("reduced", [False, True])
def test_weights_are_rounded_by_their_largest_magnitude(axis, reduced):
    scheme = dataclasses.replace(QUANT_SCHEMES["ort-x86"], reduce_range=reduced)
    weight = np.random.default_rng(0).normal(0, 1, (6, 5, 3, 3)).astype(np.float32)
    weight[2] = 0 if axis == 0 else weight[2]
    others = tuple(i for i in range(4) if i != axis)
    limit = 64 if reduced else 127
    largest = np.abs(weight).max(others, keepdims=True)
    scale = np.where(largest == 0, 1, largest / limit)
    want = np.round(weight / scale) * scale
    got, scales = fake_quantize_weight(torch.from_numpy(weight), axis, scheme)
    near_tie = np.abs(np.abs(weight / scale) % 1 - 0.5) < 1e-3
    np.testing.assert_allclose(np.where(near_tie, 0, got), np.where(near_tie, 0, want), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scales, scale.ravel(), rtol=1e-6)


def test_a_bias_is_whole_numbers_of_both_scales():
    bias = torch.tensor([0.5, -0.26], requires_grad=True)
    made = fake_quantize_bias(bias, torch.tensor([0.2, 0.1]))
    assert made.tolist() == pytest.approx([0.4, -0.3])
    made.sum().backward()
    assert bias.grad.tolist() == [1, 1]


def test_a_graph_answers_as_the_network_with_its_batchnorms_folded():
    network = settled_network(Foreign)
    x = torch.from_numpy(pictures(5)).contiguous(memory_format=torch.channels_last)
    graph = ExportedGraph(network, x[:2])
    assert graph.folds
    torch.testing.assert_close(graph.run(x)[graph.output], network(x), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_networks_own_parameters_and_leave_its_statistics(tmp_path):
    network = settled_network(Foreign).train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    quantized = rounding(tmp_path, network, "ort-x86")
    network.train()
    quantized(torch.from_numpy(pictures(8))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is not None for p in quantized.quantizers.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


@pytest.fixture(scope="module", params=[(Foreign, name) for name in NAMES] + [(zoo.Staged, "ort-x86")], ids=str)
def pair(request, tmp_path_factory):
    """A network that rounds in ranges that are no longer the calibrated ones, and its INT8 files."""
    build, name = request.param
    folder, network = tmp_path_factory.mktemp("pair"), settled_network(build)
    quantized = rounding(folder / "draft", network, name)
    with torch.no_grad():
        for number, rounder in quantized.quantizers.items():
            rounder.high.mul_(0.9 + 0.001 * int(number))
    delivery = Delivery(folder / "out", network, QUANT_SCHEMES[name])
    return name, network, quantized, delivery.quantized(quantized.learned_ranges())


def test_the_int8_file_answers_as_the_rounded_network(pair):
    name, network, quantized, files = pair
    assert quantized.missing == 0
    images = pictures(400, seed=2)
    with torch.no_grad():
        want = quantized(torch.from_numpy(images)).numpy()
    file = files.dynamic.file.path
    step = np.abs(want).max() / 127
    runs = (False,) if name == "tensorrt" else (False, True)  # of that form onnxruntime makes another one
    for optimised in runs:
        got = session.run_model(file, images, optimised)
        assert (got.argmax(1) == want.argmax(1)).mean() >= 0.995
        assert np.abs(got - want).mean() < 0.05 * step
    plain = network(torch.from_numpy(images)).detach().numpy()
    assert np.abs(plain - want).mean() > 5 * np.abs(got - want).mean()  # there is something to agree on


def test_learnt_scales_arrive_in_the_file_bit_for_bit(pair):
    name, _, quantized, files = pair
    wanted = {
        scale_and_zero_point(*rounder.bounds(), QUANT_SCHEMES[name])[0].item()
        for rounder in quantized.quantizers.values()
    }
    for model in (files.single, files.dynamic):
        graph = onnx.load(model.file.path).graph
        constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        found = {
            constants[n.input[1]].item()
            for n in graph.node
            if n.op_type == "QuantizeLinear" and n.input[0] not in constants
        }
        assert found == wanted


def test_ranges_without_a_learnt_one_stay_calibrated(tmp_path):
    network = settled_network(zoo.Toy)
    delivery = Delivery(tmp_path / "out", network, QUANT_SCHEMES["ort-x86"])
    known = fingerprints(delivery.exported.dynamic.file.path)
    one = LearnedRange(known["image"], -1.5, 1.25)
    made = apply_learned_ranges(tmp_path, delivery.exported, delivery.calibrated, [one])
    assert made.bounds == delivery.calibrated.bounds | {"image": (-1.5, 1.25)}


def test_ranges_of_another_network_are_refused(tmp_path):
    network = settled_network(zoo.Toy)
    learnt = rounding(tmp_path / "draft", network, "ort-x86").learned_ranges()
    other = settled_network(zoo.Toy, seed=5)
    delivery = Delivery(tmp_path / "out", other, QUANT_SCHEMES["ort-x86"])
    with pytest.raises(ModelError, match="has no tensor for .* ranges that were learned") as caught:
        delivery.quantized(learnt)
    assert "export the weights" in caught.value.hint


def test_a_mark_is_the_same_in_any_order_and_tells_others_apart():
    values = np.random.default_rng(0).normal(0, 1, (4, 3, 5, 5)).astype(np.float32)
    own = compute_fingerprint(values)
    assert compute_fingerprint(values.transpose(0, 2, 3, 1).ravel()) == pytest.approx(own)
    assert nearest_fingerprint(own, [compute_fingerprint(values * 1.01), compute_fingerprint(values + 1e-6)]) == 1
    assert nearest_fingerprint(own, [compute_fingerprint(values * 1.01)]) is None
    assert nearest_fingerprint(own, []) is None


def a_context(tmp_path, **settings):
    student, teacher = zoo.Toy(2), zoo.Toy(4).eval()
    course = TrainingPlan(5, TrainConfig(batch=16, precision="fp32"), Augment(), seed=0)
    trainer = build_trainer(zoo.blobs_dataset(tmp_path / "data"), course, torch.device("cpu"))
    return TrainingContext(student, (teacher,), 5, zoo.CLASSES, trainer.first_batches, Classification(), **settings)


def test_the_last_share_of_the_budget_is_the_rounded_students(tmp_path):
    ctx = a_context(tmp_path, quant_spec=lambda network: zoo.drafted(tmp_path / "draft", network))
    phases = []

    def run(phase):
        phases.append(phase)
        with torch.no_grad():
            losses = [{k: v.item() for k, v in phase.loss(batch).items()} for batch in ctx.first_batches(1)]
        return PhaseResult(losses[0], None)

    notes, learnt = {}, {}
    ctx = dataclasses.replace(ctx, log_choice=notes.__setitem__, save_ranges=learnt.__setitem__)
    students = run_phases(QuantAware(KD(), qat_fraction=0.4).phases(ctx), run)
    assert [(p.name, p.epochs) for p in phases] == [("kd", 3), ("int8", 2)]
    assert phases[-1].lr_span == (0.98, 1.0)
    assert ctx.student in phases[-1].trains and students["student"] is ctx.student
    assert notes["int8"]["student"]["ranges"] == len(learnt["student"]) > 0
    assert 0 <= notes["int8"]["student"]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"qat_fraction": 0.0}, "qat_fraction is 0"),
        ({"lr_start": 1.0}, "lr_start is 1"),
        ({"kd_weight": 2.0}, "kd_weight is 2"),
    ],
)
def test_impossible_settings_are_refused(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        QuantAware(KD(), **settings)


def test_a_lesson_without_a_target_is_refused_before_any_training(tmp_path):
    with pytest.raises(ConfigError, match="runs no INT8 file"):
        next(QuantAware(Supervised()).phases(a_context(tmp_path)))


def test_a_network_that_cannot_be_traced_says_why():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="torch cannot trace `Branching`"):
        ExportedGraph(Branching(), torch.zeros(2, 1, 8, 8))
