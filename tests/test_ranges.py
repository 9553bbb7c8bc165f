"""Ranges: exact counts in bounded memory, where each method clips, which is chosen, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekd.core.artifact import Exported, File, TensorSpec
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.data.digits import Digits
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.onnx import inspect, session
from edgekd.onnx.inputs import load_calibration
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.stages.quantize import histogram
from edgekd.stages.quantize.auto_method import select_most_accurate
from edgekd.stages.quantize.calibration_cache import quantize_to_cache
from edgekd.stages.quantize.calibration_set import CalibrationConfig, collect_calibration_set, user_file
from edgekd.stages.quantize.histogram import SIDE, Histogram
from edgekd.stages.quantize.quantize import Int8Options, quantize_file, select_ranges
from edgekd.stages.quantize.ranges import (
    METHODS,
    QuantizeConfig,
    Ranges,
    best_ranges,
    calibrate,
    calibrate_methods,
    load_prepared,
)

AUTO = QuantizeConfig("auto")
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def counted(*portions):
    found = Histogram()
    for values in portions:
        values = np.asarray(values, np.float32)
        found.add(values, float(np.abs(values).max()))
    return found


def network(path, batch=1, weight=None, middle=()):
    """y = relu(x w) w2, with x of 6 numbers; `middle` are nodes from `a` to `b` in place of the Relu."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((6, 8)) if weight is None else weight
    constants = [
        numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in (("w", weight), ("w2", random.standard_normal((8, 4))))
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), *(middle or [helper.make_node("Relu", ["a"], ["b"])])]
    nodes.append(helper.make_node("MatMul", ["b", "w2"], ["y"]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, size]) for n, size in (("x", 6), ("y", 4))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def inputs(count=64, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)


# counting


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(FLOATS, min_size=1, max_size=30), min_size=1, max_size=6), st.randoms())
def test_neither_portions_nor_their_order_change_the_counts(portions, random):
    whole = counted([x for part in portions for x in part])
    random.shuffle(portions)
    parts = counted(*portions)
    assert parts.exponent == whole.exponent and (parts.counts == whole.counts).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(FLOATS, min_size=1, max_size=60))
def test_every_value_is_in_the_bin_that_holds_it(values):
    found = counted(values)
    exact = np.floor(np.asarray(values, np.float32).astype(np.float64) / found.width).astype(int) + SIDE
    assert (np.bincount(exact, minlength=2 * SIDE) == found.counts).all()
    reach = np.abs(np.float32(values)).max()
    assert reach <= SIDE * found.width and (reach >= SIDE * found.width / 2 or found.exponent == histogram.FINEST)


def test_values_that_outgrow_the_bins_cost_no_memory():
    found = counted([1e-3], [1.0], [1e6], [-1e30])
    assert found.counts.size == 2 * SIDE and found.counts.sum() == 4


# clipping


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_values_to_within_a_bin(share):
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    found = counted(values)
    low, high = histogram.percentile(found, share)
    limit, cut, one = histogram.magnitude_percentile(found, share), 0.5 - share / 200, 2 / len(values)
    for side, bound in ((-values, -low), (values, high)):
        assert (side > bound).mean() - one <= cut <= (side > bound - found.width).mean() + one
    assert (np.abs(values) > limit).mean() - one <= 2 * cut <= (np.abs(values) > limit - found.width).mean() + one


def rounding_error(values, low, high):
    """Of unsigned 8-bit numbers, worked out on the values themselves."""
    step = (high - low) / 255
    zero = np.round(-low / step)
    whole = np.clip(np.round(values / step) + zero, 0, 255) - zero
    return np.mean((values - whole * step) ** 2)


