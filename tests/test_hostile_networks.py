"""Other people's networks: read where they are what they should be, else refused before anything is computed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import ModelError
from edgekd.onnx import inspect, sandbox
from edgekd.stages.lint.lint import lint
from tests.standins.commands import command
from tests.standins.networks import changed, network, value


def claims(dims, **more):
    """A tensor of that shape, with one number in it."""
    return TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, **(more or {"raw_data": b"\0\0\0\0"}))


def outside(location, **entries):
    tensor = TensorProto(name="w", dims=[4, 3, 3, 3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def with_weight(tensor):
    return changed(lambda m: m.graph.initializer[0].CopyFrom(tensor))


def nested(depth, reads="x"):
    """If in If in If."""
    nodes = [helper.make_node("Identity", [reads], [f"end{depth}"])]
    for level in range(depth, 0, -1):
        branches = [
            helper.make_graph([n], f"{side}{level}", [], [value(n.output[0], None)])
            for side, n in (("t", nodes[0]), ("e", helper.make_node("Identity", [reads], [f"other{level}"])))
        ]
        nodes = [helper.make_node("If", ["yes"], [f"end{level - 1}"], then_branch=branches[0], else_branch=branches[1])]
    yes = numpy_helper.from_array(np.array(True), "yes")
    return network(nodes, outputs=[value("end0", [1, 3, 8, 8])], tensors=[yes])


def function(name, *calls):
    nodes = [
        helper.make_node(op, [f"t{i}"], [f"t{i + 1}"], domain="mine" if op != "Relu" else "")
        for i, op in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_function("mine", name, ["t0"], [f"t{len(calls)}"], nodes, opsets)


def doubling(domain="mine", called="mine"):
    """Each function calls the next one twice; `called` is another name of the domain that they are in."""
    functions = [function(f"f{i}", *[f"f{i + 1}"] * 2) for i in range(40)]
    model = calling(*functions, function("f40", "Relu"))
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            node.domain = called if node.domain == "mine" else node.domain
    for one in model.functions:
        one.domain = domain
    return model


def calling(*functions):
    nodes = [helper.make_node("f0", ["x"], ["y"], domain="mine")]
    return network(nodes, outputs=[value("y", [1, 3, 8, 8])], tensors=[], functions=functions, domains=["mine"])


def circle(model):
    model.graph.node[0].input[0] = "b"


def computing(*shape):
    """A tensor of that shape, made of nothing but the shape."""
    size = numpy_helper.from_array(np.array(shape, np.int64), "s")
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["big"]), helper.make_node("Add", ["x", "big"], ["y"])]
    return network(nodes, outputs=[value("y", None)], tensors=[size])


def says(name, *shape):
    """What the file says of a tensor in between, which ONNX's shape inference believes."""
    return changed(lambda m: m.graph.value_info.append(value(name, shape)))


def sparse():
    model = network()
    values = numpy_helper.from_array(np.ones(1, np.float32), "huge")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [1 << 20, 1 << 20]))
    return model


