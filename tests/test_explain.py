"""Explain: every reason for a slow or inexact INT8 file is found in a network that was made for it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from edgekd.cli import main
from edgekd.core.quant_scheme import get_scheme
from edgekd.errors import ConfigError
from edgekd.onnx import inspect
from edgekd.onnx.graph import GraphView
from edgekd.stages.explain import explain, ort_profile, speed_causes
from edgekd.stages.explain.accuracy_causes import accuracy_causes
from edgekd.stages.explain.float_regions import KERNELS, find_float_regions
from edgekd.stages.explain.layer_error import LayerError, layer_errors
from edgekd.stages.explain.layers import form, layers
from edgekd.stages.explain.result import as_json, format_explanation
from edgekd.stages.explain.speed_causes import Diagnosis
from edgekd.stages.quantize.quantize import QuantizeConfig, quantize_file
from edgekd.targets.cpu import this_arch
from edgekd.utils.cpu import VNNI, flags

RANDOM = np.random.default_rng(0)
CHANNELS, SIZE = 32, 24
X86 = pytest.mark.skipif(this_arch() != "x86", reason="signed activations are slow on x86 only")
FAST = pytest.mark.skipif(not VNNI & set(flags()), reason="INT8 is not fast on this processor")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ort_profile, "SECONDS", 0.1)
    monkeypatch.setattr(explain, "BLOCKS", 4)
    monkeypatch.setattr(explain, "BLOCK_S", 0.02)


class Net:
    """(1, 32, 24, 24) to (1, 10): nodes and constants by name."""

    def __init__(self):
        self.nodes, self.numbers = [], {}

    def node(self, name, op, *reads, **attributes):
        self.nodes.append(helper.make_node(op, list(reads), [f"{name}_y"], name, **attributes))
        return f"{name}_y"

    def conv(self, name, reads, kernel=3, weight=None, **attributes):
        shape = (CHANNELS, CHANNELS // attributes.get("group", 1), kernel, kernel)
        weight = RANDOM.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape) if weight is None else weight
        self.numbers |= {f"{name}_w": weight.astype(np.float32), f"{name}_b": np.zeros(CHANNELS, np.float32)}
        return self.node(name, "Conv", reads, f"{name}_w", f"{name}_b", pads=[kernel // 2] * 4, **attributes)

    def head(self, reads):
        self.numbers["fc_w"] = RANDOM.normal(0, 1, (10, CHANNELS)).astype(np.float32)
        flat = self.node("flat", "Flatten", self.node("pool", "GlobalAveragePool", reads))
        return self.node("fc", "Gemm", flat, "fc_w", transB=1)

    def pair(self, name, reads, scale=0.05, zero=0, kind=np.uint8):
        self.numbers |= {f"{name}_s": np.asarray(scale, np.float32), f"{name}_z": np.full(np.shape(scale), zero, kind)}
        half = self.node(f"{name}_q", "QuantizeLinear", reads, f"{name}_s", f"{name}_z")
        return self.node(f"{name}_d", "DequantizeLinear", half, f"{name}_s", f"{name}_z")

    def save(self, path, output, shape=(1, CHANNELS, SIZE, SIZE)):
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        values += [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        numbers = [numpy_helper.from_array(array, name) for name, array in self.numbers.items()]
        graph = helper.make_graph(self.nodes, "g", values[:1], values[1:], numbers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path


class Feed(CalibrationDataReader):
    def __init__(self, inputs):
        self.rows = iter(inputs)

    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


def inputs(count=8):
    return np.random.default_rng(1).normal(0, 1, (count, CHANNELS, SIZE, SIZE)).astype(np.float32)


def chain(path, activation="Relu"):
    """A residual network of four convolutions."""
    net = Net()
    skip = net.node("a1", activation, net.conv("c1", "x"))
    branch = net.conv("c3", net.node("a2", activation, net.conv("c2", skip)))
    return net.save(path, net.head(net.node("a3", activation, net.node("add", "Add", skip, branch))))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The FP32 network, and what tools make of it."""
    folder = tmp_path_factory.mktemp("files")
    made = {kind: chain(folder / f"{kind}.onnx", kind) for kind in ("Relu", "HardSwish")}

    def static(name, source, **options):
        made[name] = folder / f"{name}.onnx"
        quantize_static(source, made[name], Feed(inputs()), **options)

    static("signed", made["Relu"], quant_format=QuantFormat.QDQ)
    signed = {"activation_type": QuantType.QInt8, "per_channel": True}
    unsigned = {"activation_type": QuantType.QUInt8}
    static("signed-qoperator", made["Relu"], quant_format=QuantFormat.QOperator, **signed)
    static("qoperator", made["Relu"], quant_format=QuantFormat.QOperator, **unsigned)
    static("hardswish", made["HardSwish"], quant_format=QuantFormat.QDQ, **unsigned, per_channel=True)
    made["dynamic"] = folder / "dynamic.onnx"
    quantize_dynamic(made["Relu"], made["dynamic"], weight_type=QuantType.QUInt8)
    for scheme in ("ort-x86", "tensorrt"):
        made[scheme] = folder / f"{scheme}.onnx"
        quantize_file(made["Relu"], made[scheme], inputs(), get_scheme(scheme), QuantizeConfig())
    made["images"] = folder / "images.npz"
    np.savez(made["images"], image=inputs(16))
    return made