def signed_error(values, limit):
    return np.mean((values - np.clip(np.round(values / (limit / 127)), -127, 127) * (limit / 127)) ** 2)


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_mse_ranges_have_the_least_error_on_the_values_themselves(kind):
    random = np.random.default_rng(1)
    values = random.standard_t(3, 20_000) if kind == "heavy" else random.standard_normal(20_000)
    values = np.maximum(values, 0) if kind == "relu" else values
    values = values.astype(np.float32)
    low, high, reach = float(values.min()), float(values.max()), float(np.abs(values).max())
    found = counted(values)
    bounds = histogram.least_error(found, low, high)
    shares = np.linspace(0.02, 1, 50)
    least = min(rounding_error(values, a * low, b * high) for a in (shares if low < 0 else [1]) for b in shares)
    assert rounding_error(values, *bounds) < 1.05 * least
    least = min(signed_error(values, share * reach) for share in shares)
    assert signed_error(values, histogram.least_symmetric_error(found, reach)) < 1.05 * least


def test_divergence_is_that_of_the_case_worked_by_hand():
    # kept 1 3 2 2, outliers 2: p = (1 3 2 4) / 10; two levels of mean 2: q = (2 2 2 2) / 8
    p = np.array([0.1, 0.3, 0.2, 0.4])
    assert histogram.divergence(np.array([1.0, 3, 2, 2, 2]), 4, 2) == pytest.approx((p * np.log(p / 0.25)).sum())
    # an empty bin stays empty: kept 4 0 2 2, levels of mean 4 (one live bin) and 2
    p, q = np.array([4, 2, 2]) / 8, np.array([4, 2, 2]) / 8
    assert histogram.divergence(np.array([4.0, 0, 2, 2]), 4, 2) == pytest.approx((p * np.log(p / q)).sum()) == 0
    # only outliers in the last level, which counts as 0.0001 values
    p, q = np.array([4, 4, 9]) / 17, np.array([4, 4, 1e-4]) / 8.0001
    assert histogram.divergence(np.array([4.0, 4, 0, 0, 9]), 4, 2) == pytest.approx((p * np.log(p / q)).sum())


def test_entropy_cuts_a_lone_outlier_and_keeps_what_is_spread_evenly():
    random = np.random.default_rng(2)
    for outlier in (40.0, 100.0, 300.0):
        tail = counted(np.append(random.standard_normal(100_000), [outlier]))
        assert 2 < histogram.entropy(tail, 128) < outlier / 2
    even = counted(random.uniform(-1, 1, 400_000))
    assert histogram.entropy(even, 128) > 0.97
    assert histogram.entropy(tail, 256) >= histogram.entropy(tail, 128)


def test_exact_zeros_do_not_change_where_entropy_clips():
    values = np.abs(np.random.default_rng(2).standard_normal(50_000)) + 0.01
    assert histogram.entropy(counted(values, np.zeros(500_000)), 256) == histogram.entropy(counted(values), 256)


# ranges of a network


def test_minmax_knows_the_extremes_of_every_float_tensor(tmp_path):
    path, x = network(tmp_path / "n.onnx"), inputs()
    found = calibrate(path, x, QuantizeConfig())
    model = load_prepared(path)
    model.graph.output.extend([v for v in model.graph.value_info if v.name in "ab"])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for name in "aby":
        values = np.concatenate([running.run([name], {"x": x[i : i + 1]})[0] for i in range(len(x))])
        assert found.bounds[name] == pytest.approx((values.min(), values.max()), rel=1e-5)
    assert set(found.bounds) == set("xaby")


def test_one_pass_finds_what_each_method_finds_alone(tmp_path):
    path, x = network(tmp_path / "n.onnx"), inputs()
    found = calibrate_methods(path, x, AUTO)
    assert tuple(found) == METHODS
    for method, ranges in found.items():
        assert ranges == calibrate(path, x, QuantizeConfig(method)) and ranges.method == method


def test_no_method_goes_beyond_what_was_seen(tmp_path):
    found = calibrate_methods(network(tmp_path / "n.onnx"), inputs(), AUTO)
    for ranges in found.values():
        for name, (low, high) in found["minmax"].bounds.items():
            assert low <= ranges.bounds[name][0] < ranges.bounds[name][1] <= high
            assert 0 < ranges.bounds_for(symmetric=True)[name][1] <= max(-low, high)


