"""Whatever is in a file: no reader of it ends in anything but its answer or a sentence, and each soon."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekd.config import BuildConfig, load_config
from edgekd.core import config_file, serialization
from edgekd.core.artifact import File
from edgekd.core.step_cache import StepCache
from edgekd.errors import ConfigError, EdgekdError, StaleArtifact
from edgekd.stages.device.bundle import Bundle
from edgekd.stages.device.results import build_bench_result, load_result
from edgekd.stages.report.report import read, report
from edgekd.stages.report.verify import format_verification, verify
from edgekd_runner.bundle import read_bundle
from edgekd_runner.errors import RunnerError
from tests import test_report, test_results
from tests.standins import bundles
from tests.standins.networks import network, value
from tests.standins.reader import Reader
from tests.test_hostile_builds import sealed

SOON_S = 20.0  # for one case; they take some milliseconds on an idle core
MORE = int(os.environ.get("EDGEKD_CASES", "1"))  # times the cases, for a long search
record, bundle = test_report.record, test_results.bundle  # fixtures


def cases(count):
    """So many, the same in CI every time; elsewhere others each time, and what fails is printed to be tried again."""
    return settings(
        max_examples=count * MORE,
        deadline=None,  # `soon` ends a case, and does not only tell
        derandomize="CI" in os.environ,
        print_blob=True,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def soon():
    def late(number, frame):
        raise AssertionError(f"no answer within {SOON_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SOON_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# what stands in a file by mistake or by intent
WORDS = st.sampled_from(
    ["", "../up", "/etc/passwd", "a\0b", "\x1b[31m", "a" * 300, "null", "-1", "kpn", "cpu", "digits", "fp32", "Ω\u202e"]
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 1e308, float("nan"), float("inf"), 0.5]), st.integers()
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)


def places(value, here=()):
    """The paths of everything inside of a JSON value."""
    yield here
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*here, key))


@st.composite
def spoilt(draw, whole):
    """A JSON value with some of its parts replaced, taken out, doubled, or put in each other's place."""
    made = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        every = [path for path in places(made) if path]
        if not every:
            break
        path = draw(st.sampled_from(every))
        holder = made
        for key in path[:-1]:
            holder = holder[key]
        act = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap", "rename"]))
        if act == "remove":
            del holder[path[-1]]
        elif act == "double" and isinstance(holder, list):
            holder.append(holder[path[-1]])
        elif act == "swap":
            other = made
            for key in draw(st.sampled_from(every)):
                other = other[key]
            holder[path[-1]] = json.loads(json.dumps(other))
        elif act == "rename" and isinstance(holder, dict):
            holder[draw(WORDS)] = holder.pop(path[-1])
        else:
            holder[path[-1]] = draw(VALUES)
    return made


