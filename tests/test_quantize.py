"""Calibration sets and quantization: what the INT8 file is, that it still answers, and what is refused."""

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd.core.artifact import File, TensorSpec
from edgekd.core.quant_scheme import QuantScheme
from edgekd.data.digits import Digits
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.models.resnet import CifarResNet
from edgekd.onnx import inspect, session
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.quantize.calibration_set import CalibrationConfig, collect_calibration_set
from edgekd.stages.quantize.quantize import Int8Options, quantize, quantize_file, write_int8
from edgekd.stages.quantize.ranges import METHODS, QuantizeConfig, calibrate
from tests import zoo
from tests.test_export import Awkward

X86 = QuantScheme("uint8", symmetric_activation=False)
SIGNED = QuantScheme("int8", symmetric_activation=True)
SPEC = TensorSpec("image", (0, 1, 16, 16))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return prepare_dataset(tmp_path_factory.mktemp("data"), Digits(), None)


@pytest.fixture(scope="module")
def images(task, tmp_path_factory):
    return collect_calibration_set(
        tmp_path_factory.mktemp("calib"), task, CalibrationConfig(images=64), "digits"
    ).images


@pytest.fixture(scope="module")
def test_inputs(task):
    return task.inputs(np.asarray(task.test.load().images))


@pytest.fixture(scope="module")
def exported(task, tmp_path_factory):
    """A small network, trained for a second, as FP32 ONNX."""
    torch.manual_seed(0)
    train = task.train.load()
    x, y = torch.from_numpy(task.inputs(np.asarray(train.images)).copy()), torch.from_numpy(train.labels)
    network = CifarResNet(8, 4, 10, 1)
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for part in torch.randperm(len(x))[:1024].split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(x[part]), y[part]).backward()
            optimiser.step()
    some = x[:16].numpy()
    out = tmp_path_factory.mktemp("export")
    return export(out, "student", network, some, zoo.logits(10), ExportConfig(), {"classes": json.dumps(task.classes)})


@pytest.fixture(scope="module")
def int8(exported, images, tmp_path_factory):
    return quantize(tmp_path_factory.mktemp("int8"), exported, images, X86, QuantizeConfig())


def constants(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def foreign(path, opset=13, batch=1, ir=8):
    """What another exporter may write: no node names, a BatchNorm unfolded, weights in a Constant node, NHWC-free."""
    random = np.random.default_rng(0)

    def number(name, *shape):
        return numpy_helper.from_array(random.uniform(0.5, 1.5, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Constant", [], ["w"], value=number("w", 6, 3, 3, 3)),
        helper.make_node("Conv", ["pixels", "w"], ["a"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "g", "h"], ["scores"], transB=1),
    ]
    constants = [number(n, 6) for n in "sbmv"] + [number("g", 4, 6), number("h", 4)]
    entering = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, 8, 8])
    leaving = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 4])
    graph = helper.make_graph(nodes, "foreign", [entering], [leaving], constants)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=ir), path)
    return path


def noise(count=16, shape=(3, 8, 8)):
    return np.random.default_rng(1).standard_normal((count, *shape)).astype(np.float32)


# calibration sets


def test_the_manifest_reproduces_the_images_from_the_training_split(task, images):
    manifest = json.loads(images.path.with_name("manifest.json").read_text())
    train = task.train.load()
    again = task.inputs(np.asarray(train.images[manifest["indices"]]))
    stored = load_calibration(images.path, SPEC)
    assert np.array_equal(again, stored)
    assert manifest["split"] == "train" and manifest["source"] == "digits"
    assert manifest["shape"] == [64, 1, 16, 16] and manifest["count"] == 64
    assert manifest["file"]["sha256"] == hashlib.sha256(images.path.read_bytes()).hexdigest()
    counts = np.bincount(train.labels[manifest["indices"]], minlength=10)
    assert list(manifest["per_class"].values()) == counts.tolist()
    assert counts.min() >= 5  # stratified: 6.4 of each class


def test_equal_choices_give_equal_bytes_and_other_seeds_other_images(task, images, tmp_path):
    for name, seed, same in (("a", 0, True), ("b", 1, False)):
        (tmp_path / name).mkdir()
        again = collect_calibration_set(tmp_path / name, task, CalibrationConfig(images=64, seed=seed), "digits").images
        assert (again.sha256 == images.sha256) is same