def test_batches_of_a_static_size_have_the_same_extremes(tmp_path):
    x = inputs()
    one, four = (calibrate(network(tmp_path / f"{b}.onnx", b), x, QuantizeConfig()).bounds for b in (1, 4))
    for name, pair in one.items():
        assert four[name] == pytest.approx(pair, rel=1e-5)


def test_symmetric_forms_take_the_larger_end_unless_they_are_clipped_elsewhere():
    ranges = Ranges({"a": (-1.0, 3.0), "b": (0.0, 6.0)}, {"b": 4.0})
    assert ranges.bounds_for(symmetric=False) == {"a": (-1.0, 3.0), "b": (0.0, 6.0)}
    assert ranges.bounds_for(symmetric=True) == {"a": (-3.0, 3.0), "b": (-4.0, 4.0)}


def test_int8_files_and_caches_have_the_scales_of_their_form(tmp_path):
    path, x = network(tmp_path / "n.onnx"), inputs(256) ** 3
    config = QuantizeConfig("mse")
    found = calibrate(path, x, config)
    assert found.limits["b"] < found.bounds["b"][1]  # half the steps, so more is clipped
    scale = {}
    for name in ("ort-x86", "tensorrt"):
        made = quantize_file(path, tmp_path / f"{name}.onnx", x, QUANT_SCHEMES[name], config).file.path
        scale[name] = {t.name: numpy_helper.to_array(t) for t in onnx.load(made).graph.initializer}["b_scale"]
    assert scale["ort-x86"] == pytest.approx(found.bounds["b"][1] / 255, rel=1e-5)
    assert scale["tensorrt"] == pytest.approx(found.limits["b"] / 127, rel=1e-5)
    cache = quantize_to_cache(path, tmp_path / "n.cache", x, "8.5.2", config).file.path.read_text()
    bits = next(line.partition(": ")[2] for line in cache.splitlines() if line.startswith("b:"))
    assert np.array(int(bits, 16), np.uint32).view(np.float32) == pytest.approx(found.limits["b"] / 127, rel=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    path = network(tmp_path / "n.onnx", weight=np.ones((6, 8)))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 100_000
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((100_000, 8), np.float32), "w"))
    onnx.save(model, path)
    script = (
        "import sys; from pathlib import Path; from edgekd.core.artifact import TensorSpec\n"
        "from edgekd.stages.quantize.ranges import *; from edgekd.onnx.inputs import load_calibration\n"
        "x = load_calibration(Path(sys.argv[2]), TensorSpec('x', (0, 100000)))\n"
        "calibrate(Path(sys.argv[1]), x, QuantizeConfig('entropy'))\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    peaks = []
    for count in (16, 200):  # 6 and 80 MB
        images = np.random.default_rng(0).standard_normal((count, 100_000), np.float32)
        np.savez(tmp_path / f"{count}.npz", x=images)
        words = [sys.executable, "-c", script, str(path), str(tmp_path / f"{count}.npz")]
        peaks.append(float(subprocess.run(words, capture_output=True, text=True, check=True).stdout) / 1024)
    assert peaks[1] < peaks[0] + 20  # MiB


# choosing


def test_the_best_grade_wins_and_the_first_of_equals():
    found = {name: Ranges({}, method=name) for name in METHODS}
    grades = dict(zip(METHODS, (80.0, 79.0, 82.0, 82.0, 81.0), strict=True))
    chosen = best_ranges(found, lambda ranges: grades[ranges.method])
    assert chosen.method == "percentile" and chosen.scores == grades
    assert best_ranges(found, lambda ranges: 0.0).method == "minmax"


def test_auto_drops_the_extremes_where_a_freak_input_spoils_them(tmp_path):
    path, x = network(tmp_path / "n.onnx"), inputs(400)
    x[0] *= 300
    chosen = select_ranges(path, x, Int8Options(QUANT_SCHEMES["ort-x86"]), AUTO)
    assert chosen.method != "minmax"
    assert chosen.scores[chosen.method] == max(chosen.scores.values()) > chosen.scores["minmax"] + 6
    assert quantize_file(path, tmp_path / "q.onnx", x, QUANT_SCHEMES["ort-x86"], AUTO).precision == "int8"
    quantize_to_cache(path, tmp_path / "q.cache", x, "8.5.2", AUTO)


def test_what_auto_holds_out_is_no_part_of_the_ranges(tmp_path):
    path, x = network(tmp_path / "n.onnx"), inputs(16)
    x[3::4] *= 100
    chosen = select_ranges(path, x, Int8Options(QUANT_SCHEMES["ort-x86"]), AUTO)
    assert chosen.bounds["x"][1] <= np.delete(x, np.s_[3::4], 0).max()


def test_auto_needs_something_to_judge_by(tmp_path):
    path = network(tmp_path / "n.onnx")
    with pytest.raises(ConfigError, match="holds out every 4th batch"):
        select_ranges(path, inputs(3), Int8Options(QUANT_SCHEMES["ort-x86"]), AUTO)
    with pytest.raises(ConfigError, match="leaves 5"):
        calibrate(path, inputs(), AUTO)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return prepare_dataset(tmp_path_factory.mktemp("data"), Digits(), None)


@pytest.fixture(scope="module")
def student(task, tmp_path_factory):
    """Least squares on pixels, as ONNX with both batch sizes."""
    train = task.train.load()
    x = task.inputs(np.asarray(train.images)).reshape(len(train.labels), -1)
    target = np.eye(10)[train.labels]
    weight = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ target).astype(np.float32)
    home, made = tmp_path_factory.mktemp("student"), []
    for name, batch in (("student", 1), ("student-dynamic", "batch")):
        nodes = [helper.make_node("Flatten", ["image"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["logits"])]
        entering = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, *task.shape])
        leaving = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])
        graph = helper.make_graph(nodes, "g", [entering], [leaving], [numpy_helper.from_array(weight, "w")])
        imports = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), home / f"{name}.onnx")
        made.append(inspect.describe(home / f"{name}.onnx", name, made[0].macs if made else None))
    return Exported(*made)


