"""Schemes: one pass over the calibration images, and from it what each runtime takes, node by node."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.cli import main
from edgekd.core import quant_scheme
from edgekd.core.artifact import File
from edgekd.core.quant_scheme import QuantScheme
from edgekd.core.step_cache import StepCache
from edgekd.errors import ConfigError, ModelError
from edgekd.onnx import session
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.lint.lint import lint
from edgekd.stages.quantize.calibration_cache import tag, write_cache
from edgekd.stages.quantize.file_api import SchemeChoice, quantize_by_name
from edgekd.stages.quantize.qdq import quantize_explicit
from edgekd.stages.quantize.quantize import Int8Options, write_int8, write_int8_files
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate_step
from edgekd.targets.openvino import OpenVino
from tests import zoo

GRAPHS = ("ort-x86", "ort-arm", "openvino", "tensorrt")  # the schemes that are ONNX files
WIDTH = 32


def conv(entering, leaving, kernel=3, stride=1):
    return nn.Sequential(nn.Conv2d(entering, leaving, kernel, stride, kernel // 2), nn.BatchNorm2d(leaving))


class Residual(nn.Module):
    """A block with an identity skip, one with a projection; (N, 3, 16, 16) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, WIDTH), conv(WIDTH, WIDTH), conv(WIDTH, WIDTH)
        self.c, self.d, self.project = conv(WIDTH, WIDTH, stride=2), conv(WIDTH, WIDTH), conv(WIDTH, WIDTH, 1, 2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        x = (x + self.b(self.a(x).relu())).relu()
        x = (self.project(x) + self.d(self.c(x).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def inputs():
    return np.random.default_rng(0).normal(0.2, 1, (32, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory):
    torch.manual_seed(0)
    network = Residual()
    for _ in range(10):  # for the statistics of the BatchNorms
        network(torch.from_numpy(inputs))
    return export(tmp_path_factory.mktemp("export"), "toy", network, inputs[:4], zoo.logits(5), ExportConfig())


@pytest.fixture(scope="module")
def images(inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("calib") / "images.npz"
    np.savez(path, image=inputs)
    return File.of(path)


@pytest.fixture(scope="module")
def ranges(exported, images, tmp_path_factory):
    """As a build has them: the one pass is a step of the cache, and is read back from there."""
    cache = StepCache(tmp_path_factory.mktemp("cache"))
    found = cache.step("calibrate", calibrate_step, exported, images, QuantizeConfig())
    assert found == calibrate_step(Path(), exported, images, QuantizeConfig())
    return found


@pytest.fixture(scope="module")
def made(exported, inputs, ranges, tmp_path_factory):
    """A file for each scheme, all from the same statistics."""
    out, source = tmp_path_factory.mktemp("schemes"), exported.single.file.path
    files = {
        n: write_int8(source, out / f"{n}.onnx", inputs, ranges, Int8Options(quant_scheme.get_scheme(n))).file.path
        for n in GRAPHS
    }
    return files | {"dla": write_cache(source, out / "dla.cache", "8.5.2", ranges).file.path}


class Graph:
    def __init__(self, path):
        self.graph = onnx.load(path).graph
        self.numbers = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def all(self, kind):
        return [node for node in self.graph.node if node.op_type == kind]

    def pair(self, name):
        """The Q and DQ that make a tensor; None for a float one."""
        back = self.makers.get(name)
        if back is None or back.op_type != "DequantizeLinear":
            return None
        return self.makers.get(back.input[0]), back

    def hidden(self, name):
        return self.pair(name)[0].input[0]


def amax(ranges, name):
    return np.abs(ranges.bounds[name]).max()


# what all share


def test_there_are_five_schemes_and_a_wrong_name_is_answered_with_the_nearest():
    assert set(quant_scheme.QUANT_SCHEMES) == {*GRAPHS, "dla"}
    with pytest.raises(ConfigError, match="did you mean `tensorrt`"):
        quant_scheme.get_scheme("tensort")


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_scheme_answers_close_to_the_float_network(exported, made, inputs, name, optimised):
    want = session.run_model(exported.single.file.path, inputs)
    got = session.run_model(made[name], inputs, optimised)
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_all_schemes_have_the_same_ranges(made, ranges):
    low, high = ranges.bounds["image"]
    step = {n: Graph(made[n]).numbers["image_scale"].item() for n in GRAPHS}
    assert low < 0 < high
    for name in ("ort-x86", "ort-arm", "openvino"):
        assert step[name] == pytest.approx((high - low) / 255, rel=1e-6)
    assert step["tensorrt"] == pytest.approx(max(-low, high) / 127, rel=1e-6)
    assert cached(made["dla"])["image"] == step["tensorrt"]


def test_both_files_of_a_student_are_quantized_from_the_ranges(exported, images, ranges, inputs, tmp_path):
    both = write_int8_files(tmp_path, exported, images, ranges, Int8Options(quant_scheme.get_scheme("tensorrt")))
    single, dynamic = (session.run_model(m.file.path, inputs) for m in (both.single, both.dynamic))
    assert np.abs(single - dynamic).max() < 1e-5 * np.abs(single).max()
    assert both.single.parameters == exported.single.parameters and both.single.precision == "int8"
    (tmp_path / "again").mkdir()
    again = write_int8_files(
        tmp_path / "again", exported, images, ranges, Int8Options(quant_scheme.get_scheme("tensorrt"))
    )
    assert again.single.file.sha256 == both.single.file.sha256


# one by one


@pytest.mark.parametrize(
    ("name", "kind"), [("ort-x86", np.uint8), ("ort-arm", np.int8), ("openvino", np.uint8)], ids=lambda v: str(v)
)
def test_for_cpus_weights_and_biases_are_integers_and_activations_asymmetric(made, name, kind):
    graph = Graph(made[name])
    for node in (*graph.all("Conv"), *graph.all("Gemm")):
        entering, weight, bias = (graph.pair(tensor) for tensor in node.input)
        assert graph.numbers[entering[0].input[2]].dtype == kind
        assert weight[0] is None and graph.numbers[weight[1].input[0]].dtype == np.int8
        assert not graph.numbers[weight[1].input[2]].any()
        assert graph.numbers[weight[1].input[1]].size == graph.numbers[weight[1].input[0]].shape[0]
        assert bias[0] is None and graph.numbers[bias[1].input[0]].dtype == np.int32
    assert graph.numbers["image_zero_point"].item() != 0
    for node in graph.all("Add"):
        assert all(graph.pair(tensor) for tensor in node.input)


def test_openvino_reads_its_scheme_and_answers_alike(exported, images, ranges, inputs, tmp_path):
    """In the form for this processor: OpenVINO's kernels saturate as onnxruntime's do where there is no VNNI."""
    ov = pytest.importorskip("openvino")
    made = write_int8_files(tmp_path, exported, images, ranges, Int8Options(OpenVino().scheme)).single.file.path
    compiled = ov.Core().compile_model(str(made), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = np.concatenate([compiled(inputs[i : i + 1])[0].copy() for i in range(len(inputs))])
    want = session.run_model(made, inputs)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    kinds = {op.get_element_type().to_string() for op in compiled.get_runtime_model().get_ops() if is_conv(op)}
    assert kinds == {"u8"}  # what the convolutions write: they run in INT8


def is_conv(op):
    return op.get_rt_info()["layerType"].astype(str) == "Convolution"


def test_for_tensorrt_every_weighted_operator_reads_two_signed_pairs_and_a_float_bias(made, ranges):
    graph = Graph(made["tensorrt"])
    weighted = [*graph.all("Conv"), *graph.all("Gemm")]
    assert len(weighted) == 7
    for node in weighted:
        (quantize, dequantize), weight = graph.pair(node.input[0]), graph.pair(node.input[1])
        assert quantize.input[1:] == dequantize.input[1:] and weight[0].input[1:] == weight[1].input[1:]
        tensor, scale, zero = quantize.input
        assert graph.numbers[scale].shape == () and graph.numbers[scale].dtype == np.float32
        assert graph.numbers[scale].item() == pytest.approx(amax(ranges, tensor) / 127, rel=1e-6)
        assert graph.numbers[zero].dtype == np.int8 and graph.numbers[zero].shape == () and graph.numbers[zero] == 0
        tensor, scale, zero = weight[0].input
        assert graph.numbers[tensor].dtype == np.float32
        largest = np.abs(graph.numbers[tensor]).reshape(len(graph.numbers[tensor]), -1).max(1)
        assert graph.numbers[scale] == pytest.approx(largest / 127, rel=1e-6)
        assert graph.numbers[zero].dtype == np.int8 and graph.numbers[zero].shape == largest.shape
        for half in weight:
            assert [(a.name, a.i) for a in half.attribute] == [("axis", 0)]
        assert graph.numbers[node.input[2]].dtype == np.float32


def test_for_tensorrt_only_the_skip_of_an_add_is_quantized(made):
    graph = Graph(made["tensorrt"])
    first, second = graph.all("Add")
    identity, projection = 0, 0  # as Residual writes them
    assert graph.pair(first.input[1 - identity]) is None and graph.pair(second.input[1 - projection]) is None
    assert graph.makers[graph.hidden(first.input[identity])].op_type == "MaxPool"
    assert len(graph.makers[graph.hidden(second.input[projection])].input) == 3  # the shortcut convolution itself
    shared = [n for n in graph.all("Conv") if n.input[0] == first.input[identity]]
    assert len(shared) == 1  # the skip and the first convolution of its block read the same pair
    assert graph.makers[second.input[1 - projection]].op_type == "Conv"


def test_for_tensorrt_nothing_else_is_quantized(made):
    graph = Graph(made["tensorrt"])
    quantized = [n for n in graph.graph.node if any(graph.pair(tensor) for tensor in n.input)]
    assert {n.op_type for n in quantized} == {"Conv", "Gemm", "Add"}
    assert len(graph.all("QuantizeLinear")) == len(graph.all("DequantizeLinear")) == 14
    # 7 weights, the image, what enters a, b, c (and the projection), d and the head, and the projection's output
    assert len(graph.all("Relu")) == 5


def test_for_tensorrt_lint_finds_nothing(made):
    assert lint(made["tensorrt"], "6.2").findings == ()


def cached(path):
    first, *rest = path.read_text().splitlines()
    assert first == "TRT-8502-EntropyCalibration2"
    pairs = [line.rsplit(": ", 1) for line in rest]
    return {name: struct.unpack(">f", bytes.fromhex(bits.zfill(8)))[0] for name, bits in pairs}


def test_for_a_dla_every_float_tensor_of_the_network_has_its_scale(made, exported, ranges):
    found = cached(made["dla"])
    graph = onnx.load(exported.single.file.path).graph
    computed = {name for node in graph.node for name in node.output if node.op_type != "Constant"}
    assert set(found) == {"image"} | computed
    for name, scale in found.items():
        assert scale == pytest.approx(amax(ranges, name) / 127, rel=1e-6)


def test_the_cache_reads_as_tensorrt_writes_its_own(tmp_path, exported, ranges):
    """A line of a table that TensorRT 7.1.3 wrote, quoted in onnxruntime's sources: data_0: 4000889d."""
    value = 127 * struct.unpack(">f", bytes.fromhex("4000889d"))[0]
    bounds = ranges.bounds | {"image": (-value, 1.0)}
    path = write_cache(exported.single.file.path, tmp_path / "c", "10.3.0", replace(ranges, bounds=bounds)).file.path
    assert path.read_text().splitlines()[:2] == ["TRT-100300-EntropyCalibration2", "image: 4000889d"]
    assert [tag(v)[4:-20] for v in ("8.0.1", "8.2.1", "8.5.2.2", "10.13.3")] == ["8001", "8201", "8502", "101303"]


# placement in graphs that torch's exporter does not write


def handmade(nodes, weights, opset=17):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["any"]) for n in "xy"]
    numbers = [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], numbers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def pairs_of(model):
    """Reader -> position -> axis of the pair there; -1 stands for a single scale."""
    quantize_explicit(model, {n: (-1.0, 1.0) for node in model.graph.node for n in (*node.input, *node.output)}, True)
    onnx.checker.check_model(model)
    graph = model.graph
    axes = {n.output[0]: next((a.i for a in n.attribute), -1) for n in graph.node if n.op_type == "DequantizeLinear"}
    return {n.name: {i: axes[t] for i, t in enumerate(n.input) if t in axes} for n in graph.node if n.name in "abcdef"}


def test_the_axis_is_that_of_the_output_channels():
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["h"], "a"),
        helper.make_node("MatMul", ["h", "m"], ["i"], "b"),
        helper.make_node("Gemm", ["i", "g"], ["j"], "c"),
        helper.make_node("Gemm", ["j", "g"], ["k"], "d", transB=1),
        helper.make_node("MatMul", ["k", "stack"], ["y"], "e"),
    ]
    weights = {"w": np.ones((2, 3, 1, 1)), "m": np.ones((2, 3)), "g": np.ones((4, 4)), "stack": np.ones((5, 4, 4))}
    found = pairs_of(handmade(nodes, weights))
    assert found == {
        "a": {0: -1, 1: 1},
        "b": {0: -1, 1: 1},
        "c": {0: -1, 1: 1},
        "d": {0: -1, 1: 0},
        "e": {0: -1, 1: -1},
    }


def test_a_bias_is_never_quantized_and_a_branch_may_end_in_one():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "a"),
        helper.make_node("Add", ["bias", "h"], ["i"], "b"),
        helper.make_node("Add", ["i", "x"], ["y"], "c"),
    ]
    found = pairs_of(handmade(nodes, {"w": np.ones((4, 4)), "bias": np.ones(4)}))
    assert found == {"a": {0: -1, 1: 1}, "b": {}, "c": {1: -1}}