def test_refuses_more_calibration_images_than_there_are(task, tmp_path):
    with pytest.raises(DataError, match=r"calibration.images is 5000, but the training split has 1077"):
        collect_calibration_set(tmp_path, task, CalibrationConfig(images=5000), "digits")
    with pytest.raises(ConfigError, match=r"calibration.images is 0"):
        CalibrationConfig(images=0)


def test_reads_the_users_own_npy_and_npz(tmp_path):
    inputs = noise(3, (1, 16, 16))
    np.save(tmp_path / "one.npy", inputs)
    np.savez(tmp_path / "one.npz", whatever=inputs)
    np.savez(tmp_path / "named.npz", labels=np.zeros(3), image=inputs)
    for name in ("one.npy", "one.npz", "named.npz"):
        assert np.array_equal(load_calibration(tmp_path / name, SPEC), inputs)


@pytest.mark.parametrize(
    ("array", "said", "hint"),
    [
        (np.zeros((4, 1, 16, 16), np.uint8), "holds uint8, but the model's input `image` is float32", "normalised"),
        (np.zeros((4, 3, 16, 16), np.float32), r"shape \(4, 3, 16, 16\), but .* needs \(N, 1, 16, 16\)", "save inputs"),
        (np.zeros((4, 16, 16, 1), np.float32), r"shape \(4, 16, 16, 1\)", "channels first"),
        (np.zeros((0, 1, 16, 16), np.float32), "holds no inputs", "save at least one"),
        (np.full((1, 1, 16, 16), np.nan, np.float32), "not finite", "standard deviation"),
    ],
)
def test_calibration_files_that_do_not_fit_say_why(tmp_path, array, said, hint):
    np.save(tmp_path / "calib.npy", array)
    with pytest.raises(DataError, match=said) as caught:
        load_calibration(tmp_path / "calib.npy", SPEC)
    assert hint in caught.value.hint


def test_calibration_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(DataError, match=r"there is no calibration file .*gone.npz"):
        load_calibration(tmp_path / "gone.npz", SPEC)
    for content in (b"", b"no array", b"PK\x03\x04 half an archive"):
        (tmp_path / "odd.npz").write_bytes(content)
        with pytest.raises(DataError, match="is not a readable .npz or .npy file"):
            load_calibration(tmp_path / "odd.npz", SPEC)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(DataError, match="holds the arrays a, b, but none called `image`"):
        load_calibration(tmp_path / "two.npz", SPEC)


# what the INT8 file is


def test_int8_agrees_with_float_on_images_it_has_not_seen(exported, int8, test_inputs):
    want = session.run_model(exported.single.file.path, test_inputs)
    got = session.run_model(int8.single.file.path, test_inputs)
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.97


def test_both_batch_forms_have_the_same_scales(int8):
    scales = [
        {k: v.tolist() for k, v in constants(m.file.path).items() if "scale" in k or "zero_point" in k}
        for m in (int8.single, int8.dynamic)
    ]
    assert scales[0] == scales[1]
    assert int8.single.input.shape[0] == 1 and int8.dynamic.input.shape[0] == 0


def test_int8_keeps_the_form_of_the_float_file(exported, int8):
    for before, after in ((exported.single, int8.single), (exported.dynamic, int8.dynamic)):
        assert (after.precision, before.precision) == ("int8", "fp32")
        for fact in ("input", "outputs", "opset", "ir", "macs", "parameters"):
            assert getattr(after, fact) == getattr(before, fact)
        assert after.file.bytes < before.file.bytes
        assert inspect.facts(after.file.path).domains == ("",)
        assert [p.key for p in onnx.load(after.file.path).metadata_props] == ["classes"]


def test_the_scheme_shows_in_the_zero_points(exported, images, int8, tmp_path):
    signed = quantize(tmp_path, exported, images, SIGNED, QuantizeConfig())
    points = {k: v for k, v in constants(int8.single.file.path).items() if "zero_point" in k}
    assert {v.dtype.name for k, v in points.items()} == {"uint8", "int8", "int32"}  # activations, weights, biases
    assert points["image_zero_point"].dtype == np.uint8
    points = {k: v for k, v in constants(signed.single.file.path).items() if "zero_point" in k}
    assert {v.dtype.name for v in points.values()} == {"int8", "int32"}
    assert not any(v.any() for v in points.values())  # symmetric: all zero