ESCAPE = "\x1b[31mred"
NETWORKS = {
    # where data lies
    "data above": (lambda: with_weight(outside("../../../etc/passwd")), "not in the folder of the network"),
    "data anywhere": (lambda: with_weight(outside("/etc/passwd")), "not in the folder of the network"),
    "data through a link": (lambda: with_weight(outside("link.bin")), "not in the folder of the network"),
    "data through a linked folder": (lambda: with_weight(outside("up/secret.bin")), "not in the folder of the network"),
    "data nowhere": (lambda: with_weight(outside("gone.bin")), "is not there"),
    "data without a place": (lambda: with_weight(outside("")), "not in the folder of the network"),
    "data with a zero byte": (lambda: with_weight(outside("a\0b")), "not in the folder of the network"),
    "data in a folder": (lambda: with_weight(outside("sub")), "is not there"),
    "data in a pipe": (lambda: with_weight(outside("pipe")), "is not there"),
    "data too short": (lambda: with_weight(outside("own.bin", offset=16)), "which has 432"),
    "data before the start": (lambda: with_weight(outside("own.bin", offset=-4)), "begins at byte '-4'"),
    "data at no number": (lambda: with_weight(outside("own.bin", offset="1e3")), "begins at byte '1e3'"),
    "data of another length": (lambda: with_weight(outside("own.bin", length=4)), "needs 432 bytes"),
    # numbers
    "2 ** 40 numbers": (lambda: with_weight(claims([1 << 40])), "claims the shape (1099511627776)"),
    "2 ** 80 numbers": (lambda: with_weight(claims([1 << 40, 1 << 40])), "claims the shape"),
    "2 ** 40 numbers and 0": (lambda: with_weight(claims([1 << 40, 0])), "claims the shape"),
    "fewer than none": (lambda: with_weight(claims([-4, -3, 3, 3])), "claims the shape (-4, -3, 3, 3)"),
    "a hundred axes": (lambda: with_weight(claims([1] * 100)), "claims the shape"),
    "fewer numbers than the shape": (lambda: with_weight(claims([4, 3, 3, 3])), "has 4 bytes or numbers"),
    "more numbers than the shape": (lambda: with_weight(claims([1], raw_data=bytes(40))), "has 40 bytes or numbers"),
    "no numbers": (lambda: with_weight(claims([4, 3, 3, 3], float_data=[])), "has 0 bytes or numbers"),
    "numbers of no type": (
        lambda: changed(lambda m: setattr(m.graph.initializer[0], "data_type", 99)),
        "of the type 99, which edgekd does not know",
    ),
    "a sparse tensor of 2 ** 40": (sparse, "has a sparse tensor of the shape"),
    "an output of 2 ** 40": (lambda: computing(1 << 20, 1 << 20, 1, 1, 1, 1), "of the shape"),
    "an input of 2 ** 40": (
        lambda: changed(lambda m: m.graph.input[0].CopyFrom(value("x", [1, 3, 1 << 20, 1 << 20]))),
        "of the shape",
    ),
    "a row of 2 ** 31 sizes": (lambda: says("b", 1 << 31), "has the tensor 'b' of the shape (2147483648)"),
    "a row of 2 ** 23 sizes": (lambda: says("b", 1 << 23), "has the tensor 'b' of the shape (8388608)"),
    "a row of 2 ** 29 computed": (lambda: computing(1 << 29), "has the tensor 'big' of the shape (536870912)"),
    # order
    "a circle": (lambda: changed(circle), "Nodes in a graph must be topologically sorted"),
    "a node that reads nothing": (
        lambda: changed(lambda m: m.graph.node[1].input.__setitem__(0, "nowhere")),
        "Nodes in a graph must be topologically sorted",
    ),
    "a weight that is missing": (
        lambda: changed(lambda m: m.graph.initializer.__delitem__(0)),
        "Nodes in a graph must be topologically sorted",
    ),
    "two nodes make one": (
        lambda: changed(lambda m: m.graph.node[1].output.__setitem__(0, "a")),
        "must be in single static assignment (SSA) form",
    ),
    "an output of nothing": (lambda: changed(lambda m: m.graph.output[0].CopyFrom(value("z", [1, 4]))), "'z'"),
    "a node without inputs": (lambda: changed(lambda m: m.graph.node[0].ClearField("input")), "has input size 0"),
    "a node without outputs": (lambda: changed(lambda m: m.graph.node[1].ClearField("output")), "has output size 0"),
    "a foreign node called like a known one": (
        lambda: network([helper.make_node("Conv", [], ["y"], domain="theirs")], domains=["theirs"]),
        "has 0 inputs and 1 outputs",
    ),
    "a foreign circle": (
        lambda: network(
            [helper.make_node("NMS_TRT", ["b"], ["a"]), helper.make_node("NMS_TRT", ["a", "x"], ["b"])],
            outputs=[value("b", None)],
        ),
        "it is out of order, or a circle",
    ),
    "a foreign node that reads nothing": (
        lambda: network(
            [helper.make_node("NMS_TRT", ["x"], ["a"]), helper.make_node("NMS_TRT", ["gone"], ["y"])],
            outputs=[value("y", None)],
        ),
        "which nothing makes",
    ),
    # ends
    "no output": (lambda: network(outputs=[]), "has no output"),
    "no nodes": (lambda: changed(lambda m: m.graph.ClearField("node")), "is not an ONNX file"),
    # operators
    "an IR version of the future": (lambda: changed(lambda m: setattr(m, "ir_version", 99)), "ir_version"),
    "no opset": (lambda: changed(lambda m: m.ClearField("opset_import")), "opset_import"),
    "an attribute of another type": (
        lambda: changed(lambda m: m.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("pads", "same"))),
        "pads",
    ),
    # functions
    "a function that calls itself": (lambda: calling(function("f0", "f0")), "in a circle"),
    "functions in a circle": (lambda: calling(function("f0", "f1"), function("f1", "f0")), "in a circle"),
    "functions that double": (doubling, "nodes: more than edgekd takes"),
    "functions that double in ONNX's own domain": (lambda: doubling("ai.onnx", ""), "nodes: more than edgekd takes"),
    "functions that double, called by its other name": (lambda: doubling("", "ai.onnx"), "nodes: more than edgekd"),
    # names
    "colours in the name of a node": (lambda: changed(lambda m: setattr(m.graph.node[0], "name", ESCAPE)), "control"),
    "a line in the name of a tensor": (
        lambda: changed(lambda m: setattr(m.graph.output[0], "name", "y\n::error::")),
        r"'y\n::error::'",
    ),
    "a turned name of an operator": (
        lambda: changed(lambda m: setattr(m.graph.node[0], "op_type", "C\u202e")),
        "u202e",
    ),
    "colours in the name of an attribute": (
        lambda: changed(lambda m: setattr(m.graph.node[0].attribute[0], "name", ESCAPE)),
        "control",
    ),
}


