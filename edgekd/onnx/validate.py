"""Validate an ONNX file of any origin before anything computes with it, from what the file claims alone.

Nothing is allocated that the file merely claims, and no file is opened but itself and data beside it. What a network
computes is not bounded: a loop may run indefinitely. Whoever runs untrusted networks limits the process.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import ModelError
from edgekd.onnx.graph import all_graphs, all_tensors, nested_graphs, sparse_shapes
from edgekd.utils.external import external_code
from edgekd.utils.paths import escapes_folder
from edgekd.utils.text import hidden_chars

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 1 << 31  # of a network: what protobuf holds in one message
MOST_NUMBERS = 1 << 29  # of a tensor: 2 GiB in float32
MOST_IN_A_ROW = 1 << 22  # of a tensor of one dimension: as they may be sizes, ONNX's shape inference keeps each of them
MOST_NODES = 100_000  # functions counted as often as they are called
DEEPEST = 50  # functions that call functions
BITS = {
    **dict.fromkeys(("UINT2", "INT2"), 2),
    **dict.fromkeys(("UINT4", "INT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("UINT8", "INT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 8),
    **dict.fromkeys(("FLOAT8E8M0",), 8),
    **dict.fromkeys(("UINT16", "INT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    "COMPLEX128": 128,
}
NUMBERS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")  # instead of raw data
LEAST = {  # inputs of operators that edgekd looks into, by their names in any domain
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "FusedConv", "PRelu", "LayerNormalization"), 2),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "FusedGemm", "FusedMatMul"), 2),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "QuantizeLinear", "DequantizeLinear"), 2),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization", "LSTM", "GRU", "RNN"), 3),
    **{"BatchNormalization": 5, "QGemm": 6, "QLinearConv": 8, "QLinearMatMul": 8},
    **dict.fromkeys(("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Pad", "Clip"), 1),
    **dict.fromkeys(("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "DynamicQuantizeLinear", "Gather"), 1),
}
# what onnx.checker says of files that are in use: TensorRT's plug-ins are among ONNX's own operators, and some
# exporters leave out the shape of an output
LET_THROUGH = ("No Op registered for", "Field 'shape' of 'type' is required but missing")


def load_validated(path: Path) -> onnx.ModelProto:
    """Return the file, parsed, with external data and functions inlined. Raises ModelError where it is invalid."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model
    from onnx.inliner import inline_local_functions

    model = parsed(path)
    check_names(model, path)
    check_numbers(model, path)
    check_sizes(model, path)
    check_functions(model, path)
    with external_code(f"`{path}` is not valid ONNX", "export it again", ModelError):
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            if not any(words in str(error) for words in LET_THROUGH):
                raise
        load_external_data_for_model(model, str(path.parent))
        if model.functions:
            model = inline_local_functions(model)
    check_order(model.graph, path)
    if not model.graph.output:
        raise ModelError(f"`{path}` has no output", hint="export the network with its answers as the output")
    return model


