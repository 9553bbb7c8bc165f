"""Layers kept float: which ones INT8 harms, what stays float with them, and the cheapest mix within a limit."""

import dataclasses
import json
import re

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.config import load_config
from edgekd.core import serialization
from edgekd.core.artifact import File
from edgekd.core.bench_result import Interval, Samples
from edgekd.core.mixed_precision import EvalScores, LayerSensitivity, MixedPrecision, ParetoFront
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.errors import ConfigError, ModelError
from edgekd.onnx import inspect
from edgekd.stages.export.export import ExportConfig, export
from edgekd.stages.mixed_precision.search import (
    MixedPrecisionRequest,
    choose_mixed_precision,
    gain_per_cost,
    limit_missed,
    select_candidate,
)
from edgekd.stages.mixed_precision.sensitivity import EvalSet, QuantizableModel, accuracy_drop, measure_layers
from edgekd.stages.quantize.calibration_cache import quantize_to_cache
from edgekd.stages.quantize.float_layers import float_node_outputs, quantizable_layers, select_layers
from edgekd.stages.quantize.preparation import scheme_for
from edgekd.stages.quantize.quantize import Int8Options, quantize, quantize_file, write_int8
from edgekd.stages.quantize.ranges import QuantizeConfig, calibrate, load_prepared
from edgekd.stages.report import mixed_precision as told
from edgekd.targets.cpu import Cpu
from edgekd.targets.jetson import Jetson
from edgekd.tasks.classification import Classification
from edgekd.tasks.regression import Regression
from tests import zoo
from tests.test_report import EVIL, record  # noqa: F401  (a fixture)
from tests.zoo import Staged, Toy, blobs_dataset

TENSOR = dataclasses.replace(QUANT_SCHEMES["ort-x86"], per_channel=False)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return blobs_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def student(task, tmp_path_factory):
    """A toy that knows its task, whose second layer INT8 ruins if it has one scale; its calibration file and inputs.

    A channel that is always 0 meets weights there that are a 1000 times larger than all others.
    """
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("student")
    train = task.train.load()
    x, y = torch.from_numpy(task.inputs(np.asarray(train.images))), torch.from_numpy(train.labels)
    network = Toy()
    nn.init.zeros_(network.stage1[1].weight[:1])
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    network.eval().stage2[0].weight.data[:, 0] = 1000 * network.stage2[0].weight.abs().max()
    np.savez(out / "calib.npz", image=x.numpy())
    made = export(out, "student", network, x.numpy()[:8], zoo.logits(3), ExportConfig())
    return made, File.of(out / "calib.npz"), x.numpy()


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)
    return export(tmp_path_factory.mktemp("staged"), "staged", Staged().eval(), x, zoo.logits(3), ExportConfig()), x


def subject(student, scheme=TENSOR, base=()):
    made, _, known = student
    ranges = calibrate(made.dynamic.file.path, known, QuantizeConfig())
    options = Int8Options(scheme, base)
    paths = made.dynamic.file.path, made.single.file.path
    return QuantizableModel("student", *paths, known, ranges, options, made.single.macs)


def an_exam(student, task):
    valid = task.valid.load()
    return EvalSet.of(
        student[0].dynamic.file.path, task.inputs(np.asarray(valid.images)), valid.labels, Classification()
    )


def chosen(out, parts, name, target, config, max_drop):
    request = MixedPrecisionRequest(*parts, Int8Options.of(target.scheme, config), max_drop)
    return choose_mixed_precision(out, request, name, target)


def graph_of(path):
    graph = onnx.load(path).graph
    return graph, {name: node for node in graph.node for name in node.output}


def around(path, layer, fp32):
    """Operators before and behind the weighted node of a layer, and what its weight comes from."""
    graph, makers = graph_of(path)
    output = quantizable_layers(load_prepared(fp32).graph)[layer].output[0]
    (node,) = (n for n in graph.node if n.op_type in ("Conv", "Gemm") and n.name == known_name(fp32, layer))
    readers = [n.op_type for n in graph.node if node.output[0] in n.input]
    sources = [makers[name].op_type if name in makers else "" for name in node.input[:2]]
    return sources, readers, output


def known_name(fp32, layer):
    return quantizable_layers(load_prepared(fp32).graph)[layer].name  # of the node


# what a layer is called