@pytest.fixture
def place_for_data(tmp_path):
    home = tmp_path / "here"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(432))
    (home / "own.bin").write_bytes(bytes(432))
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    (home / "up").symlink_to(tmp_path)
    os.mkfifo(home / "pipe")
    return home


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_harms_is_refused_before_anything_is_computed(name, place_for_data):
    make, says = NETWORKS[name]
    path = place_for_data / "net.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(ModelError) as error:
        inspect.facts(path)
    assert str(path) in error.value.what and says in error.value.what and error.value.hint
    assert error.value.exit_code == 2 and len(error.value.what) < 2000
    assert not any(c in error.value.what for c in ("\x1b", "\u202e")) and "\n" not in error.value.what


def test_no_claim_of_a_network_fills_the_memory(place_for_data):
    counter, path = Path("/proc/self/clear_refs"), place_for_data / "net.onnx"
    if not counter.exists():
        pytest.skip("the system does not count the memory of a process")
    inspect.load(saved(network(), path))
    counter.write_text("5")
    before = peak_kb()
    for make, _ in NETWORKS.values():
        with pytest.raises(ModelError):
            inspect.facts(saved(make(), path))
    assert peak_kb() - before < 50_000


def saved(model, path):
    path.write_bytes(model.SerializeToString())
    return path


def peak_kb():
    return int(next(row for row in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in row).split()[1])


def test_a_name_that_is_no_text_is_refused(tmp_path):
    content = network().SerializeToString().replace(b"relu", b"re\xff\xfe")
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError) as error:
        inspect.facts(tmp_path / "net.onnx")
    assert error.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x08" * 500, b"\x0a\xff\xff\xff\xff\x0f", network().SerializeToString()[:-9]]
)
def test_what_is_no_network_is_refused(content, tmp_path):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError) as error:
        inspect.facts(tmp_path / "net.onnx")
    assert error.value.hint


def test_messages_nested_as_deep_as_one_likes_are_refused(tmp_path):
    inner = b""
    for _ in range(5000):  # graph -> node -> attribute -> graph
        for field in (0x32, 0x2A, 0x0A):
            size = len(inner)
            length = b""
            while size >= 128:
                length, size = length + bytes([size % 128 + 128]), size // 128
            inner = bytes([field]) + length + bytes([size]) + inner
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08\x3a" + inner)
    with pytest.raises(ModelError):
        inspect.facts(tmp_path / "net.onnx")