def parsed(path: Path) -> onnx.ModelProto:
    """Return the parsed file; external data is not read."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ModelError(f"there is no file `{path}`", hint="check the path; edgekd reads .onnx files")
    if path.stat().st_size >= MOST_BYTES:
        raise too_large(path, f"has {path.stat().st_size / 2**30:.1f} GiB")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise not_onnx(path) from None
    if not model.ir_version or not model.graph.node:  # protobuf reads an empty file as an empty message
        raise not_onnx(path)
    return model


def not_onnx(path: Path) -> ModelError:
    return ModelError(
        f"`{path}` is not an ONNX file", hint="give the .onnx file itself, not a checkpoint or an archive"
    )


def invalid(path: Path, what: str) -> ModelError:
    return ModelError(f"`{path}` is not valid ONNX: {what}", hint="export it again")


def too_large(path: Path, what: str) -> ModelError:
    return ModelError(f"`{path}` {what}: more than edgekd takes", hint="give a network for one image on a small device")


def check_names(model: onnx.ModelProto, path: Path) -> None:
    """Check that no name has control characters, which a terminal would obey or a log would break at."""
    for graph in all_graphs(model):
        values = () if not hasattr(graph, "value_info") else graph.value_info
        ends = (*graph.input, *graph.output)
        names = [graph.name, *(end.name if hasattr(end, "name") else end for end in (*ends, *values))]
        if hasattr(graph, "initializer"):
            names += [tensor.name for tensor in graph.initializer]
        for node in graph.node:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
            names += [attribute.name for attribute in node.attribute]
        for name in names:
            if isinstance(name, bytes):  # which protobuf gives for what is no UTF-8
                raise invalid(path, f"the name {ascii(name[:80])} is no text")
            if hidden_chars(name, allowed=""):
                raise invalid(path, f"control characters are in the name {shown(name)}")


def shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else f"{name[:80]}...")


def check_numbers(model: onnx.ModelProto, path: Path) -> None:
    """Check that every tensor has as many numbers as its shape says, and that all together fit a device."""
    total = sum(check_tensor(tensor, path) for tensor in all_tensors(model))
    for dims in sparse_shapes(model):
        if not counted(dims):
            raise too_large(path, f"has a sparse tensor of the shape {dims[:8]}")
    if total >= MOST_BYTES:
        raise too_large(path, f"has {total / 2**30:.1f} GiB of numbers")


def check_sizes(model: onnx.ModelProto, path: Path) -> None:
    """Check that no value is known to be larger than a device may hold; sizes that are left open count as 1."""
    for graph in all_graphs(model):
        ends = (*graph.input, *graph.output) if hasattr(graph, "initializer") else ()  # those of functions are names
        for value in (*ends, *getattr(graph, "value_info", ())):
            dims = [max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim]
            if not counted(dims) or (len(dims) == 1 and dims[0] > MOST_IN_A_ROW):
                sizes = ", ".join(map(str, dims[:8]))
                raise too_large(path, f"has the tensor {shown(value.name)} of the shape ({sizes})")


def counted(dims: list[int]) -> bool:
    """Whether a tensor may have that shape."""
    return len(dims) <= 32 and all(0 <= size <= MOST_NUMBERS for size in dims) and prod(dims) <= MOST_NUMBERS


def check_tensor(tensor: onnx.TensorProto, path: Path) -> int:
    """Return the bytes of its numbers. Raises ModelError where there are more or fewer of them than its shape says."""
    from onnx import TensorProto

    what = f"the tensor {shown(tensor.name)}"
    dims: list[int] = list(tensor.dims)
    if not counted(dims):
        sizes = ", ".join(map(str, dims[:8]))
        raise invalid(path, f"{what} claims the shape ({sizes}), which is none, or of more numbers than edgekd takes")
    kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in known_types() else str(tensor.data_type)
    count = prod(dims)
    if kind == "STRING":
        if len(tensor.string_data) != count:
            raise invalid(path, f"{what} has {len(tensor.string_data)} texts for the shape {tuple(dims)}")
        return sum(map(len, list[bytes](tensor.string_data)))
    if kind not in BITS:
        raise invalid(path, f"{what} is of the type {kind}, which edgekd does not know")
    size = -(-count * BITS[kind] // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        check_place(tensor, size, what, path)
        return size
    if tensor.raw_data:
        actual, expected = len(tensor.raw_data), size
    else:
        actual = sum(len(getattr(tensor, field)) for field in NUMBERS)
        expected = size if BITS[kind] < 8 else 2 * count if kind.startswith("COMPLEX") else count
    if actual != expected:
        raise invalid(path, f"{what} has {actual} bytes or numbers for the shape {tuple(dims)}, which needs {expected}")
    return size


def known_types() -> set[int]:
    from onnx import TensorProto

    return set(TensorProto.DataType.values())


def check_place(tensor: onnx.TensorProto, size: int, what: str, path: Path) -> None:
    """Check that its numbers are in a file beside the network, or below, and nowhere else."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = entries.get("location", "")
    if escapes_folder(path.parent, name):
        raise ModelError(
            f"`{path}` keeps {what} in {shown(name)}, which is not in the folder of the network",
            hint="keep its data beside it, in a file and not a link; do not use it if it is not yours",
        )
    place = path.parent / name
    if not place.is_file():
        raise ModelError(
            f"`{path}` cannot be read: its data `{place}` is not there", hint="keep its external data file beside it"
        )
    numbers = {key: entries.get(key) or default for key, default in (("offset", "0"), ("length", str(size)))}
    if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in numbers.values()):
        raise invalid(path, f"{what} begins at byte {shown(numbers['offset'])} of `{name}`, {shown(numbers['length'])}")
    start, length = int(numbers["offset"]), int(numbers["length"])
    held = place.stat().st_size
    if length != size or start + length > held:
        raise invalid(path, f"{what} needs {size} bytes, from byte {start} of `{name}`, which has {held}")


def check_functions(model: onnx.ModelProto, path: Path) -> None:
    """Check that inlining the functions ends, with a limited number of nodes."""
    bodies = {(plain_domain(f.domain), f.name, f.overload): f for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(graph: onnx.GraphProto | onnx.FunctionProto, depth: int) -> int:
        if depth > DEEPEST:
            raise invalid(path, f"its functions call each other in a circle, or more than {DEEPEST} deep")
        nodes = 0
        for node in graph.node:
            key = (plain_domain(node.domain), node.op_type, node.overload)
            if key in bodies and key not in sizes:
                sizes[key] = size(bodies[key], depth + 1)
            nodes += 1 + sizes.get(key, 0) + sum(size(inner, depth + 1) for inner in nested_graphs(node))
        return nodes

    count = size(model.graph, 0)
    if count > MOST_NODES:
        raise too_large(path, f"has {count:,} nodes")


def plain_domain(domain: str) -> str:
    """Return the domain of an operator; that of ONNX itself has two names."""
    return "" if domain == "ai.onnx" else domain


def check_order(graph: onnx.GraphProto, path: Path, outer: tuple[set[str], ...] = ()) -> None:
    """Check that every node reads tensors of earlier nodes, and has the inputs and outputs of its operator."""
    names = {value.name for value in (*graph.input, *graph.initializer)}
    names |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        what = f"the node {shown(node.name or node.op_type)}"
        check_ends(node, what, path)
        for name in node.input:
            if name and not any(name in scope for scope in (names, *outer)):
                later = any(name in other.output for other in graph.node)
                why = "only a later node makes: it is out of order, or a circle" if later else "nothing makes"
                raise invalid(path, f"{what} reads {shown(name)}, which {why}")
        for inner in nested_graphs(node):
            check_order(inner, path, (names, *outer))
        for name in node.output:
            if name and name in names:
                raise invalid(path, f"two nodes make {shown(name)}")
            names.add(name)
    for value in graph.output:
        if not any(value.name in scope for scope in (names, *outer)):
            raise invalid(path, f"its output {shown(value.name)} is made by nothing")


def check_ends(node: onnx.NodeProto, what: str, path: Path) -> None:
    """Check that a node has outputs and the inputs that its operator needs; onnx.checker checks ONNX's domain only."""
    least = LEAST.get(node.op_type, 0)
    if len(node.input) < least or not node.output:
        count = f"{len(node.input)} inputs and {len(node.output)} outputs"
        raise invalid(path, f"{what} has {count}; its operator {shown(node.op_type)} has at least {least} and 1")