def view(path):
    return GraphView(inspect.load(path))


def case(path, reference=None):
    paths = (path,) if reference is None else (path, reference)
    own, *base = ort_profile.profile_files(paths, inputs(2), 1)
    seen = view(path)
    return Diagnosis(form(seen), layers(seen), own, find_float_regions(seen, own), *base)


# speed


@X86
@pytest.mark.parametrize("name", ["signed", "signed-qoperator", "tensorrt"])
def test_signed_activations_are_told_on_x86(files, name):
    first = speed_causes.speed_causes(case(files[name]))[0]
    assert "signed (int8)" in first.verdict and "ort-x86" in first.fix and "QUInt8" in first.other_tools
    assert first.share > 0.3


@X86
def test_pairs_are_left_around_an_operator_without_an_integer_kernel(files):
    seen = case(files["hardswish"])
    lost = [one for one in seen.float_regions if one.floats]
    assert {sentence for one in lost for _, sentence in one.reasons} == {
        "onnxruntime has no integer kernel for HardSwish"
    }
    assert len(lost) == 3 and all(one.pairs == 2 for one in lost)
    assert ("c1", "c2") in [one.between[:2] for one in lost]
    found = speed_causes.speed_causes(seen)
    assert "HardSwish (3 places)" in found[0].verdict and "6 Q/DQ" in found[0].verdict


def test_dynamic_quantization_is_told(files):
    seen = case(files["dynamic"], files["Relu"])
    assert seen.form == "dynamic" and {layer.activation for layer in seen.layers} == {"dynamic"}
    assert any("static ranges" in cause.fix for cause in speed_causes.speed_causes(seen))