@pytest.mark.parametrize("opset", [17, 20])
def test_a_layer_has_one_name_whichever_exporter_wrote_it_and_for_any_batch(staged, tmp_path, opset):
    torch.manual_seed(0)
    made = export(tmp_path, "x", Staged().eval(), staged[1][:2], zoo.logits(3), ExportConfig(opset=opset))
    for model in (made.single, made.dynamic):
        names = list(quantizable_layers(load_prepared(model.file.path).graph))
        assert names[:2] == ["stem.0", "stage1.0.branch.0"] and names[-1] == "head" and len(names) == 8


def test_a_layer_is_found_by_its_name_its_node_its_output_and_by_the_words(staged):
    graph = load_prepared(staged[0].single.file.path).graph
    stem = quantizable_layers(graph)["stem.0"]
    found = [select_layers(graph, [name]) for name in ("first", "stem.0", stem.name, stem.output[0])]
    assert found == [{stem.output[0]}] * 4
    assert select_layers(graph, ["last"]) == {quantizable_layers(graph)["head"].output[0]}


def test_a_name_that_is_none_gets_the_nearest_one_as_a_hint(staged, tmp_path):
    single, x = staged[0].single.file.path, staged[1]
    with pytest.raises(ConfigError, match=r"no layer is called `stem.1`") as caught:
        quantize_file(single, tmp_path / "x.onnx", x, QUANT_SCHEMES["ort-x86"], QuantizeConfig(keep_float=("stem.1",)))
    assert "did you mean `stem.0`?" in caught.value.hint and not (tmp_path / "x.onnx").exists()


def test_all_layers_in_float_is_refused(staged):
    graph = load_prepared(staged[0].single.file.path).graph
    with pytest.raises(ConfigError, match="all 8 layers are to stay float"):
        select_layers(graph, tuple(quantizable_layers(graph)))


def test_a_limit_that_is_no_share_of_images_is_refused():
    for value in (-0.1, 100.0, float("nan")):
        with pytest.raises(ConfigError, match="max_drop is"):
            QuantizeConfig(max_drop=value)


# what stays float with it


def test_integers_leave_no_pair_around_a_float_layer_that_can_do_without(staged, tmp_path):
    made, x = staged
    path = made.single.file.path
    ranges = calibrate(made.dynamic.file.path, x, QuantizeConfig())
    file = tmp_path / "x.onnx"
    write_int8(path, file, x, ranges, Int8Options(QUANT_SCHEMES["ort-x86"], ("first", "last")))
    assert around(file, "stem.0", path)[:2] == (["", ""], ["Relu"])  # image and weight as they are; one kernel with it
    sources, readers, output = around(file, "head", path)
    assert sources == ["ReduceMean", ""] and not readers and output == "logits"
    full = inspect.facts(
        write_int8(path, tmp_path / "y.onnx", x, ranges, Int8Options(QUANT_SCHEMES["ort-x86"])).file.path
    ).nodes
    assert inspect.facts(file).nodes["QuantizeLinear"] < full["QuantizeLinear"]


def test_a_float_layer_between_integers_is_float_in_the_runtime_too(staged, tmp_path):
    """onnxruntime quantizes a float weight between a DequantizeLinear and a QuantizeLinear by itself."""
    import onnxruntime as ort

    made, x = staged
    ranges = calibrate(made.dynamic.file.path, x, QuantizeConfig())
    counts = []
    for keep_float in ((), ("stage1.1.branch.0",), ("stage1.1.branch.0", "stage2.0.0")):
        write_int8(
            made.single.file.path, tmp_path / "x.onnx", x, ranges, Int8Options(QUANT_SCHEMES["ort-x86"], keep_float)
        )
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(tmp_path / "x.onnx"), options, providers=["CPUExecutionProvider"])
        counts.append(inspect.load(tmp_path / "optimised.onnx").graph.node)
    found = [sum(n.op_type in ("Conv", "FusedConv") for n in nodes) for nodes in counts]
    assert found == [0, 1, 2]


