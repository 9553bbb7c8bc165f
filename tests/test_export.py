"""Export: what comes out of it, what stops it, and what can be read from any ONNX file."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sklearn.datasets import load_digits
from torch import nn

from edgekd.core.artifact import TensorSpec
from edgekd.errors import ConfigError, ExportError, ModelError, ParityError
from edgekd.models.resnet import CifarResNet
from edgekd.onnx import inspect, session, writer
from edgekd.stages.export.checkpoint import opset_for
from edgekd.stages.export.export import ExportConfig, check_folded, check_form, compare, export, highest_ir
from edgekd.targets._jetpack import table
from tests import zoo

LOGITS = (TensorSpec("logits", (1, 10)),)


def digits(count=24):
    """Real images as network inputs, (N, 1, 16, 16)."""
    grey = np.kron(load_digits().images[:count], np.ones((2, 2)))[:, None]
    return ((grey - 4.9) / 6.0).astype(np.float32)


def lived_in(seed=0):
    """A network whose BatchNorms have seen data, so that folding them matters."""
    torch.manual_seed(seed)
    network = CifarResNet(8, 4, 10, 1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def network():
    return lived_in()


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    return export(out, "student", network, digits(), zoo.logits(10), ExportConfig(), {"mean": json.dumps([0.3])})


def torch_answers(network, images):
    with torch.no_grad():
        return network.eval()(torch.from_numpy(images)).numpy()


def graph_file(path, nodes, entering, leaving, weights=(), opset=20):
    """A foreign ONNX file. `entering` and `leaving` map names to shapes."""

    def values(shapes):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in dict(weights).items()]
    graph = helper.make_graph(nodes, "foreign", values(entering), values(leaving), tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def one_node(path, op, shape, leaving, *weights, **attributes):
    names = [f"w{i}" for i in range(len(weights))]
    arrays = {name: np.ones(w, np.float32) for name, w in zip(names, weights, strict=True)}
    node = helper.make_node(op, ["image", *names], ["logits"], **attributes)
    return graph_file(path, [node], {"image": shape}, {"logits": leaving}, arrays)


# what comes out


def test_both_files_answer_like_torch(exported, network):
    images = digits()
    want = torch_answers(network, images)
    for model in (exported.single, exported.dynamic):
        assert compare(model.file.path, images, (want,), 1e-4) < 1e-4


def test_the_artefacts_say_what_the_files_are(exported):
    single, dynamic = exported.single, exported.dynamic
    assert single.input == inspect.TensorSpec("image", (1, 1, 16, 16))
    assert dynamic.input == inspect.TensorSpec("image", (0, 1, 16, 16))
    assert (single.opset, single.ir, single.outputs[0].shape, single.precision) == (20, 10, (1, 10), "fp32")
    assert (single.parameters, single.macs) == (dynamic.parameters, dynamic.macs)


def test_both_files_name_their_tensors_alike(exported):
    names = [{n.output[0] for n in onnx.load(m.file.path).graph.node} for m in (exported.single, exported.dynamic)]
    assert names[0] == names[1]


def test_batchnorms_are_folded(exported):
    assert "BatchNormalization" not in inspect.facts(exported.single.file.path).nodes


def test_equal_networks_give_equal_bytes(exported, network, tmp_path):
    turned = network.to(memory_format=torch.channels_last)
    metadata = {"mean": json.dumps([0.3])}
    again = export(tmp_path, "student", turned, digits(), zoo.logits(10), ExportConfig(), metadata)
    assert again.single.file.sha256 == exported.single.file.sha256
    assert again.dynamic.file.sha256 == exported.dynamic.file.sha256


def test_the_files_hold_the_metadata_and_nothing_of_this_machine(exported):
    for model in (exported.single, exported.dynamic):
        content = model.file.path.read_bytes()
        for trace in (b".py", b"site-packages", b"class_hierarchy", str(model.file.path.parent).encode()):
            assert trace not in content
        assert [(p.key, p.value) for p in onnx.load(model.file.path).metadata_props] == [("mean", "[0.3]")]


def test_export_leaves_the_network_as_it_was(tmp_path):
    network = lived_in().double().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    export(tmp_path, "student", network, digits(4), zoo.logits(10), ExportConfig())
    assert network.training
    assert all(torch.equal(before[key], value) and value.dtype == before[key].dtype
               for key, value in network.state_dict().items())  # fmt: skip


def test_the_exporter_says_nothing(tmp_path, capfd):
    export(tmp_path, "student", lived_in(), digits(4), zoo.logits(10), ExportConfig())
    assert capfd.readouterr() == ("", "")


class Awkward(nn.Module):
    """Sizes computed from the batch, and a BatchNorm that follows no convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.token, self.head = nn.Parameter(torch.ones(1, 4)), nn.Linear(8 * 64 + 4, 10)

    def forward(self, x):
        x = self.norm(torch.relu(self.conv(x)))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, 4, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = nn.functional.hardswish(nn.functional.avg_pool2d(x, 2))
        return self.head(torch.cat([x.view(x.size(0), -1), self.token.expand(x.size(0), -1)], 1))