def test_harmless_networks_are_read(tmp_path):
    """What looks like the hostile ones, but is not."""
    (tmp_path / "own.bin").write_bytes(bytes(432))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.bin").write_bytes(bytes(500))
    fine = {
        "as it is": network(),
        "data beside it": with_weight(outside("own.bin")),
        "data below it": with_weight(outside("sub/own.bin", offset=64, length=432)),
        "functions": calling(function("f0", "f1", "f1"), function("f1", "Relu", "Relu")),
        "branches": nested(5),
        "a tensor made of its shape": computing(1, 3, 8, 8),
        "another domain": network(
            [helper.make_node("NMS_TRT", ["x"], ["y"], domain="theirs")], outputs=[value("y", None)], domains=["theirs"]
        ),
    }
    for name, model in fine.items():
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
        assert inspect.facts(tmp_path / f"{name}.onnx").input.name == "x"


def test_a_plug_in_of_tensorrt_among_onnx_s_own_operators_is_for_the_lint_to_judge(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(network([helper.make_node("EfficientNMS_TRT", ["x"], ["y"])], outputs=[value("y", None)]), path)
    assert [node.op_type for node in inspect.load(path).graph.node] == ["EfficientNMS_TRT"]


@pytest.mark.parametrize("forks", [True, False])
def test_the_lint_of_pairs_without_end_has_one(forks, tmp_path):
    """Pairs that fork and meet again 60 times: 2 ** 60 ways; and a line of 2,000, deeper than calls may be nested."""
    nodes = [helper.make_node("QuantizeLinear", ["x", "s"], ["q0"])]
    for i in range(60 if forks else 2000):
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", "s"], [f"a{i}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", "s"], [f"b{i}"]))
        nodes.append(helper.make_node("QuantizeLinear", [f"a{i}", f"b{i}" if forks else "s"], [f"q{i + 1}"]))
    nodes.append(helper.make_node("DequantizeLinear", [nodes[-1].output[0], "s"], ["y"]))
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "s")
    path = saved(network(nodes, outputs=[value("y", [1, 3, 8, 8])], tensors=[scale]), tmp_path / "net.onnx")
    assert lint(path, "6.2").findings


def test_a_dynamic_size_that_is_written_as_minus_one_is_dynamic(tmp_path):
    onnx.save(changed(lambda m: m.graph.input[0].CopyFrom(value("x", [-1, 3, 8, 8]))), tmp_path / "net.onnx")
    assert inspect.facts(tmp_path / "net.onnx").input.shape == (0, 3, 8, 8)