def test_the_input_of_a_float_layer_has_the_same_numbers_as_for_its_other_readers(staged, tmp_path):
    made, x = staged
    ranges = calibrate(made.dynamic.file.path, x, QuantizeConfig())
    write_int8(
        made.single.file.path,
        tmp_path / "x.onnx",
        x,
        ranges,
        Int8Options(QUANT_SCHEMES["ort-x86"], ("stage1.1.branch.0",)),
    )
    graph, makers = graph_of(tmp_path / "x.onnx")
    numbers = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    (node,) = (n for n in graph.node if n.name == known_name(made.single.file.path, "stage1.1.branch.0"))
    own = makers[node.input[0]]
    other = next(
        n for n in graph.node if n.op_type == "DequantizeLinear" and n is not own and n.input[0] == own.input[0]
    )
    for position in (1, 2):
        assert set(numbers[own.input[position]].tolist()) == {numbers[other.input[position]].item()}
    assert [(a.name, a.i) for a in own.attribute] == [("axis", 1)] and numbers[own.input[1]].shape == (4,)


def test_pairs_stand_neither_at_a_float_layer_nor_on_the_skip_beside_it(staged, tmp_path):
    made, x = staged
    path = made.single.file.path
    ranges = calibrate(made.dynamic.file.path, x, QuantizeConfig())
    write_int8(path, tmp_path / "all.onnx", x, ranges, Int8Options(QUANT_SCHEMES["tensorrt"]))
    write_int8(path, tmp_path / "x.onnx", x, ranges, Int8Options(QUANT_SCHEMES["tensorrt"], ("stage1.1.branch.0",)))
    assert around(tmp_path / "x.onnx", "stage1.1.branch.0", path)[0] == ["Add", ""]
    pairs = [inspect.facts(tmp_path / f"{name}.onnx").nodes["QuantizeLinear"] for name in ("all", "x")]
    assert pairs[0] - pairs[1] >= 2  # of its weight, and of its input and skip, which are one tensor
    skipped = [n for n in graph_of(tmp_path / "x.onnx")[0].node if n.op_type == "Add"]
    assert "DequantizeLinear" not in [graph_of(tmp_path / "x.onnx")[1][name].op_type for name in skipped[1].input]


@pytest.mark.parametrize("scheme", ["ort-x86", "tensorrt"])
def test_a_float_layer_changes_no_range_of_the_others(staged, tmp_path, scheme):
    """So ranges that training found stay right for the layers that keep them."""
    made, x = staged
    ranges = calibrate(made.dynamic.file.path, x, QuantizeConfig())
    found = []
    for name, keep_float in (("all", ()), ("some", ("first", "stage2.0.0"))):
        write_int8(
            made.single.file.path, tmp_path / f"{name}.onnx", x, ranges, Int8Options(QUANT_SCHEMES[scheme], keep_float)
        )
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        found.append({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("_scale")})
    own = {name for name in found[1] if "_float_" in name}  # one scale, for each channel
    assert len(found[1]) - len(own) < len(found[0]) and found[1].keys() - own <= found[0].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[1].keys() - own)


def test_nothing_is_kept_where_nothing_is_asked_for(staged):
    assert float_node_outputs(load_prepared(staged[0].single.file.path), (), float_adds=True) == set()


def test_both_batch_forms_keep_the_same_layers_float(staged, tmp_path):
    made, x = staged
    np.savez(tmp_path / "c.npz", image=x)
    int8 = quantize(
        tmp_path,
        made,
        File.of(tmp_path / "c.npz"),
        QUANT_SCHEMES["ort-x86"],
        QuantizeConfig(keep_float=("stage2.0.0",)),
    )
    for form in (int8.single, int8.dynamic):
        stored = {t.name for t in onnx.load(form.file.path).graph.initializer}
        assert "stage2.0.0.weight" in stored and "stem.0.weight_quantized" in stored


def test_a_calibration_cache_takes_no_float_layers(staged, tmp_path):
    with pytest.raises(ConfigError, match="TensorRT itself decides which layers of a DLA are float"):
        scheme_for(QUANT_SCHEMES["dla"], QuantizeConfig(keep_float=("first",)))
    with pytest.raises(ConfigError, match="TensorRT itself decides"):
        quantize_to_cache(
            staged[0].single.file.path, tmp_path / "x.cache", staged[1], "8.5.2", QuantizeConfig(keep_float=("first",))
        )


# which layers INT8 harms


