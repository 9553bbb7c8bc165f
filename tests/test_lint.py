"""The lint: a bad network for every rule, refused by the name of its node; good ones pass."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.cli import main
from edgekd.core.quant_scheme import get_scheme
from edgekd.errors import ConfigError, ModelError
from edgekd.stages.lint.lint import HARD, SOFT, findings, lint
from edgekd.stages.quantize.quantize import QuantizeConfig, quantize_file
from edgekd.targets._jetpack import jetpack, table

WIDTH = 32
RANDOM = np.random.default_rng(0)


class Net:
    """Nodes by name and constants by name, to be spoilt; (1, 32, 8, 8) to the same."""

    def __init__(self, opset=17, ir=8):
        self.opset, self.ir, self.nodes, self.numbers = opset, ir, {}, {}

    def node(self, name, kind, *reads, **attributes):
        self.nodes[name] = helper.make_node(kind, list(reads), [name], name, **attributes)
        return name

    def pair(self, stem, reads, scale=0.1, **axis):
        """Q and DQ, `STEM_q` and `STEM_d`."""
        self.numbers |= {f"{stem}_s": np.float32(scale), f"{stem}_z": np.zeros(np.shape(scale), np.int8)}
        half = self.node(f"{stem}_q", "QuantizeLinear", reads, f"{stem}_s", f"{stem}_z", **axis)
        return self.node(f"{stem}_d", "DequantizeLinear", half, f"{stem}_s", f"{stem}_z", **axis)

    def weight(self, stem, width=WIDTH, entering=WIDTH, kernel=1):
        self.numbers[stem] = RANDOM.normal(0, 1, (width, entering, kernel, kernel)).astype(np.float32)
        return self.pair(stem, stem, np.full(width, 0.1), axis=0)

    def conv(self, name, reads, **attributes):
        return self.node(name, "Conv", reads, self.weight(f"{name}_w"), **attributes)

    def wire(self, name, position, tensor):
        self.nodes[name].input[position] = tensor

    def model(self, output="y"):
        inner = helper.make_tensor_value_info
        values = [inner("x", TensorProto.FLOAT, [1, WIDTH, 8, 8]), inner(output, TensorProto.FLOAT, None)]
        numbers = [a if isinstance(a, TensorProto) else numpy_helper.from_array(a) for a in self.numbers.values()]
        for name, tensor in zip(self.numbers, numbers, strict=True):
            tensor.name = name
        graph = helper.make_graph(list(self.nodes.values()), "g", values[:1], values[1:], numbers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.ir)


def good(**versions):
    """x -> pair -> Conv with a float bias -> Relu -> y."""
    net = Net(**versions)
    net.numbers["b"] = np.zeros(WIDTH, np.float32)
    net.node("conv", "Conv", net.pair("x", "x"), net.weight("w"), "b")
    net.node("y", "Relu", "conv")
    return net


def found(net, version="6.2", level="error"):
    return {(f.rule, f.node) for f in findings(net.model(), jetpack(version)) if f.level == level}


# one bad network for every hard rule: rule, JetPack, nodes, network


def opset():
    return good(opset=21)


def operator():
    net = good()
    net.node("bad", "DynamicQuantizeLinear", "y")
    return net


def foreign_operator():
    net = good()
    net.nodes["y"] = helper.make_node("QGemm", ["conv"], ["y"], "y", domain="com.microsoft")
    return net


def computed_scale():
    net = good()
    net.numbers["before"] = net.numbers.pop("x_s")
    net.nodes = {"x_s": helper.make_node("Abs", ["before"], ["x_s"], "x_s")} | net.nodes
    return net


def spoilt(name, array):
    def make():
        net = good()
        net.numbers[name] = array
        return net

    return make


def without_zero_point():
    net = good()
    net.nodes["x_q"].input.pop()
    return net


def old_per_channel():
    return good(opset=12)


def without_axis():
    net = good()
    for name in ("w_q", "w_d"):
        del net.nodes[name].attribute[:]
    return net


def axis_of_inputs():
    net = good()
    for name in ("w_q", "w_d"):
        net.nodes[name].attribute[0].i = 1
    return net


def channels_of_the_image():
    net = good()
    net.numbers |= {"x_s": np.ones(WIDTH, np.float32), "x_z": np.zeros(WIDTH, np.int8)}
    for name in ("x_q", "x_d"):
        net.nodes[name].attribute.append(helper.make_attribute("axis", 1))
    return net


def few_scales():
    net = good()
    net.numbers |= {"w_s": np.ones(16, np.float32), "w_z": np.zeros(16, np.int8)}
    return net


def integer_weight():
    net = good()
    del net.nodes["w_q"]
    net.numbers["w"] = np.ones((WIDTH, WIDTH, 1, 1), np.int8)
    net.wire("w_d", 0, "w")
    return net


def integer_bias():
    net = good()
    net.numbers |= {"b": np.zeros(WIDTH, np.int32), "b_s": np.ones(WIDTH, np.float32), "b_z": np.zeros(WIDTH, np.int32)}
    bias = helper.make_node("DequantizeLinear", ["b", "b_s", "b_z"], ["b_d"], "b_d", axis=0)
    net.nodes = {"b_d": bias} | net.nodes
    net.wire("conv", 2, "b_d")
    return net


def asymmetric_softmax():
    net = good()
    net.node("z", "Conv", net.pair("s", net.node("soft", "Softmax", "y")), net.weight("v"))
    net.numbers["s_z"] = np.int8(-128)
    return net


def eighth(kind):
    return helper.make_tensor("", kind, [], [0])


BAD = [
    ("opset", "6.2", {"(the file)"}, opset),
    ("opset", "4.6", {"(the file)"}, lambda: good(opset=14)),
    ("operator", "6.2", {"bad"}, operator),
    ("operator", "7.2", {"y"}, foreign_operator),
    ("constant", "6.2", {"x_q", "x_d"}, computed_scale),
    ("scale-type", "6.2", {"x_q", "x_d"}, spoilt("x_s", np.float16(0.1))),
    ("scale-type", "6.2", {"x_q", "x_d"}, spoilt("x_s", np.float64(0.1))),
    ("scale-positive", "6.2", {"x_q", "x_d"}, spoilt("x_s", np.float32(0))),
    ("scale-positive", "6.2", {"w_q", "w_d"}, spoilt("w_s", np.full(WIDTH, np.nan, np.float32))),
    ("zero-point-written", "6.2", {"x_q"}, without_zero_point),
    ("zero-point-zero", "6.2", {"x_q", "x_d"}, spoilt("x_z", np.int8(3))),
    ("zero-point-zero", "6.2", {"s_q", "s_d"}, asymmetric_softmax),
    ("zero-point-size", "6.2", {"w_q", "w_d"}, spoilt("w_z", np.zeros(1, np.int8))),
    ("integer-type", "6.2", {"x_q", "x_d"}, spoilt("x_z", np.uint8(0))),
    ("integer-type", "6.2", {"x_q", "x_d"}, spoilt("x_z", np.int16(0))),
    ("integer-type", "6.2", {"x_q", "x_d"}, spoilt("x_z", eighth(TensorProto.FLOAT8E4M3FN))),
    ("integer-type", "6.2", {"x_q", "x_d"}, spoilt("x_z", eighth(TensorProto.INT4))),
    ("per-channel-activation", "6.2", {"x_q", "x_d"}, channels_of_the_image),
    ("per-channel-size", "6.2", {"w_q", "w_d"}, few_scales),
    ("per-channel-opset", "6.2", {"w_q", "w_d"}, old_per_channel),
    ("axis-written", "6.2", {"w_q", "w_d"}, without_axis),
    ("axis-place", "6.2", {"w_d"}, axis_of_inputs),
    ("folded-weight", "5.1", {"w_d"}, integer_weight),
    ("quantized-bias", "6.2", {"b_d"}, integer_bias),
]


def test_every_rule_has_a_network_that_breaks_it():
    assert {case[0] for case in BAD} == set(HARD) and {case[0] for case in POOR} == set(SOFT)


@pytest.mark.parametrize(("rule", "version", "nodes", "make"), BAD)
def test_what_tensorrt_refuses_is_an_error_with_its_nodes(rule, version, nodes, make):
    assert found(make(), version) == {(rule, node) for node in nodes}
    (fix,) = {f.fix for f in findings(make().model(), jetpack(version)) if f.level == "error"}
    assert fix


@pytest.mark.parametrize("version", [row.version for row in table().jetpacks])
def test_a_good_network_is_not_refused_by_any_jetpack(version):
    net = good(opset=13, ir=7)
    assert found(net, version) == found(net, version, "warning") == set()


def test_rules_loosen_where_a_newer_tensorrt_does():
    assert found(integer_weight(), "6.2") == set()  # from TensorRT 10
    net = good()
    net.nodes["w_d"].input.pop()  # the type of its integers is that of its Q
    assert found(net, "6.2") == set() and found(net, "6.0") == {("zero-point-written", "w_d")}
    net = good(opset=19)
    net.numbers["x_s"] = np.float16(0.1)
    assert found(net, "6.2") == set()


# slow, or not as it was meant


def high_ir():
    return good(ir=12)


def large_integer():
    net = good()
    net.numbers["shape"] = np.array([1, 2**40], np.int64)
    net.node("z", "Reshape", "y", "shape")
    return net


def half():
    net = good()
    net.wire("conv", 0, "x")
    del net.nodes["x_q"], net.nodes["x_d"]
    return net


def batchnorm():
    net = good()
    net.numbers |= {f"n{i}": np.ones(WIDTH, np.float32) for i in range(4)}
    net.node("norm", "BatchNormalization", "conv", "n0", "n1", "n2", "n3")
    return net


def before_relu():
    net = good()
    del net.nodes["y"]
    net.node("y", "Relu", net.pair("c", "conv"))
    return net


def block(branch, skip):
    """Conv and Relu, a second Conv and an Add, its inputs quantized or not, and a Conv."""
    net = good()
    into = net.pair("i", "y")
    ends = net.conv("second", into)
    left, right = net.pair("l", ends) if branch else ends, net.pair("r", "y") if skip else "y"
    net.conv("third", net.pair("t", net.node("sum", "Add", left, right)))
    return net


def pooled():
    net = good()
    net.wire("conv", 0, net.pair("p", net.node("pool", "MaxPool", "x_d", kernel_shape=[1, 1])))
    net.nodes["conv"], net.nodes["y"] = net.nodes.pop("conv"), net.nodes.pop("y")
    return net


def quantized_output():
    net = good()
    net.pair("o", "y")
    return net


def quantized_softmax():
    net = good()
    net.node("soft", "Softmax", net.pair("o", "y"))
    return net


def two_scales():
    net = good()
    net.conv("second", net.pair("i", "y", 0.1))
    net.conv("third", net.pair("j", "y", 0.2))
    return net


def concatenated():
    net = good()
    net.node("join", "Concat", net.pair("i", "y", 0.1), net.pair("j", "conv", 0.2), axis=1)
    net.nodes["v"] = helper.make_node("Conv", [net.pair("k", "join"), net.weight("v_w", entering=64)], ["v"], "v")
    return net


def padded():
    net = good()
    net.numbers["pads"] = np.zeros(8, np.int64)
    net.nodes = {"pad": helper.make_node("Pad", ["x", "pads"], ["pad"], "pad")} | net.nodes
    net.wire("x_q", 0, "pad")
    return net


def leaky():
    net = good()
    net.node("leak", "LeakyRelu", "conv")
    return net


def depthwise_silu():
    net = good()
    net.node("deep", "Conv", net.pair("i", "y"), net.weight("d_w", entering=1), group=WIDTH)
    net.node("swish", "Mul", "deep", net.node("gate", "Sigmoid", "deep"))
    return net


def thin():
    net = good()
    net.node("thin", "Conv", net.pair("i", "y"), net.weight("t_w", width=24))
    return net


POOR = [
    ("ir", "6.2", {"(the file)"}, high_ir),
    ("int64", "5.1", {"z"}, large_integer),
    ("half-quantized", "6.2", {"conv"}, half),
    ("unfolded-batchnorm", "6.2", {"norm"}, batchnorm),
    ("pair-before-activation", "6.2", {"c_d"}, before_relu),
    ("residual", "6.2", {"sum"}, lambda: block(True, True)),
    ("residual", "6.2", {"sum"}, lambda: block(True, False)),
    ("residual", "6.2", {"sum"}, lambda: block(False, False)),
    ("commuting-pair", "6.2", {"p_q"}, pooled),
    ("idle-pair", "6.2", {"o_d"}, quantized_output),
    ("idle-pair", "6.2", {"o_d"}, quantized_softmax),
    ("unequal-scales", "6.2", {"j_q"}, two_scales),
    ("unequal-scales", "6.2", {"join"}, concatenated),
    ("pair-behind-pad", "6.2", {"x_d"}, padded),
    ("old-fusion", "5.1", {"conv"}, leaky),
    ("old-fusion", "5.1", {"deep"}, depthwise_silu),
    ("channels", "6.2", {"thin"}, thin),
]


@pytest.mark.parametrize(("rule", "version", "nodes", "make"), POOR)
def test_what_is_slow_is_a_warning_with_its_nodes(rule, version, nodes, make):
    assert found(make(), version) == set()
    assert found(make(), version, "warning") == {(rule, node) for node in nodes}


def test_a_block_with_only_its_skip_quantized_is_right():
    assert found(block(False, True), level="warning") == set()


def test_nodes_without_a_name_are_named_by_what_they_make():
    net = good()
    net.numbers["x_z"] = np.int8(3)
    net.nodes["x_q"].name = ""
    assert ("zero-point-zero", "QuantizeLinear -> x_q") in found(net)


def test_constants_may_come_from_nodes_and_nodes_may_hide_in_branches():
    net = good()
    del net.numbers["x_s"]
    net.nodes = {"x_s": helper.make_node("Constant", [], ["x_s"], "x_s", value_float=-1.0)} | net.nodes
    inner = [helper.make_node("MatMulInteger", ["y", "y"], ["i"], "inner")]
    branch = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("i", TensorProto.INT32, None)])
    net.numbers["flag"] = np.array(True)
    net.nodes["z"] = helper.make_node("If", ["flag"], ["z"], "z", then_branch=branch, else_branch=branch)
    assert found(net) == {("scale-positive", "x_q"), ("scale-positive", "x_d"), ("operator", "inner")}


# whole files


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    """A residual network as another exporter may write it."""
    net, path = Net(opset=13, ir=7), tmp_path_factory.mktemp("float") / "float.onnx"
    for name in ("first", "second"):
        weight = RANDOM.normal(0, 0.05, (WIDTH, WIDTH, 3, 3)).astype(np.float32)
        net.numbers |= {f"{name}_w": weight, f"{name}_b": np.ones(WIDTH, np.float32)}
    net.node("first", "Conv", "x", "first_w", "first_b", pads=[1] * 4)
    net.node("second", "Conv", net.node("relu", "Relu", "first"), "second_w", "second_b", pads=[1] * 4)
    net.node("y", "Relu", net.node("sum", "Add", "second", "relu"))
    model = net.model()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, WIDTH, 8, 8]))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def inputs():
    return RANDOM.normal(0, 1, (4, WIDTH, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def default_file(float_file, inputs):
    """What onnxruntime's own quantizer writes when it is asked for nothing special: signed, QDQ."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([{"x": inputs[i : i + 1]} for i in range(len(inputs))])

        def get_next(self):
            return next(self.batches, None)

    path = float_file.with_name("default.onnx")
    quantize_static(float_file, path, Reader())
    return path