INPUTS = {
    "two inputs": lambda: changed(lambda m: m.graph.input.append(value("z", [1]))),
    "no input": lambda: network(
        [helper.make_node("Identity", ["v"], ["y"])], inputs=[], tensors=[numpy_helper.from_array(np.ones((1, 4)), "v")]
    ),
    "whole numbers": lambda: network(
        [helper.make_node("Cast", ["x"], ["f"], to=1), *network().graph.node[:]][0:1]
        + [helper.make_node("Conv", ["f", "w"], ["a"]), helper.make_node("GlobalAveragePool", ["a"], ["y"])],
        inputs=[value("x", [1, 3, 8, 8], TensorProto.INT64)],
        outputs=[value("y", [1, 4, 1, 1])],
    ),
    "no shape": lambda: changed(lambda m: m.graph.input[0].CopyFrom(value("x", None))),
    "a single number": lambda: changed(lambda m: m.graph.input[0].CopyFrom(value("x", []))),
    "a list": lambda: network(
        [helper.make_node("SequenceAt", ["x", "i"], ["y"])],
        inputs=[helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        outputs=[value("y", None)],
        tensors=[numpy_helper.from_array(np.array(0), "i")],
    ),
    "a circle": lambda: changed(circle),
    "2 ** 40 numbers": lambda: with_weight(claims([1 << 40])),
    "a text": lambda: b"hello",
    "nothing": lambda: b"",
}


@pytest.fixture
def given(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((8, 3, 8, 8), np.float32))
    np.save(tmp_path / "labels.npy", np.arange(8) % 4)
    return tmp_path


CRASHES = {  # ONNX's shape inference, and a kernel of onnxruntime, as of onnx 1.23 and onnxruntime 1.31
    "an axis far away": helper.make_node("GatherND", ["x", "i"], ["y"], batch_dims=-(2**31)),
    "chance upside down": helper.make_node("RandomUniformLike", ["x"], ["y"], low=0.0, high=-1.0),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_network_that_crashes_its_libraries_ends_a_process_of_its_own(name, tmp_path):
    indices = numpy_helper.from_array(np.array([1, 8, 1 << 20, 0, 2], np.int64), "i")
    path = saved(network([CRASHES[name]], outputs=[value("y", None)], tensors=[indices], opset=20), tmp_path / "n.onnx")
    for words in (["lint", path, "--jetpack", "6.2"], ["bench", path, "--smoke"], ["explain", path]):
        program = [sys.executable, "-m", "edgekd", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 2 and "ends a process that reads and runs it" in done.stderr, done.stderr


def test_a_network_without_an_end_is_not_waited_for(tmp_path, monkeypatch):
    """A loop of 2 ** 62 rounds."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["v"], ["w"])],
        "body",
        [value("n", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("v", [1, 3, 8, 8])],
        [value("on", [], TensorProto.BOOL), value("w", [1, 3, 8, 8])],
    )
    tensors = [numpy_helper.from_array(np.array(1 << 62), "m"), numpy_helper.from_array(np.array(True), "yes")]
    loop = helper.make_node("Loop", ["m", "yes", "x"], ["y"], body=body)
    path = saved(network([loop], outputs=[value("y", [1, 3, 8, 8])], tensors=tensors), tmp_path / "n.onnx")
    monkeypatch.setattr(sandbox, "LIMIT_S", 8.0)
    with pytest.raises(ModelError, match="does not answer within 8 s"):
        sandbox.probe_files(path)


def test_a_network_that_needs_more_memory_than_there_is_is_refused(tmp_path):
    """Each tensor has the largest size that is allowed; three are alive at once."""
    size = numpy_helper.from_array(np.array([1, 512, 1024, 1024], np.int64), "s")
    spread = [helper.make_node("Expand", ["m", "s"], [f"e{i}"]) for i in range(3)]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"]),
        *spread,
        helper.make_node("Sum", ["e0", "e1", "e2"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["r"]),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    path = saved(network(nodes, tensors=[size], outputs=[value("y", [1, 3, 8, 8])]), tmp_path / "n.onnx")
    limit = f'ulimit -S -v {6 << 20} && exec "$0" -m edgekd lint "$1" --jetpack 6.2'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = ["sh", "-c", limit, sys.executable, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and "needs more memory than the 6.0 GiB of this machine" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_no_command_ends_in_a_traceback_for_a_network_that_it_cannot_use(name, given, capsys):
    made = INPUTS[name]()
    path = given / "net.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    quantized = given / "q.onnx"
    if not isinstance(made, bytes):
        pair = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
        made.graph.initializer.append(pair)
        made.graph.node.append(helper.make_node("QuantizeLinear", [made.graph.node[-1].output[0], "scale"], ["q"]))
        quantized.write_bytes(made.SerializeToString())
    else:
        quantized.write_bytes(made)
    calib, labels = given / "x.npy", given / "labels.npy"
    commands = [
        ["quantize", path, "--calib", calib, "-o", given / "out.onnx"],
        ["sensitivity", path, "--calib", calib, "--images", calib, "--labels", labels, "-o", given / "s"],
        ["bench", path, "--smoke", "-o", given / "b"],
        ["explain", quantized],
        ["lint", path, "--jetpack", "6.2"],
    ]
    for words in commands:
        code, said = command(capsys, *words)
        assert code == 2 or (words[0] == "lint" and code in (0, 1)), (words[0], code, said)
        assert "Traceback" not in said and (code < 2 or said.startswith("error: "))
    assert not (given / "out.onnx").exists()