def test_the_layer_that_was_ruined_by_hand_is_ranked_first(student, task):
    found = measure_layers(subject(student), an_exam(student, task), ends_only=False)
    assert found[0].name == "stage2.0" and found[0].int8_alone.snr_db < found[1].int8_alone.snr_db - 6
    assert {layer.name: layer.macs for layer in found} == {
        "stage1.0": 64 * 4 * 9,
        "stage2.0": 16 * 8 * 4 * 9,
        "stage3.0": 16 * 16 * 8 * 9,
        "head": 16 * 3,
    }


def test_a_limit_frees_the_ruined_layer_and_no_other(student, task, tmp_path):
    made, images, _ = student
    config = QuantizeConfig(per_channel=False)
    ranges = calibrate(made.dynamic.file.path, student[2], config)
    found = chosen(tmp_path, (made, images, ranges, task), "jetson", Jetson(), config, 4.0)
    assert found.candidates[0].scores.accuracy_drop.estimate > 4 and found.selection.keep_float == ("stage2.0",)
    assert found.selection.scores.accuracy_drop.estimate <= 4 and found.meets_limit
    assert found.not_timed_reason and found.selection.latency_ratio is None  # there is no Jetson here: priced by MACs
    assert found.selection.float_macs_fraction == pytest.approx(16 * 8 * 4 * 9 / made.single.macs)


@pytest.fixture
def quick(monkeypatch):
    """Few timed calls."""
    from edgekd.stages.bench.config import BenchConfig
    from edgekd.stages.mixed_precision import search as module

    few = BenchConfig(rounds=3, calls_per_round=8, warmup_s=0.01, metrics=("p50_ms",), processes=1)
    monkeypatch.setattr(module, "SINGLES_BENCH", few)
    monkeypatch.setattr(module, "CANDIDATES_BENCH", few)


def test_prices_are_measured_where_the_target_is(student, task, tmp_path, quick):
    made, images, known = student
    config = QuantizeConfig(per_channel=False)
    ranges = calibrate(made.dynamic.file.path, known, config)
    found = chosen(tmp_path, (made, images, ranges, task), "cpu", Cpu(), config, 4.0)
    assert "stage2.0" in found.selection.keep_float and found.meets_limit and not found.not_timed_reason
    assert all(
        layer.latency_ratio.low <= layer.latency_ratio.estimate <= layer.latency_ratio.high for layer in found.layers
    )
    assert (
        found.candidates[0].latency_ratio.estimate == 1
        and found.fp32_latency_ratio.estimate > 0
        and found.machine
        and found.runtime.name == "onnxruntime"
    )
    assert serialization.from_json(ParetoFront, serialization.to_json(found)) == found
    assert (tmp_path / "layers" / "samples.npz").exists() and not list(tmp_path.rglob("*.onnx"))


def test_where_the_limit_is_met_already_nothing_is_freed(student, task, tmp_path):
    made, images, known = student
    ranges = calibrate(made.dynamic.file.path, known, QuantizeConfig())
    found = chosen(tmp_path, (made, images, ranges, task), "jetson", Jetson(), QuantizeConfig(per_channel=False), 99.0)
    assert found.selection.keep_float == () and len(found.candidates) == 1 and not found.layers


def test_where_the_limit_is_met_only_the_ends_are_looked_at_for_a_free_lunch(student, task, tmp_path, quick):
    made, images, known = student
    ranges = calibrate(made.dynamic.file.path, known, QuantizeConfig())
    found = chosen(tmp_path, (made, images, ranges, task), "cpu", Cpu(), QuantizeConfig(per_channel=False), 99.0)
    assert {layer.name for layer in found.layers} == {"stage1.0", "head"}
    assert all(layer.latency_ratio is not None for layer in found.layers) and set(found.selection.keep_float) <= {
        "stage1.0",
        "head",
    }


def test_a_limit_that_cannot_be_met_is_an_error_with_the_best_mix(student, task, tmp_path):
    made, images, known = student
    config = QuantizeConfig(per_channel=False, keep_float=("stage1.0", "stage3.0", "head"))
    ranges = calibrate(made.dynamic.file.path, known, config)
    with pytest.raises(
        ModelError, match=r"loses .* points .* where 0.5 are allowed; no layer can stay float"
    ) as caught:
        chosen(tmp_path, (made, images, ranges, task), "jetson", Jetson(), config, 0.5)
    assert "quant_aware" in caught.value.hint
    said = limit_missed(a_frontier(max_drop=0.1)).what
    assert "`kpn` loses 2.00 points" in said and "best of 1 mixes, with 1 layers in float, loses 0.40" in said


