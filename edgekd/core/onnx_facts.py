"""What an ONNX file says about itself, and what it answers; reads files of any origin, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.core import onnx_guard
from edgekd.core.artifact import File, OnnxModel, Precision, TensorSpec
from edgekd.core.errors import ModelError
from edgekd.core.exactness import exact_entries, unshare
from edgekd.core.foreign import foreign

if TYPE_CHECKING:
    import numpy as np
    import onnx

CHUNK = 64  # images at once through a file with a dynamic batch: bounds the memory
# input positions that hold trained numbers (running statistics of a BatchNormalization are none)
WEIGHTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "LayerNormalization", "GroupNormalization"), (1, 2)),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), (1, 2)),
    **dict.fromkeys(("Gemm", "FusedGemm"), (0, 1, 2)),
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
    **dict.fromkeys(("ConvInteger", "PRelu"), (1,)),
    **{"QLinearConv": (3, 8), "QGemm": (3, 6), "QLinearMatMul": (0, 3)},
    "Gather": (0,),  # an embedding; shape arithmetic gathers from int64, which never counts
}
ELEMENTWISE = ("Add", "Sub", "Mul", "Div")  # their constants are biases and scales, unless they are single numbers
PASSING = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}  # position of the weight
PRODUCTS = ("Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul")
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QGemm")


@dataclass(frozen=True)
class Exported:
    """One network as two ONNX files with the same tensor names: batch 1 for the edge, dynamic batch for evaluation."""

    single: OnnxModel
    dynamic: OnnxModel


@dataclass(frozen=True)
class OnnxFacts:
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    classes: int  # of a classifier; 0 if the first output is not (batch, classes)
    opset: int  # of ai.onnx
    ir: int
    domains: tuple[str, ...]  # imported ones; "" is ai.onnx
    parameters: int  # trained numbers; scales, zero points and shapes are none
    macs: int | None  # of convolutions and matrix products, one image; None if a size on the way is dynamic
    nodes: dict[str, int]  # how many of each operator; `domain.Operator` outside of ai.onnx
    precision: Precision


def facts(path: Path) -> OnnxFacts:
    """What the file says. Raises ModelError if it is missing, not ONNX, contradictory, or has not exactly one input."""
    model = load(path)
    spec = single_input(model, path)
    outputs = tuple(tensor_spec(value) for value in model.graph.output)
    first = outputs[0].shape if outputs else ()
    nodes = Counter(node.op_type if own(node) else f"{node.domain}.{node.op_type}" for node in model.graph.node)
    quantized = any(n.op_type in QUANTIZED or n.op_type.startswith("QLinear") for n in model.graph.node)
    return OnnxFacts(
        input=spec,
        outputs=outputs,
        classes=first[1] if len(first) == 2 else 0,
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        ir=model.ir_version,
        domains=tuple(sorted({"" if e.domain == "ai.onnx" else e.domain for e in model.opset_import})),
        parameters=parameters(model),
        macs=macs(model, spec, path),
        nodes=dict(sorted(nodes.items())),
        precision="int8" if quantized else "fp32",
    )


def described(path: Path, name: str, macs: int | None = None) -> OnnxModel:
    """The file as an artefact. Raises ModelError as `facts` does, and if its MACs are neither given nor countable."""
    found = facts(path)
    macs = found.macs if macs is None else macs
    if macs is None:
        raise ModelError(
            f"the multiply-accumulates of `{path}` cannot be counted: the size of a tensor is not fixed",
            hint="fix every dimension of the input but the batch when you export it",
        )
    return OnnxModel(
        File.of(path),
        name,
        found.input,
        found.classes,
        found.precision,
        found.opset,
        found.ir,
        found.parameters,
        macs,
    )


def load(path: Path) -> onnx.ModelProto:
    """The parsed file, its functions inlined. Raises ModelError if it is missing, not ONNX, or not as it should be."""
    return onnx_guard.opened(path)


def single_input(model: onnx.ModelProto, path: Path) -> TensorSpec:
    """Raises ModelError unless the model has exactly one input that is a tensor."""
    constants = {tensor.name for tensor in model.graph.initializer}  # listed as inputs before IR 4
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        named = ", ".join(f"`{value.name}`" for value in inputs) or "none"
        raise ModelError(
            f"`{path}` has {len(inputs)} inputs ({named}), but one is needed",
            hint="export the network with the image as its only input",
        )
    if not inputs[0].type.tensor_type.shape.dim:
        raise ModelError(f"the input of `{path}` has no shape", hint="export it for batches of images")
    return tensor_spec(inputs[0])


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    known = tensor.elem_type in helper.get_all_tensor_dtypes()
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else "unknown"
    return TensorSpec(value.name, tuple(max(dim.dim_value, 0) for dim in tensor.shape.dim), dtype)


def own(node: onnx.NodeProto) -> bool:
    """Whether it is one of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def parameters(model: onnx.ModelProto) -> int:
    """Elements of the constants that weighted operators use, counted once each, also behind Q/DQ pairs."""
    from onnx import TensorProto

    numbers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            numbers[node.output[0]] = node.attribute[0].t
    shapes = (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
    sizes = {name: prod(t.dims) for name, t in numbers.items() if t.data_type not in shapes}
    origin = {name: name for name in sizes}
    used: set[str] = set()
    for node in model.graph.node:
        if node.op_type in PASSING and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        weights = [name for i, name in enumerate(node.input) if i in WEIGHTS.get(node.op_type, ())]
        if node.op_type in ELEMENTWISE:
            weights = [name for name in node.input if sizes.get(origin.get(name, ""), 0) > 1]
        used.update(origin[name] for name in weights if name in origin)
    return sum(sizes[name] for name in used)


def macs(model: onnx.ModelProto, spec: TensorSpec, path: Path) -> int | None:
    """Multiply-accumulates for one image. None if a size is dynamic or an operator unknown to ONNX hides it."""
    sizes = shapes(model, spec, path)
    counts = [node_macs(node, sizes) for node in model.graph.node]
    return None if None in counts else sum(filter(None, counts)) // max((1, *spec.shape[:1]))


def node_macs(node: onnx.NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Those of one operator, from the sizes of tensors; None if one of them is not known."""
    if node.op_type in CONVOLUTIONS:
        counted, factor = sizes.get(node.output[0]), sizes.get(node.input[CONVOLUTIONS[node.op_type]])
        factor = factor and factor[1:]  # each output number sums over input channels of its group and the kernel
    elif node.op_type == "ConvTranspose":
        counted, factor = sizes.get(node.input[0]), sizes.get(node.input[1])
        factor = factor and factor[1:]  # each input number goes to output channels of its group and the kernel
    elif node.op_type in PRODUCTS:
        counted, left = sizes.get(node.output[0]), sizes.get(node.input[0])
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        factor = left and (left[0 if transposed else -1],)
    else:
        return 0
    if counted is None or factor is None or 0 in counted or 0 in factor:
        return None
    return prod(counted) * prod(factor)


def shapes(model: onnx.ModelProto, spec: TensorSpec, path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor for a dynamic batch set to 1.

    Raises ModelError where shapes contradict each other, or one is of more numbers than a device may hold.
    """
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    value = next(v for v in fixed.graph.input if v.name == spec.name)
    if spec.shape and not spec.shape[0]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
        del fixed.graph.value_info[:]  # they say `batch`
        for output in fixed.graph.output:
            output.type.tensor_type.ClearField("shape")
    with foreign(f"the shapes in `{path}` contradict each other", "export it anew", ModelError):
        onnx_guard.check_sizes(onnx.shape_inference.infer_shapes(fixed), path)  # before each number of a row is kept
        fixed = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)
    onnx_guard.check_sizes(fixed, path)
    graph = fixed.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {v.name: tensor_spec(v).shape for v in values if v.type.tensor_type.HasField("shape")}
    return found | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def check(path: Path) -> OnnxFacts:
    """The facts of a file that onnx.checker and strict shape inference accept. Raises ModelError otherwise."""
    import onnx

    model = load(path)
    with foreign(f"`{path}` is not valid ONNX", "export it anew", ModelError):
        onnx.checker.check_model(model, full_check=True)
    return facts(path)


class Opened:
    """An onnxruntime session; what it says of inputs that it cannot take is a ModelError."""

    def __init__(self, session: Any, path: Path) -> None:
        self.session, self.path = session, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, names: list[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs `names`, or all, for the inputs in `feed`."""
        try:
            found: list[np.ndarray] = self.session.run(names, feed)
        except ort_errors() as error:
            cause = " ".join(str(error).split())
            taken = ", ".join(f"{value.shape}, {value.type}" for value in self.session.get_inputs())
            raise ModelError(f"`{self.path}` refuses these inputs: {cause}", hint=f"it takes {taken}") from error
        return found


def session(path: Path, optimised: bool = True, threads: int = 0, exact: bool = True) -> Opened:
    """An onnxruntime session on the CPU; `threads` 0 stands for one per core. Raises ModelError if it does not load.

    Integers are added up without saturation, as on the processor that the file is for. Where it is for this very
    processor, `exact` is False, and they are added up as this one does.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    entries = exact_entries() if exact else {}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    source = loadable(path) if entries and optimised else str(path)
    try:
        return Opened(ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]), path)
    except ort_errors() as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"onnxruntime {ort.__version__} does not load `{path}`: {cause}",
            hint="lower the opset, or update onnxruntime",
        ) from error


