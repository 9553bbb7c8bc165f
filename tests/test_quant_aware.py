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

from edgekd.core.artifact import File, Learnt
from edgekd.core.dataset import Augment
from edgekd.core.method import Lesson, Outcome, play
from edgekd.core.quant_scheme import DIALECTS
from edgekd.core.tensor_fingerprint import mark, nearest
from edgekd.errors import ConfigError, ModelError
from edgekd.methods.kd import KD
from edgekd.methods.quant_aware import QuantAware
from edgekd.methods.supervised import Supervised
from edgekd.onnx import session
from edgekd.stages.distill.setup import Course, a_trainer
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.quant_spec import learnt_ranges, marks
from edgekd.stages.quantize.quantize import quantize_with
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate
from edgekd.training.exported_graph import Graph
from edgekd.training.fake_quant import Rounder, Rounding, affine, rounded_bias, rounded_weight
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

    def __init__(self, folder, network, dialect, opset=13):
        folder.mkdir()
        images = pictures(32)
        np.savez(folder / "images.npz", image=images)
        self.folder, self.images, self.dialect = folder, File.of(folder / "images.npz"), dialect
        self.exported = export(folder, "student", network, images, None, ExportConfig(opset=opset))
        self.calibrated = calibrate(self.exported.dynamic.file.path, images, QuantizeConfig())

    def quantized(self, learnt):
        self.ranges = learnt_ranges(self.folder, self.exported, self.calibrated, learnt)
        return quantize_with(self.folder, self.exported, self.images, self.dialect, self.ranges)