def test_networks_that_compute_with_the_batch_size_export_too(tmp_path):
    torch.manual_seed(0)
    made = export(tmp_path, "awkward", Awkward(), digits(6), zoo.logits(10), ExportConfig())
    assert "Shape" not in inspect.facts(made.single.file.path).nodes  # constant, for one image


# old opsets


@pytest.fixture(scope="module")
def old(network, tmp_path_factory):
    """Exports for TensorRT 8.2 and for 8.5, by opset."""
    made = {}
    for opset in (13, 17):
        out = tmp_path_factory.mktemp(f"opset{opset}")
        made[opset] = export(
            out, "student", network, digits(), zoo.logits(10), ExportConfig(opset=opset), {"mean": "[0.3]"}
        )
    return made


@pytest.mark.parametrize(("opset", "ir"), [(13, 7), (17, 8)])
def test_an_old_opset_is_what_was_asked_for_and_answers_like_torch(old, network, opset, ir):
    want = torch_answers(network, digits())
    for model, batch in ((old[opset].single, 1), (old[opset].dynamic, 0)):
        assert (model.opset, model.ir, model.input.shape) == (opset, ir, (batch, 1, 16, 16))
        found = inspect.check(model.file.path)
        assert found.domains == ("",) and "BatchNormalization" not in found.nodes
        assert compare(model.file.path, digits(), (want,), 1e-4) < 1e-4


def test_an_old_opset_has_the_same_network(old, exported):
    for made in old.values():
        assert (made.single.macs, made.single.parameters) == (exported.single.macs, exported.single.parameters)
        names = [{n.output[0] for n in onnx.load(m.file.path).graph.node} for m in (made.single, made.dynamic)]
        assert names[0] == names[1]


def test_equal_networks_give_equal_bytes_at_an_old_opset(old, network, tmp_path):
    again = export(tmp_path, "student", network, digits(), zoo.logits(10), ExportConfig(opset=13), {"mean": "[0.3]"})
    assert again.single.file.sha256 == old[13].single.file.sha256
    assert again.dynamic.file.sha256 == old[13].dynamic.file.sha256


def test_networks_that_compute_with_the_batch_size_export_to_an_old_opset_too(tmp_path, capfd):
    torch.manual_seed(0)
    made = export(tmp_path, "awkward", Awkward(), digits(6), zoo.logits(10), ExportConfig(opset=13))
    assert "Shape" not in inspect.facts(made.single.file.path).nodes
    assert capfd.readouterr() == ("", "")


def test_every_jetpack_loads_what_is_exported_for_it():
    for row in table().jetpacks:
        opset = opset_for(None, row.version)
        assert row.opset[0] <= opset <= row.opset[1] and highest_ir(opset) <= row.ir
    assert [opset_for(None, v) for v in ("4.6", "5.1", "6.2", "7.2")] == [13, 17, 20, 20]
    assert (opset_for(None, None), opset_for(18, None)) == (20, 18)
    with pytest.raises(ConfigError, match="a JetPack has its own opset"):
        opset_for(13, "4.6")


# what stops it


def test_other_weights_are_a_parity_error(exported):
    want = torch_answers(lived_in(seed=1), digits())
    with pytest.raises(ParityError, match=r"student.onnx` and torch differ by"):
        compare(exported.single.file.path, digits(), (want,), 1e-4)


def test_answers_that_are_no_numbers_are_a_parity_error(exported):
    with pytest.raises(ParityError, match="differ by nan"):
        compare(exported.single.file.path, digits(2), (np.full((2, 10), np.nan, np.float32),), 1e-4)


def test_refuses_an_opset_that_int8_cannot_have():
    with pytest.raises(ConfigError, match=r"opset is 12, but INT8 with a scale per channel needs 13 or more"):
        ExportConfig(opset=12)


def test_an_ir_version_that_old_runtimes_do_not_read_stops_the_export(old, tmp_path):
    model = onnx.load(old[13].single.file.path)
    model.ir_version = 8
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ExportError, match="`new.onnx` has IR version 8, but runtimes of opset 13 may read no more"):
        check_form(inspect.check(tmp_path / "new.onnx"), tmp_path / "new.onnx", (1, 1, 16, 16), LOGITS, 13)


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_a_branch_that_a_trace_would_lose_is_refused_at_every_opset(opset, tmp_path):
    with pytest.raises(ExportError, match="torch cannot export `Branching` to ONNX: .*data-dependent"):
        export(tmp_path, "branching", Branching(), digits(4), zoo.logits(1), ExportConfig(opset=opset))


