"""Outputs for another processor do not depend on this one, whose sums may saturate."""

import json
import logging
import platform

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.onnx import exact_sums
from edgekd.onnx.exact_sums import ENTRIES, exact_entries, unshare
from edgekd.onnx.session import run_model
from edgekd.pipelines.sensitivity import SensitivityRequest, analyze_sensitivity
from edgekd.stages.explain.explain import explain
from edgekd.stages.quantize.file_api import SchemeChoice, quantize_by_name
from edgekd.stages.quantize.quantize import quantize_file
from edgekd.stages.quantize.ranges import QuantizeConfig
from edgekd.utils.cpu import flags, saturates

HERE = saturates(platform.machine(), flags())  # without VNNI two products, of 255 and 127 each, are more than 16 bits
WIDTH, CLASSES = 64, 4


def network(path, layers=1):
    """Products that all have one sign, so that saturation shows; several layers have the same weights."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 1, (WIDTH, WIDTH)).astype(np.float32) / WIDTH
    head = (
        rng.uniform(0.5, 1, (WIDTH, CLASSES)) + 3 * (np.arange(WIDTH)[:, None] % CLASSES == np.arange(CLASSES))
    ) / 99
    names = ["x", *(f"y{i}" for i in range(layers))]
    nodes = [helper.make_node("MatMul", [a, "w"], [b], f"layer {b}") for a, b in zip(names, names[1:], strict=False)]
    nodes.append(helper.make_node("MatMul", [names[-1], "h"], ["z"], "head"))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in (("x", WIDTH), ("z", 4))]
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in (("w", weight), ("h", head))]
    graph = helper.make_graph(nodes, "positive", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def inputs():
    return np.random.default_rng(1).uniform(0.8, 1, (64, WIDTH)).astype(np.float32)


def snr(want, got):
    return 10 * np.log10((want**2).sum() / ((want - got) ** 2).sum())


@pytest.mark.parametrize("layers", [1, 3], ids="layers: {}".format)
@pytest.mark.parametrize("name", ["ort-x86", "ort-arm", "openvino", "tensorrt"])
def test_sums_are_exact_on_every_processor_unless_they_shall_be_those_of_this_one(tmp_path, inputs, name, layers):
    path = network(tmp_path / "fp32.onnx", layers)
    int8 = quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES[name], QuantizeConfig()).file.path
    want, exact = run_model(path, inputs), run_model(int8, inputs)
    here = run_model(int8, inputs, exact=False)
    assert snr(want, exact) > 35
    assert snr(want, here) < 20 if HERE else np.array_equal(here, exact)


def test_the_entry_is_there_where_sums_saturate_and_else_costs_no_time(monkeypatch):
    assert exact_entries() == (ENTRIES if HERE else {})
    monkeypatch.setattr(exact_sums.platform, "machine", lambda: "x86_64")
    for known, entries in ((("avx2",), ENTRIES), ((), ENTRIES), (("avx2", "avx_vnni"), {})):
        monkeypatch.setattr(exact_sums, "flags", lambda known=known: known)
        assert exact_entries() == entries
    monkeypatch.setattr(exact_sums.platform, "machine", lambda: "aarch64")
    assert exact_entries() == {}


@pytest.mark.parametrize("name", ["ort-x86", "tensorrt"])
def test_layers_that_share_weights_get_their_own_and_answer_alike(tmp_path, inputs, name):
    made = quantize_file(
        network(tmp_path / "fp32.onnx", 3), tmp_path / "int8.onnx", inputs, QUANT_SCHEMES[name], QuantizeConfig()
    ).file.path
    model = onnx.load(made)
    assert unshare(model)
    assert not unshare(model)
    onnx.save(model, tmp_path / "apart.onnx")
    onnx.checker.check_model(model, full_check=True)
    for exact in (True, False):
        one, other = (run_model(path, inputs, exact=exact) for path in (made, tmp_path / "apart.onnx"))
        np.testing.assert_array_equal(one, other)


def test_full_range_weights_are_told_to_saturate_where_they_do(tmp_path, inputs, caplog):
    caplog.set_level(logging.WARNING, "edgekd")
    np.save(tmp_path / "inputs.npy", inputs)
    path = network(tmp_path / "fp32.onnx")
    for choice in (SchemeChoice(scheme="ort-arm"), SchemeChoice(target="cpu")):
        quantize_by_name(path, tmp_path / "inputs.npy", tmp_path / "q.onnx", choice, {"method": "minmax"})
    assert not caplog.text
    choice = SchemeChoice(scheme="ort-x86")
    quantize_by_name(path, tmp_path / "inputs.npy", tmp_path / "q.onnx", choice, {"method": "minmax"})
    assert ("dB on this processor" in caplog.text and "--target cpu" in caplog.text) is HERE


def test_what_int8_costs_elsewhere_is_not_what_it_costs_here(tmp_path, inputs):
    """On a Jetson: `sensitivity` and `explain` judge in exact sums, and say so."""
    path = network(tmp_path / "fp32.onnx")
    answers = run_model(path, inputs)
    np.save(tmp_path / "inputs.npy", inputs)
    np.save(tmp_path / "labels.npy", answers.argmax(1))
    files = (tmp_path / "inputs.npy", tmp_path / "inputs.npy", tmp_path / "labels.npy")
    found = analyze_sensitivity(tmp_path / "out", SensitivityRequest(path, *files, "jetson", QuantizeConfig()))
    assert found.candidates[0].scores.snr_db > 35
    assert found.session_config == (ENTRIES if HERE else {})
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text())["session_config"] == found.session_config
    assert ("session.x64quantprecision=1" in (tmp_path / "out" / "sensitivity.md").read_text()) is HERE
    int8 = quantize_file(path, tmp_path / "int8.onnx", inputs, QUANT_SCHEMES["tensorrt"], QuantizeConfig()).file.path
    told = explain(int8, path, tmp_path / "inputs.npy", "jetson")
    assert told.session_config == found.session_config
    assert told.agreement == 100 * (run_model(int8, inputs).argmax(1) == answers.argmax(1)).mean()