@pytest.mark.parametrize("scheme", ["ort-x86", "dla"])
def test_a_build_takes_the_ranges_that_are_best_on_validation_images(task, student, tmp_path, scheme):
    images = collect_calibration_set(tmp_path, task, CalibrationConfig(images=32), "digits").images
    found = calibrate_methods(student.dynamic.file.path, load_calibration(images.path, student.single.input), AUTO)
    broken = {name: (low * 1000, high * 1000) for name, (low, high) in found["minmax"].bounds.items()}
    found = {"minmax": Ranges(broken, method="minmax"), **{m: found[m] for m in METHODS[1:]}}
    chosen = select_most_accurate(tmp_path, student, images, found, task, Int8Options(QUANT_SCHEMES[scheme]))
    assert list(chosen.scores) == list(METHODS)
    assert chosen.scores["minmax"] < 50 < chosen.scores[chosen.method] == max(chosen.scores.values())
    if scheme == "ort-x86":
        file = tmp_path / "q.onnx"
        known = load_calibration(images.path, student.single.input)
        quantize_file(student.dynamic.file.path, file, known, QUANT_SCHEMES[scheme], QuantizeConfig(chosen.method))
        valid = task.valid.load()
        right = session.run_model(file, task.inputs(np.asarray(valid.images))).argmax(1) == valid.labels
        assert chosen.scores[chosen.method] == pytest.approx(100 * right.mean())
    assert (
        select_most_accurate(
            tmp_path, student, images, {"entropy": found["entropy"]}, task, Int8Options(QUANT_SCHEMES[scheme])
        ).scores
        == {}
    )


# files of inputs


@pytest.mark.parametrize("order", ["C", "F"])
def test_inputs_are_mapped_where_they_are_stored_as_they_are(tmp_path, order):
    spec, x = TensorSpec("x", (0, 6)), np.asarray(inputs(), order=order)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", first=np.arange(5), x=x)
    np.savez_compressed(tmp_path / "small.npz", x=x)
    for name, mapped in (("x.npy", True), ("x.npz", True), ("small.npz", False)):
        found = load_calibration(tmp_path / name, spec)
        assert np.array_equal(found, x) and isinstance(found, np.memmap) is mapped
    assert calibrate(network(tmp_path / "n.onnx"), load_calibration(tmp_path / "x.npz", spec), QuantizeConfig())