def test_an_opset_other_than_asked_stops_the_export(exported):
    found = inspect.check(exported.single.file.path)
    with pytest.raises(ExportError, match="`student.onnx` has opset 20, not 19"):
        check_form(found, exported.single.file.path, (1, 1, 16, 16), LOGITS, opset=19)


def test_a_domain_that_runtimes_may_not_know_stops_the_export(exported, tmp_path):
    model = onnx.load(exported.single.file.path)
    model.graph.node.append(helper.make_node("Gelu", ["logits"], ["unused"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    writer.write(model, tmp_path / "odd.onnx", {})
    with pytest.raises(ExportError, match="operator sets .*com.microsoft"):
        check_form(inspect.check(tmp_path / "odd.onnx"), tmp_path / "odd.onnx", (1, 1, 16, 16), LOGITS, 20)


def test_a_batchnorm_left_behind_a_convolution_stops_the_export(tmp_path):
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["y"]),
        helper.make_node("BatchNormalization", ["y", "s", "s", "s", "s"], ["z"], name="bn"),
    ]
    weights = {"w": np.ones((2, 1, 1, 1), np.float32), "s": np.ones(2, np.float32)}
    path = graph_file(tmp_path / "bn.onnx", nodes, {"image": [1, 1, 4, 4]}, {"z": [1, 2, 4, 4]}, weights)
    with pytest.raises(ExportError, match="still has the BatchNormalization `bn` behind a convolution"):
        check_folded(path)


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.sum((2, 3))


def test_a_network_that_torch_cannot_export_says_why(tmp_path, capfd):
    with pytest.raises(ExportError, match="torch cannot export `Branching` to ONNX: .*data-dependent"):
        export(tmp_path, "branching", Branching(), digits(4), zoo.logits(1), ExportConfig())
    assert capfd.readouterr().out == ""


def test_a_network_that_answers_no_logits_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"answers 4 images with \(4, 1, 16, 16\), not with \(4, 10\)"):
        export(tmp_path, "identity", nn.Identity(), digits(4), zoo.logits(10), ExportConfig())


def test_a_network_for_other_images_is_told_in_a_sentence(tmp_path):
    says = r"the network does not take images of shape \(N, 1, 16, 16\): .*expected input.* to have 3 channels"
    with pytest.raises(ExportError, match=says) as error:
        export(tmp_path, "rgb", CifarResNet(8, 4, 10, 3), digits(4), zoo.logits(10), ExportConfig())
    assert error.value.hint and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("field", "value"), [("tolerance", 0.0), ("images", 0)])
def test_settings_out_of_range_are_mistakes(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        ExportConfig(**{field: value})


# facts of any file


@pytest.mark.parametrize(
    ("op", "shape", "leaving", "weights", "attributes", "macs", "parameters"),
    [
        # 8 x 8 outputs, 5 channels, each over 3 channels and a 3 x 3 kernel
        ("Conv", [1, 3, 8, 8], [1, 5, 8, 8], [(5, 3, 3, 3), (5,)], {"pads": [1] * 4}, 64 * 5 * 27, 135 + 5),
        # 2 groups: each of 6 outputs sums over 2 of 4 channels
        ("Conv", [1, 4, 5, 5], [1, 6, 3, 3], [(6, 2, 3, 3)], {"group": 2}, 9 * 6 * 18, 108),
        # each of 2 x 3 x 3 inputs goes to 4 channels and a 2 x 2 kernel
        ("ConvTranspose", [1, 2, 3, 3], [1, 4, 6, 6], [(2, 4, 2, 2)], {"strides": [2, 2]}, 18 * 16, 32),
        ("Gemm", [1, 7], [1, 3], [(3, 7), (3,)], {"transB": 1}, 21, 24),
        ("MatMul", [1, 6, 7], [1, 6, 3], [(7, 3)], {}, 6 * 7 * 3, 21),
        ("Conv", [4, 1, 3, 3], [4, 2, 3, 3], [(2, 1, 1, 1)], {}, 18, 2),  # of one image, not of the batch
        ("Conv", ["n", 1, 3, 3], ["n", 2, 3, 3], [(2, 1, 1, 1)], {}, 18, 2),
    ],
)
def test_macs_and_parameters_agree_with_pencil_and_paper(
    tmp_path, op, shape, leaving, weights, attributes, macs, parameters
):
    found = inspect.facts(one_node(tmp_path / "one.onnx", op, shape, leaving, *weights, **attributes))
    assert (found.macs, found.parameters) == (macs, parameters)


def test_resnet20_has_the_macs_of_its_paper(tmp_path):
    network = CifarResNet(20, 16, 10, 3)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    model = export(tmp_path, "resnet20", network, images, zoo.logits(10), ExportConfig()).single
    assert model.macs == pytest.approx(40.8e6, rel=1e-3)  # He et al. 2016: 0.27 M parameters
    assert model.parameters == pytest.approx(0.27e6, rel=0.01)


def test_constants_that_were_not_trained_are_no_parameters(tmp_path):
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"]),
        helper.make_node("Mul", ["b", "half"], ["c"]),
        helper.make_node("Add", ["c", "bias"], ["d"]),
        helper.make_node("Reshape", ["d", "shape"], ["e"]),
        helper.make_node("Transpose", ["v"], ["vt"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "vt"], ["logits"]),
    ]
    one = np.float32(1)
    weights = {
        "w": np.ones((2, 1, 1, 1), np.float32),
        "low": one,
        "high": one,
        "half": one,
        "bias": np.ones((2, 1, 1), np.float32),
        "shape": np.array([1, 8]),
        "v": np.ones((3, 8), np.float32),
    }
    path = graph_file(tmp_path / "mixed.onnx", nodes, {"image": [1, 1, 2, 2]}, {"logits": [1, 3]}, weights)
    assert inspect.facts(path).parameters == 2 + 2 + 24