def test_weights_have_a_scale_per_output_channel_where_the_scheme_says_so(exported, images, tmp_path):
    inputs, path = load_calibration(images.path, exported.single.input), exported.single.file.path
    for per_channel, count in ((True, 4), (False, 1)):
        scheme = QuantScheme("uint8", symmetric_activation=False, per_channel=per_channel)
        made = quantize_file(path, tmp_path / f"{count}.onnx", inputs, scheme, QuantizeConfig())
        assert constants(made.file.path)["stem.0.weight_scale"].size == count


def test_reduced_range_keeps_weights_to_seven_bits(exported, images, tmp_path):
    inputs, path = load_calibration(images.path, exported.single.input), exported.single.file.path
    scheme = QuantScheme("uint8", symmetric_activation=False, reduce_range=True)
    made = quantize_file(path, tmp_path / "seven.onnx", inputs, scheme, QuantizeConfig())
    weights = [v for v in constants(made.file.path).values() if v.dtype == np.int8 and v.ndim == 4]
    assert 32 < max(abs(w.astype(int)).max() for w in weights) <= 64


def test_the_same_input_gives_the_same_bytes(exported, images, int8, tmp_path):
    again = quantize(tmp_path, exported, images, X86, QuantizeConfig())
    assert again.single.file.sha256 == int8.single.file.sha256
    assert again.dynamic.file.sha256 == int8.dynamic.file.sha256
    assert b"/tmp" not in again.single.file.path.read_bytes()


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_every_way_to_find_ranges_keeps_most_answers(exported, images, test_inputs, tmp_path, method):
    path, inputs = exported.single.file.path, load_calibration(images.path, SPEC)
    made = quantize_file(path, tmp_path / "int8.onnx", inputs, X86, QuantizeConfig(method=method))
    want, got = session.run_model(path, test_inputs), session.run_model(made.file.path, test_inputs)
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.9


def test_minmax_finds_the_extremes_of_all_images_and_the_others_less(exported, images):
    path, inputs = exported.single.file.path, load_calibration(images.path, SPEC)
    found = {m: calibrate(path, inputs, QuantizeConfig(method=m)).bounds for m in ("minmax", "moving_average")}
    assert found["minmax"]["image"] == (inputs.min(), inputs.max())
    each = inputs.reshape(len(inputs), -1)
    assert found["moving_average"]["image"] == pytest.approx((each.min(1).mean(), each.max(1).mean()), rel=1e-5)
    narrow = calibrate(path, inputs, QuantizeConfig(method="percentile", percentile=95.0)).bounds
    assert narrow["relu"][1] < found["minmax"]["relu"][1]


def test_foreign_files_are_quantized_with_their_batchnorms_folded(tmp_path):
    path, inputs = foreign(tmp_path / "foreign.onnx"), noise()
    made = quantize_file(path, tmp_path / "int8.onnx", inputs, X86, QuantizeConfig())
    found = inspect.facts(made.file.path)
    assert (made.opset, made.ir, made.input.name, made.outputs[0].shape[1]) == (13, 8, "pixels", 4)
    assert "BatchNormalization" not in found.nodes and found.domains == ("",)
    want, got = session.run_model(path, inputs), session.run_model(made.file.path, inputs)
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.onnx", "int8.onnx"]  # nothing left behind


def test_networks_that_compute_with_the_batch_size_are_quantized_too(images, tmp_path):
    torch.manual_seed(0)
    inputs = load_calibration(images.path, SPEC)
    made = quantize(
        tmp_path,
        export(tmp_path, "awkward", Awkward(), inputs, zoo.logits(10), ExportConfig()),
        images,
        X86,
        QuantizeConfig(),
    )
    assert made.single.macs == made.dynamic.macs > 0
    single, dynamic = (session.run_model(model.file.path, inputs) for model in (made.single, made.dynamic))
    assert np.abs(single - dynamic).max() < 0.02 * np.abs(single).max()