def test_files_of_other_things_are_no_inputs(tmp_path):
    spec = TensorSpec("x", (0, 6))
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object))
    for name in ("objects.npz", "objects.npy"):
        with pytest.raises(DataError, match="is not a readable .npz or .npy file of numbers"):
            load_calibration(tmp_path / name, spec)
    np.savez(tmp_path / "cut.npz", x=inputs())
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not a readable"):
        load_calibration(tmp_path / "cut.npz", spec)


def test_a_file_of_the_test_split_is_refused_by_its_manifest(task, tmp_path):
    images = collect_calibration_set(tmp_path, task, CalibrationConfig(images=32), "digits").images.path
    manifest = json.loads(images.with_name("manifest.json").read_text())
    spec = TensorSpec("image", (0, *task.shape))
    assert len(load_calibration(images, spec)) == 32
    images.with_name("manifest.json").write_text(json.dumps(manifest | {"split": "test"}))
    with pytest.raises(DataError, match="is of the split `test`, as .*manifest.json` says"):
        load_calibration(images, spec)
    images.rename(images.with_name("other.npz"))  # the manifest is of another file
    assert len(load_calibration(images.with_name("other.npz"), spec)) == 32


def test_the_users_own_inputs_take_the_place_of_training_images(task, tmp_path):
    train = task.inputs(np.asarray(task.train.load().images[:40]))
    np.savez(tmp_path / "own.npz", image=train)
    config = CalibrationConfig(images=24, file=str(tmp_path / "own.npz"))
    made = collect_calibration_set(tmp_path, task, config, "digits")
    assert np.array_equal(load_calibration(made.images.path, TensorSpec("image", (0, *task.shape))), train[:24])
    manifest = json.loads(made.manifest.path.read_text())
    assert (manifest["source"], manifest["split"], manifest["count"]) == ("own.npz", "train", 24)
    assert user_file(config) == File.of(tmp_path / "own.npz") and user_file(CalibrationConfig()) is None
    with pytest.raises(DataError, match="there is no calibration file .*gone.npz"):
        user_file(replace(config, file=str(tmp_path / "gone.npz")))
    with pytest.raises(DataError, match="calibration.images is 99, but .*own.npz` holds 40"):
        collect_calibration_set(tmp_path, task, replace(config, images=99), "digits")


def test_own_inputs_that_are_test_images_are_refused(task, tmp_path):
    test = task.inputs(np.asarray(task.test.load().images[:3])) * np.float32(1 + 1e-6)  # scaled by another program
    train = task.inputs(np.asarray(task.train.load().images[:40]))
    np.savez(tmp_path / "own.npz", image=np.concatenate([train, test]))
    with pytest.raises(DataError, match="own.npz` holds 3 images of the test split"):
        collect_calibration_set(tmp_path, task, CalibrationConfig(images=43, file=str(tmp_path / "own.npz")), "digits")
    collect_calibration_set(tmp_path, task, CalibrationConfig(images=40, file=str(tmp_path / "own.npz")), "digits")


# what is refused


def test_inputs_that_are_all_the_same_number_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds nothing but the number 0.5"):
        calibrate(network(tmp_path / "n.onnx"), np.full((8, 6), 0.5, np.float32), QuantizeConfig())


@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_numbers_that_are_not_finite_are_found_where_they_arise(tmp_path, method):
    """The root of a negative number, which nothing behind it shows."""
    middle = [
        helper.make_node("Sqrt", ["a"], ["r"]),
        helper.make_node("IsNaN", ["r"], ["odd"]),
        helper.make_node("Where", ["odd", "a", "r"], ["b"]),
    ]
    path = network(tmp_path / "n.onnx", middle=middle)
    assert np.isfinite(session.run_model(path, inputs())).all()
    with pytest.raises(ModelError, match="not finite on the calibration inputs, in the tensor `r`"):
        calibrate(path, inputs(), QuantizeConfig(method))