def test_macs_are_unknown_where_sizes_are(tmp_path):
    path = one_node(tmp_path / "any.onnx", "Conv", [1, 1, "h", "w"], [1, 2, "h", "w"], (2, 1, 1, 1))
    assert inspect.facts(path).macs is None
    with pytest.raises(ModelError, match="multiply-accumulates .* cannot be counted"):
        inspect.describe(path, "any")


def test_a_file_that_is_not_there_or_not_onnx_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*gone.onnx"):
        inspect.facts(tmp_path / "gone.onnx")
    for content in (b"", b"hello world", b"PK\x03\x04 a checkpoint"):
        (tmp_path / "odd.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"odd.onnx` is not an ONNX file"):
            inspect.facts(tmp_path / "odd.onnx")


@pytest.mark.parametrize(("entering", "said"), [({"a": [1], "b": [1]}, r"2 inputs \(`a`, `b`\)"), ({}, "0 inputs")])
def test_one_input_is_needed(tmp_path, entering, said):
    nodes = [helper.make_node("Add", list(entering) or ["w", "w"], ["y"])]
    path = graph_file(tmp_path / "two.onnx", nodes, entering, {"y": [1]}, {"w": np.ones(1, np.float32)})
    with pytest.raises(ModelError, match=said):
        inspect.facts(path)


def test_weights_listed_as_inputs_are_no_inputs(tmp_path):
    node = helper.make_node("Conv", ["image", "w"], ["y"])
    entering = {"image": [1, 1, 2, 2], "w": [1, 1, 1, 1]}
    weights = {"w": np.ones((1, 1, 1, 1), np.float32)}
    path = graph_file(tmp_path / "old.onnx", [node], entering, {"y": [1, 1, 2, 2]}, weights)
    assert inspect.facts(path).input.name == "image"


def test_shapes_that_contradict_each_other_are_refused(tmp_path):
    path = one_node(tmp_path / "wrong.onnx", "MatMul", [1, 4], [1, 3], (5, 3))
    with pytest.raises(ModelError, match="the shapes in .* contradict each other: .*MatMul"):
        inspect.facts(path)
    with pytest.raises(ModelError, match="is not valid ONNX"):
        inspect.check(path)


def test_external_data_that_is_gone_is_named(tmp_path):
    path = one_node(tmp_path / "big.onnx", "Gemm", [1, 40], [1, 30], (40, 30))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="big.data", size_threshold=0)
    (tmp_path / "big.data").unlink()
    with pytest.raises(ModelError, match=r"big.onnx` cannot be read"):
        inspect.facts(path)


# answers


def test_answers_feeds_a_static_batch_in_pieces(tmp_path):
    path = one_node(tmp_path / "four.onnx", "Gemm", [4, 3], [4, 2], (3, 2))
    inputs = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert np.array_equal(session.run_model(path, inputs), inputs @ np.ones((3, 2), np.float32))
    with pytest.raises(ModelError, match="takes 4 inputs at once, which 6 cannot be cut into"):
        session.run_model(path, inputs[:6])


def test_answers_says_what_the_file_takes(exported):
    with pytest.raises(ModelError, match="refuses these inputs"):
        session.run_model(exported.single.file.path, np.zeros((2, 3, 16, 16), np.float32))


def test_a_file_too_new_for_onnxruntime_is_refused(exported, tmp_path):
    model = onnx.load(exported.single.file.path)
    model.ir_version = 99
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ModelError, match=r"onnxruntime .* does not load"):
        session.run_model(tmp_path / "new.onnx", digits(1))
