"""FP16 baked into ONNX files: what computes in it, what must not, and that Q/DQ pairs yield the same integers."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgekd.errors import ModelError, ParityError
from edgekd.models.resnet import CifarResNet
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.export.fp16 import bake, unoptimised_outputs
from tests import zoo
from tests.test_export import digits


class Reader(CalibrationDataReader):
    def __init__(self, inputs):
        self.batches = iter([{"image": x[None]} for x in inputs])

    def get_next(self):
        return next(self.batches, None)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    torch.manual_seed(0)
    network = CifarResNet(8, 8, 10, 1).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.from_numpy(digits(64)))
    return export(
        tmp_path_factory.mktemp("x"), "net", network.eval(), digits(8), zoo.logits(10), ExportConfig()
    ).single.file.path


@pytest.fixture(scope="module")
def qdq(fp32, tmp_path_factory):
    """As TensorRT wants it: float weights with a pair, signed, symmetric."""
    path = tmp_path_factory.mktemp("q") / "net-int8.onnx"
    options = {"AddQDQPairToWeight": True, "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantize_static(
        fp32, path, Reader(digits(24)), QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, extra_options=options,
    )  # fmt: skip
    return path


def types(path):
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_a_float_network_computes_in_fp16_between_two_casts(fp32, tmp_path):
    bake(fp32, tmp_path / "net.onnx", digits())
    model = onnx.load(tmp_path / "net.onnx")
    assert [node.op_type for node in model.graph.node if node.op_type == "Cast"] == ["Cast", "Cast"]
    assert {TensorProto.FLOAT} == {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert TensorProto.FLOAT not in types(tmp_path / "net.onnx").values()
    assert (tmp_path / "net.onnx").stat().st_size < 0.6 * fp32.stat().st_size
    want, found = unoptimised_outputs(fp32, digits()), unoptimised_outputs(tmp_path / "net.onnx", digits())
    assert 0 < np.abs(want - found).max() < 0.01 * np.abs(want).max()


def test_pairs_survive_with_the_same_integers(qdq, tmp_path):
    bake(qdq, tmp_path / "net.onnx", digits())
    before, after = integers(qdq), integers(tmp_path / "net.onnx")
    assert len(before) == len(after) > 8
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    nodes = [onnx.load(path).graph.node for path in (qdq, tmp_path / "net.onnx")]
    counts = [
        [sum(n.op_type == kind for n in found) for kind in ("QuantizeLinear", "DequantizeLinear")] for found in nodes
    ]
    assert counts[0] == counts[1]


def integers(path):
    """What the pairs of the weights yield, by the formula of the operator."""
    graph = onnx.load(path).graph
    numbers = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in numbers:
            weight, scale = (numbers[n].astype(np.float64) for n in node.input[:2])
            scale = scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.size > 1 else scale
            found.append(np.clip(np.rint(weight / scale), -128, 127).astype(int))
    return found


def test_equal_files_give_equal_bytes(qdq, tmp_path):
    bake(qdq, tmp_path / "a.onnx", digits())
    bake(qdq, tmp_path / "b.onnx", digits())
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def small(path, nodes, constants, opset=20, shape=(1, 3)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def node(kind, ins, out, **attributes):
    return helper.make_node(kind, ins, [out], name=f"{kind}.{out}", **attributes)


WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
X = np.linspace(-2, 2, 20, dtype=np.float32).reshape(5, 4)


def product(*between, opset=20, **constants):
    """x @ w, then other nodes that end in y."""
    return [node("MatMul", ["x", "w"], "a"), *between], {"w": WEIGHT, **constants}, opset


@pytest.mark.parametrize(("scale", "opset", "baked"), [(0.01, 20, True), (1e-5, 20, False), (0.01, 17, False)])
def test_scales_that_fp16_cannot_hold_stay_fp32(tmp_path, scale, opset, baked):
    nodes, constants, opset = product(
        node("QuantizeLinear", ["a", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "y"),
        opset=opset, s=np.float32(scale), z=np.int8(0),
    )  # fmt: skip
    bake(small(tmp_path / "n.onnx", nodes, constants, opset), tmp_path / "o.onnx", X)
    found = types(tmp_path / "o.onnx")
    assert (found.get("s.fp16") == TensorProto.FLOAT16) == baked and ("s" in found) != baked


def test_tensors_beyond_the_range_of_fp16_stay_fp32(tmp_path):
    nodes, constants, opset = product(
        node("Mul", ["a", "large"], "b"), node("Mul", ["b", "little"], "c"), node("Relu", ["c"], "y"),
        large=np.float32(6e4), little=np.float32(1e-4),
    )  # fmt: skip
    bake(small(tmp_path / "n.onnx", nodes, constants, opset), tmp_path / "o.onnx", X)
    found = types(tmp_path / "o.onnx")
    assert found["w.fp16"] == TensorProto.FLOAT16 and found["large"] == found["little"] == TensorProto.FLOAT


def test_inputs_that_must_be_fp32_stay_so(tmp_path):
    nodes, constants, opset = product(
        node("Reshape", ["a", "shape"], "b"), node("Resize", ["b", "", "scales"], "y", mode="nearest"),
        shape=np.array([1, 1, 1, 3]), scales=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    bake(small(tmp_path / "n.onnx", nodes, constants, opset, (1, 1, 2, 6)), tmp_path / "o.onnx", X)
    assert types(tmp_path / "o.onnx")["scales"] == TensorProto.FLOAT


def test_what_cannot_be_converted_is_refused_and_nothing_left(tmp_path):
    nodes, constants, opset = product(node("Min", ["a", "huge"], "y"), huge=np.float32(1e6))
    with pytest.raises(ModelError, match="the constant `huge`"):
        bake(small(tmp_path / "n.onnx", nodes, constants, opset), tmp_path / "o.onnx", X)
    nodes, constants, opset = product(
        node("Mul", ["a", "little"], "b"), node("Mul", ["b", "large"], "y"),
        little=np.float32(1e-7), large=np.float32(6e4),
    )  # fmt: skip
    with pytest.raises(ParityError, match="in FP16 the answers of `n.onnx` move by"):
        bake(small(tmp_path / "n.onnx", nodes, constants, opset), tmp_path / "o.onnx", X)
    assert [p.name for p in tmp_path.iterdir()] == ["n.onnx"]