def test_layers_that_stay_float_anyway_are_in_no_mix(student, task):
    found = measure_layers(subject(student, base=("first",)), an_exam(student, task), ends_only=False)
    assert "stage1.0" not in [layer.name for layer in found] and len(found) == 3


# by hand


def marks(drop_points, snr=30.0):
    return EvalScores(90 - drop_points, Interval(drop_points - 0.1, drop_points, drop_points + 0.1), snr)


def a_mix(count, lost, price=None, snr=30.0):
    sure = None if price is None else Interval(price - 0.01, price, price + 0.01)
    return MixedPrecision(tuple(f"l{i}" for i in range(count)), marks(lost, snr), count / 10, sure)


class Steady:
    aa_ratio = Interval(0.999, 1.0, 1.001)


@pytest.mark.parametrize(
    ("mixes", "limit", "best"),
    [
        ([a_mix(0, 2.0), a_mix(1, 0.6), a_mix(2, 0.4), a_mix(3, 0.1)], 0.5, 2),  # by MACs
        ([a_mix(0, 2.0, 1.0), a_mix(2, 0.4, 1.2), a_mix(3, 0.3, 1.1)], 0.5, 2),  # by latency
        ([a_mix(0, 0.2, 1.0), a_mix(1, 0.1, 0.99, 31)], 0.5, 0),  # within what two sessions differ
        ([a_mix(0, 0.2, 1.0), a_mix(1, 0.1, 0.9, 31)], 0.5, 1),  # faster beyond doubt, and closer to FP32
        ([a_mix(0, 0.2, 1.0), a_mix(1, 0.1, 0.9, 29)], 0.5, 0),  # faster, but further from FP32
        ([a_mix(0, 0.2, 1.0), a_mix(1, 0.7, 0.9, 31)], 0.5, 0),  # faster, but above the limit
        ([a_mix(0, 2.0, 1.0), a_mix(1, 1.5, 1.1), a_mix(2, 1.6, 1.2)], 0.5, 1),  # none within: the most accurate
        ([a_mix(0, 2.0, 1.0), a_mix(1, 1.5, 0.9, 31)], None, 1),  # no limit: what costs nothing
    ],
)
def test_the_cheapest_within_the_limit_is_chosen(mixes, limit, best):
    assert select_candidate(mixes, limit, Steady()) == best


def test_worth_is_noise_for_cost():
    price = Interval(1.04, 1.05, 1.06)
    layer = LayerSensitivity("a", "Conv", 100, marks(0.0, snr=20.0), price)
    assert gain_per_cost(layer, 1000) == pytest.approx(0.01 / 0.05)
    assert gain_per_cost(dataclasses.replace(layer, latency_ratio=None), 1000) == pytest.approx(0.01 / 0.1)
    assert gain_per_cost(dataclasses.replace(layer, latency_ratio=Interval(0.9, 0.95, 0.99)), 1000) == pytest.approx(
        0.01 / 0.02
    )


def test_the_drop_of_maps_is_that_of_their_metric(tmp_path):
    truth = np.full((40, 1, 2, 2), 2.0, np.float32)
    fine, half = truth.copy(), truth.copy()
    half[:, :, 0] = 9.0  # half of all pixels are far off
    trial = Samples(np.zeros(0), np.zeros(0), (half,), (fine,), truth)
    assert accuracy_drop(trial, Regression()) == Interval(50.0, 50.0, 50.0)
    exam = EvalSet(truth, truth, (fine,), Regression())
    assert exam.fp32_accuracy() == 100.0 and len(exam.part(7).inputs) == 7


# what is told


def a_frontier(**more):
    layer = LayerSensitivity(f"conv{EVIL}", "Conv", 2_359_296, marks(1.2), Interval(1.05, 1.08, 1.1))
    mixes = (a_mix(0, 2.0, 1.0), MixedPrecision((f"conv{EVIL}",), marks(0.4), 0.2, Interval(1.07, 1.08, 1.09)))
    made = ParetoFront("kpn", "cpu", "top1", 0.5, 90.0, 5000, 2048, (layer,), mixes, 1, "", Interval(1.8, 1.9, 2.0))
    return dataclasses.replace(made, **more)