def test_onnxruntimes_default_file_is_refused_on_every_jetpack(default_file):
    for row in table().jetpacks:
        verdict = lint(default_file, row.version)
        broken = {f.rule for f in verdict.findings if f.level == "error"}
        assert broken == {"zero-point-zero", "quantized-bias"} | (
            {"folded-weight"} if row.tensorrt[0] == "8" else set()
        )
        assert [f.level for f in verdict.findings] == sorted(f.level for f in verdict.findings)  # errors first


def test_our_file_for_tensorrt_passes_on_every_jetpack_without_a_warning(float_file, inputs, tmp_path):
    made = quantize_file(float_file, tmp_path / "q.onnx", inputs, get_scheme("tensorrt"), QuantizeConfig())
    for row in table().jetpacks:
        assert lint(made.file.path, row.version).findings == ()


def test_a_float_file_passes(float_file):
    assert lint(float_file, "6.2").findings == ()


# the command


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["edgekd", "lint", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.main()
    return left.value.code


def test_the_command_fails_where_tensorrt_would(default_file, float_file, monkeypatch, capsys):
    assert command(monkeypatch, default_file, "--jetpack", "6.2") == 1
    said = capsys.readouterr().out
    assert "error: x_QuantizeLinear: its zero point is " in said
    assert "  fix: keep the bias float: quantize the FP32 file with `edgekd quantize --scheme tensorrt`" in said
    assert "TensorRT 10.3.0 of JetPack 6.2 will refuse it" in said.splitlines()[-1]
    assert command(monkeypatch, float_file, "--jetpack", "6.2") == 0
    assert "nothing that TensorRT 10.3.0 of JetPack 6.2 is known to refuse" in capsys.readouterr().out


def test_the_command_tells_machines_every_finding(default_file, monkeypatch, capsys):
    assert command(monkeypatch, default_file, "--jetpack", "5.1", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["jetpack"], said["tensorrt"]) == ("5.1", "8.5.2")
    assert said["errors"] + said["warnings"] == len(said["findings"]) > said["errors"] > 0
    assert set(said["findings"][0]) == {"level", "rule", "node", "fact", "fix"}


def test_what_cannot_be_judged_is_said(float_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="there is no JetPack `8.0`"):
        lint(float_file, "8.0")
    (tmp_path / "no.onnx").write_text("no network")
    with pytest.raises(ModelError, match="is not an ONNX file"):
        lint(tmp_path / "no.onnx", "6.2")
    assert command(monkeypatch, float_file, "--jetpack", "8.0") == 2
    assert "known: 4.6, 5.1, 6.0, 6.1, 6.2, 7.0, 7.1, 7.2" in capsys.readouterr().err