def test_adds_without_a_branch_of_their_own_stay_float():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "a"),
        helper.make_node("Relu", ["h"], ["i"], "b"),
        helper.make_node("Add", ["i", "x"], ["j"], "c"),  # the ReLU stands between
        helper.make_node("Add", ["h", "j"], ["k"], "d"),  # h has two readers
        helper.make_node("Add", ["k", "k"], ["y"], "e"),
    ]
    found = pairs_of(handmade(nodes, {"w": np.ones((4, 4, 1, 1))}))
    assert found == {"a": {0: -1, 1: 0}, "b": {}, "c": {}, "d": {}, "e": {}}


def test_products_of_activations_are_quantized_and_computed_weights_are_not():
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["h"], "a"),
        helper.make_node("Conv", ["h", "x"], ["i"], "b"),
        helper.make_node("MatMul", ["w", "i"], ["y"], "c"),
    ]
    found = pairs_of(handmade(nodes, {"w": np.ones((4, 4))}))
    assert found == {"a": {0: -1, 1: -1}, "b": {}, "c": {}}


def test_dead_channels_get_a_scale_above_zero():
    model = handmade([helper.make_node("Conv", ["x", "w"], ["y"], "a")], {"w": np.zeros((2, 1, 1, 1))})
    quantize_explicit(model, {"x": (0.0, 0.0)}, True)
    numbers = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert numbers["x_scale"] == 1 and (numbers["w_axis0_scale"] == 1).all()
    single = quantize_explicit(
        handmade([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": [[[[2.0]]]]}), {"x": (0, 1)}, False
    )
    assert numpy_helper.to_array(single.graph.initializer[3]) == pytest.approx(2 / 127)


# what is refused


def test_a_tensor_without_a_range_is_refused(exported, inputs, ranges, tmp_path):
    less = replace(ranges, bounds={n: b for n, b in ranges.bounds.items() if n != "image"})
    with pytest.raises(ModelError, match="edgekd cannot quantize .*no range is known for the tensor `image`"):
        write_int8(
            exported.single.file.path,
            tmp_path / "q.onnx",
            inputs,
            less,
            Int8Options(quant_scheme.get_scheme("tensorrt")),
        )
    with pytest.raises(ModelError, match="computes `image`, which is folded away before the calibration"):
        write_cache(exported.single.file.path, tmp_path / "q.cache", "8.5.2", less)


def test_forms_that_tensorrt_does_not_take_are_no_schemes(exported, inputs, ranges, tmp_path):
    with pytest.raises(ConfigError, match="the format `qdq_explicit` is TensorRT's"):
        QuantScheme("uint8", symmetric_activation=True, format="qdq_explicit")
    with pytest.raises(ConfigError, match="the format `calibration_cache` is TensorRT's"):
        QuantScheme("int8", symmetric_activation=True, reduce_range=True, format="calibration_cache")
    with pytest.raises(ConfigError, match="`calibration_cache` has no INT8 ONNX file"):
        write_int8(
            exported.single.file.path, tmp_path / "q.onnx", inputs, ranges, Int8Options(quant_scheme.get_scheme("dla"))
        )


# by name


@pytest.mark.parametrize("name", GRAPHS)
def test_a_file_is_quantized_in_the_scheme_that_is_named(exported, images, made, tmp_path, name):
    source = exported.dynamic.file.path
    found = quantize_by_name(source, images.path, tmp_path / "q.onnx", SchemeChoice(scheme=name), {})
    nodes = [(n.op_type, n.name) for n in onnx.load(found.file.path).graph.node if n.op_type == "QuantizeLinear"]
    assert nodes == [(n.op_type, n.name) for n in onnx.load(made[name]).graph.node if n.op_type == "QuantizeLinear"]


def test_the_command_writes_a_calibration_cache(exported, images, made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "toy.cache"
    arguments = [str(exported.single.file.path), "--calib", str(images.path), "-o", str(out), "--scheme", "dla"]
    assert command(monkeypatch, "quantize", *arguments) == 2
    assert "a calibration cache is for one TensorRT\n\nhint: give --jetpack, one of 4.6" in capsys.readouterr().err
    assert command(monkeypatch, "quantize", *arguments, "--jetpack", "5.1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tensors"], said["tensorrt"]) == (len(cached(out)), "8.5.2")
    assert cached(out).keys() == cached(made["dla"]).keys()


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["edgekd", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    return left.value.code


@pytest.mark.parametrize(
    ("names", "out", "sentence"),
    [
        (("cpu", "tensorrt", None), "q.onnx", "a target has its own scheme"),
        ((None, "tensorrt", "6.2"), "q.onnx", "only a calibration cache is written for one JetPack"),
        ((None, "dla", "7.0"), "q.cache", "TensorRT 10.13.3 of JetPack 7.0 supports no DLA"),
        ((None, "dla", "6.2"), "q.onnx", "is no name for a calibration cache"),
    ],
)
def test_names_that_do_not_go_together_are_refused(exported, images, tmp_path, names, out, sentence):
    with pytest.raises(ConfigError, match=sentence):
        quantize_by_name(exported.single.file.path, images.path, tmp_path / out, SchemeChoice(*names), {})
    assert not (tmp_path / out).exists()