def test_files_with_a_larger_static_batch_are_fed_in_batches(tmp_path):
    path = foreign(tmp_path / "four.onnx", batch=4)
    assert quantize_file(path, tmp_path / "int8.onnx", noise(8), X86, QuantizeConfig()).input.shape[0] == 4
    with pytest.raises(ModelError, match="takes 4 inputs at once, and 10 calibration inputs are no multiple"):
        quantize_file(path, tmp_path / "int8.onnx", noise(10), X86, QuantizeConfig())


# what is refused


def test_a_quantized_file_is_not_quantized_again(int8, images, tmp_path):
    inputs = load_calibration(images.path, SPEC)
    with pytest.raises(ModelError, match=r"student-int8.onnx` is quantized already"):
        quantize_file(int8.single.file.path, tmp_path / "twice.onnx", inputs, X86, QuantizeConfig())


def test_a_file_without_weights_has_nothing_to_quantize(tmp_path):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "r.onnx")
    with pytest.raises(ModelError, match="has nothing to quantize: no Conv, ConvTranspose, Gemm or MatMul"):
        quantize_file(tmp_path / "r.onnx", tmp_path / "q.onnx", noise(2, (2,)), X86, QuantizeConfig())


def test_an_opset_without_scales_per_channel_is_refused(tmp_path):
    path = foreign(tmp_path / "old.onnx", opset=12, ir=7)
    with pytest.raises(ModelError, match="has opset 12, but INT8 with a scale per channel needs 13"):
        quantize_file(path, tmp_path / "q.onnx", noise(), X86, QuantizeConfig())


def test_calibration_inputs_of_another_shape_are_refused(exported, tmp_path):
    with pytest.raises(DataError, match=r"the calibration set has shape \(16, 3, 8, 8\)"):
        quantize_file(exported.single.file.path, tmp_path / "q.onnx", noise(), X86, QuantizeConfig())
    np.savez(tmp_path / "images.npz", image=noise())
    with pytest.raises(DataError, match=r"images.npz` has shape \(16, 3, 8, 8\)"):
        quantize(tmp_path, exported, File.of(tmp_path / "images.npz"), X86, QuantizeConfig())


def test_ranges_of_another_network_are_refused(exported, images, tmp_path):
    ranges = calibrate(foreign(tmp_path / "foreign.onnx"), noise(), QuantizeConfig())
    inputs = load_calibration(images.path, SPEC)
    with pytest.raises(ModelError, match="onnxruntime cannot quantize"):
        write_int8(exported.single.file.path, tmp_path / "q.onnx", inputs, ranges, Int8Options(X86))


def test_weights_that_are_not_finite_do_not_pass(exported, images, tmp_path):
    model = onnx.load(exported.single.file.path)
    weight = next(t for t in model.graph.initializer if t.name == "head.bias")
    weight.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), "head.bias"))
    onnx.save(model, tmp_path / "nan.onnx")
    inputs = load_calibration(images.path, SPEC)
    with pytest.raises(ModelError, match="not finite on the calibration inputs, in the tensor `logits`"):
        quantize_file(tmp_path / "nan.onnx", tmp_path / "q.onnx", inputs, X86, QuantizeConfig())


def test_a_percentile_that_keeps_too_little_is_a_mistake():
    with pytest.raises(ConfigError, match=r"percentile is 0.999"):
        QuantizeConfig(percentile=0.999)


def test_the_float_file_is_not_overwritten(tmp_path):
    path = foreign(tmp_path / "foreign.onnx")
    before = path.read_bytes()
    (tmp_path / "link.onnx").symlink_to(path)
    for target in (path, tmp_path / "link.onnx"):
        with pytest.raises(ConfigError, match="would take the place of its own FP32 file"):
            quantize_file(path, target, noise(), X86, QuantizeConfig())
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_proven_is_not_left_behind(tmp_path):
    """1 / x, where the small x are rounded to 0."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Reciprocal", ["a"], ["y"])]
    weight = numpy_helper.from_array(np.ones((1, 1), np.float32), "w")
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    path = tmp_path / "r.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    inputs = np.array([[1e-4], [100]], np.float32)
    (tmp_path / "q.onnx").write_bytes(b"an older one")
    with pytest.raises(ModelError, match="`q.onnx` answers calibration inputs with numbers that are not finite"):
        quantize_file(path, tmp_path / "q.onnx", inputs, X86, QuantizeConfig())
    assert (tmp_path / "q.onnx").read_bytes() == b"an older one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx", "r.onnx"]