def loadable(path: Path) -> str | bytes:
    """What onnxruntime takes for the file with the entries of `exactness`: its path, or its bytes where they fail."""
    from onnx.external_data_helper import load_external_data_for_model

    model = onnx_guard.parsed(path)
    if not unshare(model):
        return str(path)
    load_external_data_for_model(model, str(path.parent))
    return bytes(model.SerializeToString())


def ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own errors, which have no common root, and what C++ ones become in Python."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError, MemoryError)


def answers(path: Path, inputs: np.ndarray, optimised: bool = True, threads: int = 0, exact: bool = True) -> np.ndarray:
    """The first output for `inputs`, (N, ...), from onnxruntime in this process; for parity, never for timing.

    A static batch is fed in pieces of its size. Raises ModelError if N is no multiple of it, the inputs do not fit, or
    it does not answer with a row for each of them.
    """
    import numpy as np

    running = session(path, optimised, threads, exact)
    value = running.get_inputs()[0]
    batch = value.shape[0] if isinstance(value.shape[0], int) else 0
    if not len(inputs) or (batch and len(inputs) % batch):
        raise ModelError(
            f"`{path}` takes {batch or 'one or more'} inputs at once, which {len(inputs)} cannot be cut into",
            hint="give a multiple of the batch size, or export with batch 1",
        )
    step = batch or CHUNK
    pieces = [running.run(None, {value.name: inputs[i : i + step]})[0] for i in range(0, len(inputs), step)]
    if not all(isinstance(piece, np.ndarray) and piece.ndim for piece in pieces):
        raise ModelError(f"`{path}` answers with no rows", hint="its first output must have a row for each input")
    answer: np.ndarray = np.concatenate(pieces)
    return answer