@st.composite
def damaged(draw, content):
    """Bytes with some of them turned, taken out, doubled or cut off."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(made) - 1, 0)))
        end = min(start + draw(st.integers(0, 40)), len(made))
        act = draw(st.sampled_from(["turn", "turn", "remove", "double", "cut", "put"]))
        if act == "turn" and made:
            made[start] = draw(st.integers(0, 255))
        elif act == "remove":
            del made[start:end]
        elif act == "double":
            made[end:end] = made[start:end]
        elif act == "cut":
            del made[start:]
        else:
            made[start:start] = draw(st.binary(max_size=12))
    return bytes(made)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def test_the_recipe_that_is_spoilt_below_is_whole():
    assert serialization.from_json(BuildConfig, config_file.read_config("digits"))


# configurations


@cases(140)
@given(spoilt(config_file.read_config("digits")))
def test_no_table_of_settings_ends_in_anything_but_a_configuration_or_a_sentence(home, table):
    (home / "c.yaml").write_text(json.dumps(table))  # which is YAML, too; tags and aliases are below
    with soon():
        try:
            load_config(str(home / "c.yaml"), (), (), False)
        except ConfigError as error:
            assert str(error)


PIECES = (
    *(
        "a: ",
        "- ",
        "\n",
        "  ",
        "\t",
        "&a ",
        "*a",
        "!!timestamp ",
        "!!int ",
        "!x ",
        "? ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        ", ",
    ),
    *('"', "'", "|\n", ">\n", "<<: ", "---\n", "...\n", "%YAML 1.1\n", "#", "null", "1e3", "0x", ".nan", "2026-01-31"),
    *(", ", "12:30", "@", "`", "\\x1b", "\x85", "\ufeff", "name", "student", "on", "~", "="),
)


@cases(120)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.booleans())
def test_no_text_ends_in_anything_but_a_table_or_a_sentence(home, text, after):
    (home / "t.yaml").write_text((config_file.config_text("digits") if after else "") + text, encoding="utf-8")
    with soon():
        try:
            load_config(str(home / "t.yaml"), (), (), False)
        except ConfigError as error:
            assert str(error)


@cases(40)
@given(damaged(config_file.config_text("digits").encode()))
def test_no_damage_of_a_recipe_ends_in_anything_but_a_configuration_or_a_sentence(home, content):
    (home / "d.yaml").write_bytes(content)
    with soon():
        try:
            load_config(str(home / "d.yaml"), (), (), False)
        except ConfigError as error:
            assert str(error)


# manifests and results


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("build") / "b")


@cases(60)
@given(st.data())
def test_no_manifest_of_a_build_is_more_than_a_list_of_findings(build, data):
    whole = (build / "whole.json") if (build / "whole.json").exists() else build / "manifest.json"
    content = whole.read_bytes()
    (build / "whole.json").write_bytes(content)
    made = data.draw(st.one_of(spoilt(json.loads(content)).map(json.dumps).map(str.encode), damaged(content)))
    (build / "manifest.json").write_bytes(made)
    with soon():
        try:
            assert format_verification(verify(build))
        except ConfigError as error:
            assert str(error)


@cases(60)
@given(st.data())
def test_no_manifest_of_a_bundle_is_read_but_as_one_here_and_on_the_device(home, data):
    place = home / "bundle"
    if not place.exists():
        bundles.make_bundle(place)
    if not (home / "whole.json").exists():
        (home / "whole.json").write_bytes((place / "manifest.json").read_bytes())
    content = (home / "whole.json").read_bytes()
    made = data.draw(st.one_of(spoilt(json.loads(content)).map(json.dumps).map(str.encode), damaged(content)))
    (place / "manifest.json").write_bytes(made)
    with soon():
        try:
            Bundle(File.of(place / "manifest.json")).read()
        except ConfigError as error:
            assert str(error)
        try:
            read_bundle(str(place))
        except RunnerError as error:
            assert error.error and error.hint


def stored(out) -> dict[str, tuple[File, ...]]:
    (out / "x.npy").write_bytes(b"array")
    return {"": (File.of(out / "x.npy"),)}


@cases(40)
@given(st.data())
def test_no_entry_of_a_ledger_is_more_than_what_was_made_or_a_sentence(home, data):
    if not (home / "entry.json").exists():
        made = StepCache(home / "steps").step("s", stored)
        (home / "entry.json").write_bytes((made[""][0].path.parent / "step.json").read_bytes())
    content = (home / "entry.json").read_bytes()
    spoilt_entry = data.draw(st.one_of(spoilt(json.loads(content)).map(json.dumps).map(str.encode), damaged(content)))
    next((home / "steps").glob("s-*/step.json")).write_bytes(spoilt_entry)
    with soon():
        try:
            cache = StepCache(home / "steps")
            cache.step("s", stored)
            assert cache.latest is not None and cache.seconds
        except StaleArtifact as error:
            assert str(error)


@cases(60)
@given(data=st.data())
def test_no_result_of_a_device_becomes_anything_but_a_comparison_or_a_sentence(bundle, tmp_path, data):
    folder = tmp_path / "results"
    if not folder.exists():
        test_results.brought(folder, bundle)
        (tmp_path / "whole.json").write_bytes((folder / "result.json").read_bytes())
    content = (tmp_path / "whole.json").read_bytes()
    made = data.draw(st.one_of(spoilt(json.loads(content)).map(json.dumps).map(str.encode), damaged(content)))
    (folder / "result.json").write_bytes(made)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    with soon():
        try:
            serialization.to_json(build_bench_result(out, bundle, load_result(folder, bundle), test_results.HOW))
        except EdgekdError as error:
            assert str(error)


@cases(60)
@given(data=st.data())
def test_no_report_becomes_anything_but_a_page_or_a_sentence(record, tmp_path, data):
    out = tmp_path / "out"
    if not out.exists():
        report(record, out)
        (tmp_path / "whole.json").write_bytes((out / "report.json").read_bytes())
    content = (tmp_path / "whole.json").read_bytes()
    made = data.draw(st.one_of(spoilt(json.loads(content)).map(json.dumps).map(str.encode), damaged(content)))
    (out / "report.json").write_bytes(made)
    with soon():
        try:
            report(read(out / "report.json"), tmp_path / "again")
        except EdgekdError as error:
            assert str(error)


# networks


def quantized():
    """x -> pair -> Conv with a quantized weight -> Relu -> pair -> y."""
    numbers = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((4, 3, 1, 1), np.int8)}
    numbers |= {"ws": np.full(4, 0.1, np.float32), "wz": np.zeros(4, np.int8), "b": np.zeros(4, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd", "b"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s", "z"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.array(a), n) for n, a in numbers.items()]
    return network(nodes, outputs=[value("y", [1, 4, 8, 8])], tensors=tensors)


def branched():
    """A residual sum, an If, a function, a constant and a reshape."""
    random = np.random.default_rng(0)
    numbers = {"w": random.standard_normal((3, 3, 3, 3), np.float32), "yes": np.array(True), "shape": np.array([1, -1])}
    numbers |= {"v": random.standard_normal((192, 4), np.float32), "m": np.ones(3, np.float32)}
    sides = [
        helper.make_graph([helper.make_node(op, ["sum"], [op])], op, [], [value(op, None)]) for op in ("Relu", "Abs")
    ]
    opsets = [helper.make_opsetid("", 17)]
    twice = helper.make_function("mine", "twice", ["t"], ["u"], [helper.make_node("Add", ["t", "t"], ["u"])], opsets)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "m", "m", "m", "m"], ["n"], "norm"),
        helper.make_node("Add", ["n", "x"], ["sum"]),
        helper.make_node("If", ["yes"], ["z"], then_branch=sides[0], else_branch=sides[1]),
        helper.make_node("twice", ["z"], ["t"], domain="mine"),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.float32([2.0]))),
        helper.make_node("Mul", ["t", "one"], ["k"]),
        helper.make_node("Reshape", ["k", "shape"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["y"], "gemm"),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in numbers.items()]
    return network(nodes, tensors=tensors, functions=[twice], domains=["mine"])


BASES = (network(), quantized(), branched())
OPERATORS = (
    *("Conv", "MatMul", "Gemm", "Add", "Mul", "Relu", "Reshape", "Transpose", "Concat", "Split", "Slice", "Gather"),
    *("QuantizeLinear", "DequantizeLinear", "BatchNormalization", "ConstantOfShape", "Expand", "Tile", "Resize", "Pad"),
    *("Softmax", "LayerNormalization", "QLinearConv", "ConvTranspose", "MaxPool", "Cast", "Shape", "Range", "LSTM"),
    *("TopK", "NonZero", "Loop", "If", "Identity", "Dropout", "Constant", "QGemm", "FusedConv", "EfficientNMS_TRT"),
)
SIZES = st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 64, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1])
ATTRIBUTES = st.sampled_from(
    [
        "axis",
        "axes",
        "pads",
        "strides",
        "group",
        "kernel_shape",
        "transB",
        "to",
        "perm",
        "value",
        "dilations",
        "auto_pad",
    ]
)
SETTINGS = st.one_of(SIZES, st.lists(SIZES, max_size=5), st.sampled_from([0.5, "SAME_UPPER", "x", [1.5, 2.5]]))


def change_node(draw, model, names):
    graph = model.graph
    node = draw(st.sampled_from(list(graph.node)))
    act = draw(
        st.sampled_from(["operator", "domain", "input", "drop", "more", "output", "attribute", "unset", "again"])
    )
    if act == "operator":
        node.op_type = draw(st.sampled_from(OPERATORS))
    elif act == "domain":
        node.domain = draw(st.sampled_from(["", "mine", "com.microsoft", "ai.onnx.ml"]))
    elif act == "input" and node.input:
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(names)
    elif act == "drop" and node.input:
        del node.input[draw(st.integers(0, len(node.input) - 1))]
    elif act == "more":
        node.input.append(draw(names))
    elif act == "output":
        node.output.append(draw(names))
    elif act == "attribute":
        made = draw(SETTINGS)
        node.attribute.append(helper.make_attribute(draw(ATTRIBUTES), made, attr_type=7 if made == [] else None))
    elif act == "unset":
        node.ClearField("attribute")
    else:
        graph.node.append(node)


def change_tensor(draw, model, names):
    tensor = draw(st.sampled_from(list(model.graph.initializer)))
    act = draw(st.sampled_from(["dims", "shape", "type", "name", "cut", "numbers", "remove", "place"]))
    if act == "dims":
        tensor.dims[:] = draw(st.lists(SIZES, max_size=5))
    elif act == "shape" and len(tensor.dims) > 1:  # as many numbers
        tensor.dims[:] = [int(np.prod(tensor.dims)), *[1] * draw(st.integers(0, 3))]
    elif act == "type":
        tensor.data_type = draw(st.sampled_from([0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 22, 99]))
    elif act == "name":
        tensor.name = draw(names)
    elif act == "cut":
        tensor.raw_data = tensor.raw_data[: draw(st.integers(0, 50))]
    elif act == "numbers":
        kind = np.float32 if tensor.data_type == 1 else np.uint8
        odd = draw(st.sampled_from([np.nan, np.inf, 1e38, 0.0, -1.0])) if kind is np.float32 else 255
        tensor.raw_data = np.full(len(tensor.raw_data) // np.dtype(kind).itemsize, odd, kind).tobytes()
    elif act == "remove":
        model.graph.initializer.remove(tensor)
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=draw(WORDS))


def change_ends(draw, model, names):
    graph = model.graph
    ends = draw(st.sampled_from([graph.input, graph.output]))
    act = draw(st.sampled_from(["shape", "type", "name", "remove", "more", "opset", "ir", "known"]))
    shape = draw(st.one_of(st.none(), st.lists(st.one_of(SIZES, st.just("n")), max_size=5)))
    if act in ("shape", "type") and ends:
        kind = draw(st.sampled_from([1, 1, 7, 8, 10, 11])) if act == "type" else TensorProto.FLOAT
        ends[0].CopyFrom(value(ends[0].name, [1, 3, 8, 8] if act == "type" else shape, kind))
    elif act == "name" and ends:
        ends[0].name = draw(names)
    elif act == "remove":
        del ends[:]
    elif act == "more":
        ends.append(value(draw(names), shape))
    elif act == "opset":
        model.opset_import[0].version = draw(st.sampled_from([0, 1, 7, 11, 13, 18, 21, 25, 99]))
    elif act == "ir":
        model.ir_version = draw(st.sampled_from([1, 3, 7, 10, 13, 99]))
    else:
        graph.value_info.append(value(draw(names), shape))


@st.composite
def rebuilt(draw, changes=3):
    """One of the networks with some of its nodes, tensors and ends changed."""
    model = onnx.ModelProto()
    model.CopyFrom(draw(st.sampled_from(BASES)))
    known = {name for node in model.graph.node for name in (*node.input, *node.output)}
    names = st.sampled_from([*sorted(known), "", "gone", "a\nb"])
    for _ in range(draw(st.integers(1, changes))):
        acts = [change_ends, *[change_node] * 2 * bool(model.graph.node)]
        acts += [change_tensor] * 2 * bool(model.graph.initializer)
        draw(st.sampled_from(acts))(draw, model, names)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    made = Reader(tmp_path_factory.mktemp("reader"))
    yield made
    made.close()


def refused(told):
    assert told == "ok" or told.startswith("refused: "), told


def test_the_networks_that_are_changed_below_are_whole(reader):
    assert [reader.read(base.SerializeToString(), False, 60) for base in BASES] == ["ok"] * 3
    assert reader.read(BASES[0].SerializeToString(), True, 60) == "ok"
    assert reader.read(BASES[2].SerializeToString(), True, 60) == "ok"


@cases(80)
@given(st.sampled_from(BASES).flatmap(lambda base: damaged(base.SerializeToString())))
def test_no_damage_of_a_network_ends_in_anything_but_an_answer_or_a_sentence(reader, content):
    refused(reader.read(content, False, SOON_S))


@cases(160)
@given(rebuilt())
def test_no_change_of_a_network_ends_in_anything_but_an_answer_or_a_sentence(reader, content):
    refused(reader.read(content, False, SOON_S))


@cases(60)
@given(rebuilt(changes=1))
def test_no_change_of_a_network_ends_its_quantization_but_in_a_file_or_a_sentence(reader, content):
    refused(reader.read(content, True, SOON_S))