def rounding(folder, network, name):
    dialect = DIALECTS[name]
    return Rounding(network, zoo.drafted(folder, network, dialect, pictures(32)), torch.from_numpy(pictures(2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", RANGES)
def test_scale_and_zero_point_are_those_of_onnxruntime(name, bounds):
    dialect = DIALECTS[name]
    first, last = {"ort-x86": (0, 255), "ort-arm": (-128, 127), "tensorrt": (-127, 127)}[name]
    kind = np.uint8 if first == 0 else np.int8
    ends = [np.array(end, np.float32) for end in bounds]
    zero, scale = compute_scale_zp(*ends, kind(first), kind(last), dialect.symmetric_activation)
    got, point = affine(*(torch.tensor(end) for end in ends), dialect)
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
    rounder = Rounder(*bounds, DIALECTS[name], -np.inf, np.inf)
    low, high = rounder.bounds()
    scale, zero = (t.detach().numpy() for t in affine(low, high, DIALECTS[name]))
    x = no_ties(np.random.default_rng(0).normal(0, 4, (5000,)).astype(np.float32), scale)[None]
    want = in_onnxruntime(x, scale, zero, np.uint8 if name == "ort-x86" else np.int8)
    got = rounder(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_ends_begin_at_the_calibrated_range_and_an_end_at_zero_stays():
    rounder = Rounder(-1.5, 2.5, DIALECTS["ort-x86"], -np.inf, np.inf)
    assert [end.item() for end in rounder.bounds()] == pytest.approx([-1.5, 2.5])
    rectified = Rounder(0.0, 2.5, DIALECTS["ort-x86"], -np.inf, np.inf)
    assert len(list(rectified.parameters())) == 1
    rectified.high.data.mul_(3)
    assert rectified.bounds()[0] == 0


def test_a_range_does_not_leave_the_clip_before_it():
    rounder = Rounder(0.0, 6.0, DIALECTS["ort-x86"], 0.0, 6.0)
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
    found = gradients(Rounder(-1.0, 2.0, DIALECTS[name], -np.inf, np.inf), x)
    assert found == pytest.approx({"high": 3, "low": 2}, rel=1e-2)  # but for the rounding of the zero point


def test_between_the_ends_the_step_has_the_gradient_of_lsq():
    x = torch.tensor([[0.3, 1.1, 1.9]])
    rounder = Rounder(0.0, 2.0, DIALECTS["ort-x86"], -np.inf, np.inf)
    scale = 2 / 255
    want = sum(round(v / scale) - v / scale for v in (0.3, 1.1, 1.9)) / 255
    assert gradients(rounder, x)["high"] == pytest.approx(want, abs=1e-5)


def test_a_numeric_derivative_agrees_where_there_is_one():
    """Symmetric ranges: above the end the answer is 127 steps, linear in the range."""
    x = torch.tensor([[50.0, 60.0]])
    rounder = Rounder(-3.0, 3.0, DIALECTS["tensorrt"], -np.inf, np.inf)
    found = gradients(rounder, x)["high"]
    with torch.no_grad():
        rounder.high.mul_(1.01)
        more = rounder(x).sum().item()
        rounder.high.mul_(0.99 / 1.01)
        less = rounder(x).sum().item()
    assert found == pytest.approx((more - less) / 0.06, rel=1e-3)


def test_gradients_pass_to_what_is_rounded_and_not_to_what_is_cut_off():
    x = torch.tensor([[-0.5, 0.5, 1.5, 2.5]], requires_grad=True)
    Rounder(0.0, 2.0, DIALECTS["ort-x86"], -np.inf, np.inf)(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("reduced", [False, True])
def test_weights_are_rounded_by_their_largest_magnitude(axis, reduced):
    dialect = dataclasses.replace(DIALECTS["ort-x86"], reduce_range=reduced)
    weight = np.random.default_rng(0).normal(0, 1, (6, 5, 3, 3)).astype(np.float32)
    weight[2] = 0 if axis == 0 else weight[2]
    others = tuple(i for i in range(4) if i != axis)
    limit = 64 if reduced else 127
    largest = np.abs(weight).max(others, keepdims=True)
    scale = np.where(largest == 0, 1, largest / limit)
    want = np.round(weight / scale) * scale
    got, scales = rounded_weight(torch.from_numpy(weight), axis, dialect)
    near_tie = np.abs(np.abs(weight / scale) % 1 - 0.5) < 1e-3
    np.testing.assert_allclose(np.where(near_tie, 0, got), np.where(near_tie, 0, want), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scales, scale.ravel(), rtol=1e-6)


def test_a_bias_is_whole_numbers_of_both_scales():
    bias = torch.tensor([0.5, -0.26], requires_grad=True)
    made = rounded_bias(bias, torch.tensor([0.2, 0.1]))
    assert made.tolist() == pytest.approx([0.4, -0.3])
    made.sum().backward()
    assert bias.grad.tolist() == [1, 1]


def test_a_graph_answers_as_the_network_with_its_batchnorms_folded():
    network = settled_network(Foreign)
    x = torch.from_numpy(pictures(5)).contiguous(memory_format=torch.channels_last)
    graph = Graph(network, x[:2])
    assert graph.folds
    torch.testing.assert_close(graph.run(x)[graph.answer], network(x), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_networks_own_parameters_and_leave_its_statistics(tmp_path):
    network = settled_network(Foreign).train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    quantized = rounding(tmp_path, network, "ort-x86")
    network.train()
    quantized(torch.from_numpy(pictures(8))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is not None for p in quantized.rounders.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


@pytest.fixture(scope="module", params=[(Foreign, name) for name in NAMES] + [(zoo.Staged, "ort-x86")], ids=str)
def pair(request, tmp_path_factory):
    """A network that rounds in ranges that are no longer the calibrated ones, and its INT8 files."""
    build, name = request.param
    folder, network = tmp_path_factory.mktemp("pair"), settled_network(build)
    quantized = rounding(folder / "draft", network, name)
    with torch.no_grad():
        for number, rounder in quantized.rounders.items():
            rounder.high.mul_(0.9 + 0.001 * int(number))
    delivery = Delivery(folder / "out", network, DIALECTS[name])
    return name, network, quantized, delivery.quantized(quantized.learnt())


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
        got = session.answers(file, images, optimised)
        assert (got.argmax(1) == want.argmax(1)).mean() >= 0.995
        assert np.abs(got - want).mean() < 0.05 * step
    plain = network(torch.from_numpy(images)).detach().numpy()
    assert np.abs(plain - want).mean() > 5 * np.abs(got - want).mean()  # there is something to agree on


def test_learnt_scales_arrive_in_the_file_bit_for_bit(pair):
    name, _, quantized, files = pair
    wanted = {affine(*rounder.bounds(), DIALECTS[name])[0].item() for rounder in quantized.rounders.values()}
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
    delivery = Delivery(tmp_path / "out", network, DIALECTS["ort-x86"])
    known = marks(delivery.exported.dynamic.file.path)
    one = Learnt(known["image"], -1.5, 1.25)
    made = learnt_ranges(tmp_path, delivery.exported, delivery.calibrated, [one])
    assert made.bounds == delivery.calibrated.bounds | {"image": (-1.5, 1.25)}


def test_ranges_of_another_network_are_refused(tmp_path):
    network = settled_network(zoo.Toy)
    learnt = rounding(tmp_path / "draft", network, "ort-x86").learnt()
    other = settled_network(zoo.Toy, seed=5)
    delivery = Delivery(tmp_path / "out", other, DIALECTS["ort-x86"])
    with pytest.raises(ModelError, match="has no tensor for .* ranges that were learnt") as caught:
        delivery.quantized(learnt)
    assert "export the weights" in caught.value.hint


def test_a_mark_is_the_same_in_any_order_and_tells_others_apart():
    values = np.random.default_rng(0).normal(0, 1, (4, 3, 5, 5)).astype(np.float32)
    own = mark(values)
    assert mark(values.transpose(0, 2, 3, 1).ravel()) == pytest.approx(own)
    assert nearest(own, [mark(values * 1.01), mark(values + 1e-6)]) == 1
    assert nearest(own, [mark(values * 1.01)]) is None
    assert nearest(own, []) is None


def a_lesson(tmp_path, **settings):
    student, teacher = zoo.Toy(2), zoo.Toy(4).eval()
    course = Course(5, TrainConfig(batch=16, precision="fp32"), Augment(), seed=0)
    trainer = a_trainer(zoo.blobs_task(tmp_path / "data"), course, torch.device("cpu"))
    return Lesson(student, (teacher,), 5, zoo.CLASSES, trainer.sample, **settings)


def test_the_last_share_of_the_budget_is_the_rounded_students(tmp_path):
    lesson = a_lesson(tmp_path, blueprint=lambda network: zoo.drafted(tmp_path / "draft", network))
    phases = []

    def run(phase):
        phases.append(phase)
        with torch.no_grad():
            losses = [{k: v.item() for k, v in phase.loss(batch).items()} for batch in lesson.sample(1)]
        return Outcome(losses[0], None)

    notes, learnt = {}, {}
    lesson = dataclasses.replace(lesson, note=notes.__setitem__, learnt=learnt.__setitem__)
    students = play(QuantAware(KD(), share=0.4).teach(lesson), run)
    assert [(p.name, p.epochs) for p in phases] == [("kd", 3), ("int8", 2)]
    assert phases[-1].span == (0.98, 1.0)
    assert lesson.student in phases[-1].trains and students["student"] is lesson.student
    assert notes["int8"]["student"]["ranges"] == len(learnt["student"]) > 0
    assert 0 <= notes["int8"]["student"]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("settings", "cause"),
    [({"share": 0.0}, "share is 0"), ({"start": 1.0}, "start is 1"), ({"weight": 2.0}, "weight is 2")],
)
def test_impossible_settings_are_refused(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        QuantAware(KD(), **settings)


def test_a_lesson_without_a_target_is_refused_before_any_training(tmp_path):
    with pytest.raises(ConfigError, match="no INT8 file to learn for"):
        next(QuantAware(Supervised()).teach(a_lesson(tmp_path)))


def test_a_network_that_cannot_be_traced_says_why():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="torch cannot trace `Branching`"):
        Graph(Branching(), torch.zeros(2, 1, 8, 8))