@X86
def test_a_pair_is_missed_where_it_is_missing(tmp_path):
    """x -> pair -> MaxPool -> pair of another scale -> MatMul with a float weight -> pair; -> AveragePool -> Tanh."""
    net = Net()
    moved = net.node("move", "MaxPool", net.pair("in", "x", 0.05), kernel_shape=[2, 2], strides=[2, 2])
    net.numbers["w"] = RANDOM.normal(0, 1, (SIZE // 2, 7)).astype(np.float32)
    product = net.node("product", "MatMul", net.pair("mid", moved, 0.06), "w")
    pooled = net.node("pool", "AveragePool", net.pair("out", product), kernel_shape=[2, 2])
    found = reasons(net.save(tmp_path / "net.onnx", net.node("y", "Tanh", pooled)))
    assert "the scales before and behind MaxPool `move` differ" in found
    assert "the weight of MatMul `product` has no Q/DQ pair" in found
    assert "the output of AveragePool `pool` is not quantized: Tanh `y` reads it" in found
    assert "onnxruntime has no integer kernel for Tanh" in found


@X86
def test_scales_that_no_integer_kernel_takes_are_told(tmp_path):
    """An activation with a scale for each channel, as NNCF writes it before depthwise convolutions; a zero of 100."""
    net = Net()
    both = (net.pair("in", "x"), net.pair("middle", "x", zero=128))
    added = net.pair("sum", net.node("relu", "Relu", net.node("add", "Add", *both)), zero=100)
    deep = net.conv("deep", net.pair("wide", added, np.linspace(0.04, 0.05, CHANNELS)), group=CHANNELS)
    found = reasons(net.save(tmp_path / "net.onnx", net.pair("out", deep)))
    assert "the zero of `relu_y` is 100, not the lowest uint8: its Relu stays" in found
    assert any(sentence.startswith("activations have a scale for each channel") for sentence in found)


@X86
def test_a_layer_that_was_kept_float_is_called_so(tmp_path):
    """edgekd writes equal scales for all channels before it, so that onnxruntime leaves it float."""
    net = Net()
    deep = net.conv("deep", net.pair("wide", "x", np.full(CHANNELS, 0.05)))
    found = reasons(net.save(tmp_path / "net.onnx", net.pair("out", deep)))
    assert "the weight of Conv `deep` has no Q/DQ pair" in found


def test_inner_layers_of_a_rescaled_network_are_not_compared(tmp_path):
    """Their channels are other numbers than those of the FP32 file, by design."""
    net = Net()
    fp32 = net.save(tmp_path / "fp32.onnx", net.head(net.conv("two", net.node("relu", "Relu", net.conv("one", "x")))))
    images = RANDOM.normal(0, 1, (16, CHANNELS, SIZE, SIZE)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images)
    for equalize in (False, True):
        made = tmp_path / f"int8-{equalize}.onnx"
        quantize_file(fp32, made, images, get_scheme("ort-x86"), QuantizeConfig(cross_layer_equalization=equalize))
        told = explain.explain(made, fp32, tmp_path / "images.npz")
        assert bool(told.losses) != equalize
        assert any("rescaled (cross_layer_equalization)" in note for note in told.notes) == equalize


def reasons(path):
    return {sentence for one in case(path).float_regions for _, sentence in one.reasons}


POOL = {"kernel_shape": [2, 2]}
SETTINGS = {"MaxPool": POOL, "AveragePool": POOL, "Transpose": {"perm": [0, 2, 3, 1]}, "Concat": {"axis": 1}}
UNARY = ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax", "MaxPool", "Transpose", "Flatten")


@X86
@pytest.mark.parametrize("op", [*UNARY, "Add", "Mul", "Concat", "Tanh", "HardSigmoid", "Elu", "Sub", "ReduceMean"])
def test_integer_kernels_are_where_they_are_said_to_be(tmp_path, op):
    net = Net()
    reads = [net.pair("in", "x")] + ([net.pair("other", "x")] if op in ("Add", "Mul", "Concat", "Sub") else [])
    made = net.node("op", op, *reads, **SETTINGS.get(op, {}))
    path = net.save(tmp_path / "net.onnx", net.pair("out", made))
    graph = ort_profile.optimised(path, tmp_path / "optimised.onnx", 1)
    kinds = ort_profile.kinds(graph, ort_profile.original_names(path, graph))
    assert ("float" not in kinds) == (op in KERNELS)


def test_every_time_belongs_to_a_node_of_the_file(files):
    own, base = ort_profile.profile_files((files["ort-x86"], files["Relu"]), inputs(2), 1)
    for seen in (own, base):
        named_ones = {o.name for o in seen.operators}
        assert {"c1", "c2", "c3", "fc"} <= named_ones
        assert all((o.us > 0).all() and o.us.shape == (ort_profile.BLOCKS,) for o in seen.operators)
    assert base.us("integer", "pairs") == 0 and own.us("integer") > 0.5 * own.total_us


def test_registers_are_filled_as_counted_by_hand(tmp_path):
    """10 channels of sums of 27: 27 of 28 products, 10 of 16 lanes."""
    layer = layers(view(narrow(tmp_path)))[0]
    assert (layer.summed, layer.leaving, layer.depthwise) == (27, 10, False)
    assert layer.filled(4, 16) == pytest.approx(27 * 10 / (28 * 16))


def narrow(tmp_path):
    net = Net()
    net.numbers = {"w": RANDOM.integers(-100, 100, (10, 3, 3, 3)).astype(np.int8), "ws": np.full(10, 0.01, np.float32)}
    net.numbers["wz"] = np.zeros(10, np.int8)
    weight = net.node("wd", "DequantizeLinear", "w", "ws", "wz", axis=0)
    made = net.node("c", "Conv", net.pair("in", "x"), weight)
    return net.save(tmp_path / "narrow.onnx", net.pair("out", made), (1, 3, SIZE, SIZE))


# accuracy


def test_a_channel_without_steps_is_told(tmp_path):
    """The last of the channels has a thirtieth of the others' range: 4 of 127 steps."""
    weight = RANDOM.uniform(-1, 1, (CHANNELS, CHANNELS, 1, 1))
    weight[:, 0] = 1
    weight[-1] *= 1 / 30
    net = Net()
    source = net.save(tmp_path / "net.onnx", net.node("y", "Relu", net.conv("c", "x", 1, weight)))
    for per_channel, weakest in ((False, 4), (True, 127)):
        target = tmp_path / f"{per_channel}.onnx"
        quantize_static(source, target, Feed(inputs()), activation_type=QuantType.QUInt8, per_channel=per_channel)
        found = layers(view(target))
        assert [layer.weakest for layer in found] == [weakest]
        told = [cause.verdict for cause in accuracy_causes(found, [], None, x86=True, vnni=True)]
        assert told == ([] if per_channel else [told[0]])
        assert per_channel or f"channel {CHANNELS - 1} of `c` is left with 4 of 127 steps" in told[0]


def test_losses_are_those_of_the_formula(tmp_path):
    """Magnitudes in 255 steps of 0.005: everything beyond 1.275 is clipped."""
    exact, rounded = Net(), Net()
    reference = exact.save(tmp_path / "exact.onnx", exact.node("y", "Neg", exact.node("same", "Abs", "x")))
    path = rounded.save(
        tmp_path / "int8.onnx", rounded.node("y", "Neg", rounded.pair("in", rounded.node("same", "Abs", "x"), 0.005))
    )
    images = np.abs(inputs(3))
    (found,) = layer_errors(view(path), path, reference, images)
    error = np.clip(np.rint(images / np.float32(0.005)), 0, 255).astype(np.float64) * np.float32(0.005) - images
    wanted = 10 * np.log10((images.astype(np.float64) ** 2).sum() / (error**2).sum())
    assert found.tensor == "same_y" and found.node == "same"
    assert found.own_db == pytest.approx(wanted, abs=0.01) and found.whole_db == pytest.approx(wanted, abs=0.01)
    outside = (images > 256 * 0.005).mean()
    assert found.clipped == pytest.approx(outside, abs=1e-3)


@pytest.mark.parametrize("name", ["qoperator", "ort-x86", "tensorrt", "signed"])
def test_losses_are_read_from_every_form(files, name):
    found = layer_errors(view(files[name]), files[name], files["Relu"], inputs(4))
    assert len(found) >= 4 and all(one.own_db > 25 and one.whole_db > 20 for one in found)


def test_ranges_are_judged_by_what_they_lose():
    def told(**facts):
        loss = LayerError(
            **{"tensor": "t", "node": "n", "own_db": 8.0, "whole_db": 7.0, "clipped": 0.0, "used": 0.9} | facts
        )
        (cause,) = accuracy_causes([], [loss], None, x86=True, vnni=True)
        return cause.fix

    assert "minmax" in told(clipped=0.2)
    assert "percentile" in told(used=0.02)
    assert "float" in told()


def test_without_vnni_full_range_weights_are_told(files):
    found = list(accuracy_causes(layers(view(files["ort-x86"])), [], None, x86=True, vnni=False))
    assert ["saturate" in cause.verdict for cause in found] == [True]
    assert "reduce_range" in found[0].other_tools


# the whole


@X86
@FAST
def test_of_a_good_file_nothing_is_wrong(files):
    told = explain.explain(files["ort-x86"], files["Relu"], files["images"])
    assert told.causes == ()
    if "too noisy to say" in told.latency:
        assert told.verdicts[0].startswith("no cause was found: ")
    else:
        assert told.verdicts[0].startswith("nothing is wrong: ") and "faster" in told.latency
    assert told.pairs.left == told.pairs.edges == 2 < told.pairs.written
    assert told.agreement >= 75 and len(told.losses) >= 4
    assert format_explanation(told).splitlines()[-1] == told.verdicts[0]


@X86
def test_a_slow_file_ends_with_its_verdicts(files):
    told = explain.explain(files["signed-qoperator"], files["Relu"])
    assert "signed" in told.verdicts[0] and "slower" in told.latency
    layer = next(one for one in told.layers if one.layer.node == "c2_quant")
    assert "slower" in layer.change and layer.int8_us > layer.fp32_us
    assert any("no --images" in note for note in told.notes) and told.agreement is None
    assert json.loads(json.dumps(as_json(told)))["causes"][0]["share"] > 0.5


def test_for_a_jetson_the_rules_speak(files):
    refused = explain.explain(files["qoperator"], target="jetson", version="5.1")
    assert refused.causes[0].about == "refused" and "[operator]" in refused.causes[0].verdict
    fine = explain.explain(files["tensorrt"], target="jetson")
    assert not fine.causes and "TensorRT" in fine.verdicts[0] and fine.latency == ""


def test_openvino_tells_what_it_refuses_and_what_it_runs_in_float(files):
    pytest.importorskip("openvino")
    refused = explain.explain(files["qoperator"], target="openvino")
    assert [cause.about for cause in refused.causes] == ["refused"] and "QLinear" in refused.causes[0].verdict
    fine = explain.explain(files["tensorrt"], target="openvino")
    assert not fine.causes and next(t for t in fine.times if t.op == "Convolution").float_us == 0


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["edgekd", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


def test_the_command_refuses_what_is_not_quantized(files, tmp_path, monkeypatch, capsys):
    nothing = tmp_path / "nothing.onnx"
    nothing.write_bytes(b"no network")
    for words in (
        [files["Relu"]],
        [nothing],
        [tmp_path / "missing.onnx"],
        [files["signed"], "--reference", files["signed"]],
        [files["signed"], "--target", "toaster"],
        [files["signed"], "--jetpack", "6.2"],
    ):
        assert run(monkeypatch, "explain", *words) == 2
        assert "hint: " in capsys.readouterr().err


def test_the_command_answers_with_one_line_of_json(files, monkeypatch, capsys):
    assert run(monkeypatch, "-q", "explain", files["tensorrt"], "--target", "jetson", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["form"] == "Q/DQ" and len(told["layers"]) == 4 and told["verdicts"]


def test_a_reference_must_be_float(files):
    with pytest.raises(ConfigError, match="is quantized"):
        explain.explain(files["signed"], Path(files["ort-x86"]))