def test_the_verdict_names_the_switch_and_what_it_costs():
    said = told.verdict(a_frontier())
    assert "loses 2.00 points (1.90 to 2.10), where 0.5 are allowed; with 1 of its layers in float 0.40" in said
    assert "1.080 (1.070–1.090) of the latency" in said
    assert json.loads(re.search(r"quantize\.keep_float: (\[.*\])", said)[1]) == [f"conv{EVIL}"]
    slow = told.verdict(a_frontier(fp32_latency_ratio=Interval(1.05, 1.06, 1.08)))
    assert "no faster than FP32: ship the FP32 file" in slow
    assert "no mix that was tried meets that" in told.verdict(a_frontier(max_drop=0.1))
    assert "nothing has to stay float" in told.verdict(a_frontier(max_drop=3.0, selected=0))


def test_the_report_tells_of_layers_kept_float_and_escapes_their_names(record, tmp_path):  # noqa: F811
    from edgekd.stages.report.report import read, report

    report(dataclasses.replace(record, pareto_fronts=(a_frontier(),)), tmp_path)
    html, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert ">Layers kept float</h2>" in html and "Mixes of INT8 and float layers: kpn on cpu" in html
    assert "### Layers kept float: kpn on cpu" in text and "1.080 (1.070–1.090)" in text
    assert EVIL not in html and EVIL not in text
    assert read(tmp_path / "report.json").pareto_fronts == (a_frontier(),)
    report(record, tmp_path)
    assert "Layers kept float" not in (tmp_path / "report.html").read_text()


def test_a_command_ranks_the_layers_of_any_file(student, task, tmp_path, quick):
    made, images, _ = student
    valid = task.valid.load()
    np.save(tmp_path / "i.npy", task.inputs(np.asarray(valid.images)))
    np.save(tmp_path / "l.npy", valid.labels, Classification())
    words = [
        "sensitivity",
        str(made.single.file.path),
        "--calib",
        str(images.path),
        "--images",
        str(tmp_path / "i.npy"),
    ]
    words += ["--labels", str(tmp_path / "l.npy"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "layer" in done.stdout and "all: FP32" in done.stdout and "stage2.0" in done.stdout
    again = CliRunner().invoke(app, [*words, "--max-drop", "90", "--json"], catch_exceptions=False)
    found = json.loads(again.stdout.strip().splitlines()[-1])
    assert found["selected"] == 0 or found["candidates"][found["selected"]]["latency_ratio"]["high"] < 1
    assert "where 90 are allowed" in found["verdict"]
    kept = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert serialization.from_json(ParetoFront, kept).images == len(valid.labels)
    page = (tmp_path / "out" / "sensitivity.md").read_text()
    assert "| stage2.0 | Conv |" in page and "![](sensitivity.svg)" in page
    svg = (tmp_path / "out" / "sensitivity.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "--ink: #1b2126" in svg


def test_a_command_keeps_named_layers_float(staged, tmp_path):
    made, x = staged
    np.save(tmp_path / "c.npy", x)
    words = ["quantize", str(made.single.file.path), "--calib", str(tmp_path / "c.npy"), "-o", str(tmp_path / "x.onnx")]
    done = CliRunner().invoke(app, [*words, "--keep-float", "first, last"], catch_exceptions=False)
    assert done.exit_code == 0
    stored = {t.name for t in onnx.load(tmp_path / "x.onnx").graph.initializer}
    assert {"stem.0.weight", "head.weight"} <= stored and "stage2.0.0.weight" not in stored


def test_a_smoke_build_has_no_limit():
    assert load_config("digits", ("quantize.max_drop=0.5",), (), True).quantize.max_drop is None
    assert load_config("digits", ("quantize.max_drop=0.5",), (), False).quantize.max_drop == 0.5


def test_a_file_that_takes_several_inputs_at_once_is_refused_first(student, tmp_path):
    made, images, _ = student
    model = onnx.load(made.single.file.path)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "four.onnx")
    words = ["sensitivity", tmp_path / "four.onnx", "--calib", images.path, "--images", images.path]
    with pytest.raises(ConfigError, match="4 inputs at once"):
        asked = [*words, "--labels", tmp_path / "none.npy", "--out", tmp_path / "out"]
        CliRunner().invoke(app, [str(word) for word in asked], catch_exceptions=False)
