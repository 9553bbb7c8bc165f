"""Read the facts of an ONNX file of any origin: inputs, outputs, parameters, multiply-accumulates; without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.core.artifact import File, OnnxModel, Precision, TensorSpec
from edgekd.errors import ModelError
from edgekd.onnx import validate
from edgekd.utils.external import external_code

if TYPE_CHECKING:
    import onnx

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
class OnnxFacts:
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    opset: int  # of ai.onnx
    ir: int
    domains: tuple[str, ...]  # imported ones; "" is ai.onnx
    parameters: int  # trained numbers; scales, zero points and shapes are none
    macs: int | None  # of convolutions and matrix products, one image; None if a size on the way is dynamic
    nodes: dict[str, int]  # how many of each operator; `domain.Operator` outside of ai.onnx
    precision: Precision


def facts(path: Path) -> OnnxFacts:
    """Return the facts of a file.

    Raises ModelError if it is missing, not ONNX, contradictory, or has not exactly one input.
    """
    model = load(path)
    spec = single_input(model, path)
    outputs = tuple(tensor_spec(value) for value in model.graph.output)
    nodes = Counter(node.op_type if is_onnx_op(node) else f"{node.domain}.{node.op_type}" for node in model.graph.node)
    quantized = any(n.op_type in QUANTIZED or n.op_type.startswith("QLinear") for n in model.graph.node)
    return OnnxFacts(
        input=spec,
        outputs=outputs,
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        ir=model.ir_version,
        domains=tuple(sorted({"" if e.domain == "ai.onnx" else e.domain for e in model.opset_import})),
        parameters=parameters(model),
        macs=macs(model, spec, path),
        nodes=dict(sorted(nodes.items())),
        precision="int8" if quantized else "fp32",
    )


def describe(path: Path, name: str, macs: int | None = None) -> OnnxModel:
    """Return the file as an artefact. Raises ModelError as `facts`, and if MACs are neither given nor countable."""
    about = facts(path)
    macs = about.macs if macs is None else macs
    if macs is None:
        raise ModelError(
            f"the multiply-accumulates of `{path}` cannot be counted: the size of a tensor is not fixed",
            hint="fix every dimension of the input but the batch when you export it",
        )
    return OnnxModel(
        File.of(path),
        name,
        about.input,
        about.outputs,
        about.precision,
        about.opset,
        about.ir,
        about.parameters,
        macs,
    )


def load(path: Path) -> onnx.ModelProto:
    """Return the parsed file, its functions inlined. Raises ModelError if it is missing, not ONNX, or invalid."""
    return validate.load_validated(path)


def single_input(model: onnx.ModelProto, path: Path) -> TensorSpec:
    """Return the only input. Raises ModelError unless the model has exactly one, with a shape."""
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
    is_tensor = tensor.elem_type in helper.get_all_tensor_dtypes()
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if is_tensor else "unknown"
    return TensorSpec(value.name, tuple(max(dim.dim_value, 0) for dim in tensor.shape.dim), dtype)


def is_onnx_op(node: onnx.NodeProto) -> bool:
    """Whether an operator is one of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def parameters(model: onnx.ModelProto) -> int:
    """Count the elements of the constants that weighted operators use, once each, also behind Q/DQ pairs."""
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
    """Count the multiply-accumulates for one image. None if a size is dynamic or hidden by an unknown operator."""
    sizes = shapes(model, spec, path)
    counts = [node_macs(node, sizes) for node in model.graph.node]
    return None if None in counts else sum(filter(None, counts)) // max((1, *spec.shape[:1]))


def node_macs(node: onnx.NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Count those of one operator, from the sizes of tensors; None if one of them is not known."""
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
    """Return the shape of every tensor for a dynamic batch set to 1.

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
    with external_code(f"the shapes in `{path}` contradict each other", "export it again", ModelError):
        validate.check_sizes(onnx.shape_inference.infer_shapes(fixed), path)  # before each number of a row is kept
        fixed = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)
    validate.check_sizes(fixed, path)
    graph = fixed.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    inferred = {v.name: tensor_spec(v).shape for v in values if v.type.tensor_type.HasField("shape")}
    return inferred | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def check(path: Path) -> OnnxFacts:
    """Return the facts of a file that onnx.checker and strict shape inference accept. Raises ModelError otherwise."""
    import onnx

    model = load(path)
    with external_code(f"`{path}` is not valid ONNX", "export it again", ModelError):
        onnx.checker.check_model(model, full_check=True)
    return facts(path)
