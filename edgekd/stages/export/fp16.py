"""Bake FP16 into an ONNX file, for runtimes that take the precision from the graph (TensorRT 11); Q/DQ pairs survive.

Every operator whose schema allows float16 computes in it; the others keep FP32 between two Casts. The network's input
and outputs stay FP32, so that the file is called as before. Scales of Q/DQ become FP16 where float16 holds them (ONNX
allows that from opset 19); elsewhere the pair keeps its FP32 scale and stands between Casts. Weights in front of a Q/DQ
pair are put on its grid first, so that the pair yields the very integers of the FP32 file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import File, OnnxModel
from edgekd.errors import ModelError, ParityError
from edgekd.onnx import inspect, writer
from edgekd.onnx.graph import QDQ, QUANTIZE, GraphView, to_array

if TYPE_CHECKING:
    import onnx

FP16_SCALES = 19  # the opset from which QuantizeLinear takes FP16
LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_normal)  # below, float16 loses bits: 6.1e-5
SINGLE, HALF = 1, 10  # TensorProto.FLOAT, FLOAT16
TOLERANCE = 0.01  # of the largest absolute answer; 11 bits a number, over some dozens of layers


def bake(source: Path, target: Path, inputs: np.ndarray, tolerance: float = TOLERANCE) -> OnnxModel:
    """Write the FP32 or Q/DQ file `source` in FP16 to `target`; `inputs` (N, ...) are real inputs to compare with.

    Raises ModelError if the file cannot be converted, ParityError where an answer moves by more than `tolerance` of the
    largest one (in INT8: in the mean; single answers jump by whole steps).
    """
    from onnx import checker

    original = inspect.load(source)
    half = Conversion(original, source, overflowing(original, inputs)).convert()
    checker.check_model(half, full_check=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".edgekd-", dir=target.parent) as folder:  # beside it: a rename, not a copy
        path = Path(folder, target.name)
        writer.write(half, path, {entry.key: entry.value for entry in original.metadata_props})
        compare(source, path, inputs, tolerance)
        described = inspect.describe(path, target.stem)
        path.replace(target)
    return replace(described, file=File.of(target))


def compare(source: Path, path: Path, inputs: np.ndarray, tolerance: float) -> None:
    """Raises ParityError. Without graph optimisation: onnxruntime's fusions compute Q/DQ with FP16 scales wrongly."""
    exact, outputs = (unoptimised_outputs(file, inputs) for file in (source, path))
    gaps = np.abs(outputs - exact)
    gap = float(gaps.mean() if inspect.facts(source).precision == "int8" else gaps.max())
    gap /= float(np.abs(exact).max()) or 1.0
    if not gap <= tolerance:  # also true of nan
        raise ParityError(
            f"in FP16 the answers of `{source.name}` move by {gap:.1e} of the largest one (allowed: {tolerance:.0e})",
            hint="look for activations beyond 65,504 or weights below 6e-5; such a network stays FP32",
        )


def unoptimised_outputs(path: Path, inputs: np.ndarray) -> np.ndarray:
    """Return the first outputs, computed by the operators as they are in the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, batch = session.get_inputs()[0].name, inspect.facts(path).input.shape[0] or 1
    count = len(inputs) // batch * batch
    return np.concatenate([session.run(None, {name: inputs[i : i + batch]})[0] for i in range(0, count, batch)])


def overflowing(model: onnx.ModelProto, inputs: np.ndarray) -> set[str]:
    """Return the names of the float tensors that leave float16's range on some inputs."""
    import onnx
    import onnxruntime

    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    types = tensor_types(model)
    outputs = {value.name for value in model.graph.output}
    names = [n for node in model.graph.node for n in node.output if types.get(n) == SINGLE]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else 1
    wide = {entry.name} if np.abs(inputs).max(initial=0) > LARGEST else set()
    for i in range(0, len(inputs) - batch + 1, batch):
        answers = session.run(names, {entry.name: inputs[i : i + batch]})
        wide |= {n for n, value in zip(names, answers, strict=True) if np.abs(value).max(initial=0) > LARGEST}
    return wide


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return ONNX's number for the type of every tensor."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


@dataclass
class Conversion:
    """One walk over a graph, in order; every float tensor is there in FP32, in FP16, or both."""

    model: onnx.ModelProto
    path: Path  # for messages
    wide: set[str]  # tensors that float16 cannot hold
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    names: dict[tuple[str, int], str] = field(default_factory=dict)  # (tensor, type) -> its name in the new graph
    used: dict[str, onnx.TensorProto] = field(default_factory=dict)  # constants of the new graph

    def convert(self) -> onnx.ModelProto:
        import onnx

        graph, outputs = self.model.graph, {value.name for value in self.model.graph.output}
        self.types = tensor_types(self.model)
        self.opset = next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        self.constants = dict(GraphView(self.model).constants)
        self.put_weights_on_their_grids()
        self.names = {(value.name, self.types[value.name]): value.name for value in graph.input}
        for node in graph.node:
            if node.op_type != "Constant":
                self.add(node)
        for name in outputs:
            if self.types[name] == SINGLE and self.names.get((name, SINGLE)) != name:
                self.nodes.append(cast(self.names[name, HALF], name, SINGLE))
        half = onnx.ModelProto()
        half.CopyFrom(self.model)
        for repeated in (half.graph.node, half.graph.initializer, half.graph.value_info):
            del repeated[:]
        half.graph.node.extend(self.nodes)
        half.graph.initializer.extend(self.used.values())
        return half

    def add(self, node: onnx.NodeProto) -> None:
        """Add the node on its inputs in the type that it computes in."""
        import onnx

        if any(attribute.HasField("g") for attribute in node.attribute):
            raise ModelError(
                f"`{self.path}` has a {node.op_type} with a nested graph",
                hint="fold it with the network's own shapes, or keep the file FP32",
            )
        kind, fixed = self.kind(node)
        new = onnx.NodeProto()
        new.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name:
                new.input[i] = self.tensor(name, SINGLE if i in fixed else kind)
        for i, name in enumerate(node.output):
            if self.types.get(name) == SINGLE and kind == HALF:
                new.output[i] = f"{name}.fp16"
                self.names[name, HALF] = new.output[i]
            else:
                self.names[name, self.types.get(name, 0)] = name
        for attribute in new.attribute:
            if kind == HALF and node.op_type == "Cast" and attribute.name == "to" and attribute.i == SINGLE:
                attribute.i = HALF
            if kind == HALF and attribute.HasField("t") and attribute.t.data_type == SINGLE:  # ConstantOfShape
                attribute.t.CopyFrom(halved(attribute.t, attribute.t.name))
        self.nodes.append(new)

    def kind(self, node: onnx.NodeProto) -> tuple[int, set[int]]:
        """Return the float type that a node computes in, and which of its inputs stay FP32 nevertheless."""
        from onnx import defs

        floats = [n for n in (*node.input, *node.output) if self.types.get(n) == SINGLE]
        if not floats or self.wide.intersection(floats) or node.domain not in ("", "ai.onnx"):
            return SINGLE, set()
        if node.op_type in QDQ:
            scale = self.constants.get(node.input[1])
            fits = scale is not None and self.opset >= FP16_SCALES and holds(to_array(scale))
            return (HALF if fits else SINGLE), set()
        schema = defs.get_schema(node.op_type, self.opset, "")
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

        def halves(formal: str) -> bool:
            return "tensor(float16)" in allowed.get(formal, (formal,))

        formals = [schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i in range(len(node.input))]
        returned = [schema.outputs[min(i, len(schema.outputs) - 1)].type_str for i in range(len(node.output))]
        fixed = {
            i for i, formal in enumerate(formals) if self.types.get(node.input[i]) == SINGLE and not halves(formal)
        }
        answers = [f for f, name in zip(returned, node.output, strict=True) if self.types.get(name) == SINGLE]
        return (HALF, fixed) if all(map(halves, answers)) else (SINGLE, set())

    def tensor(self, name: str, kind: int) -> str:
        """Return the name of a tensor in the float type `kind`, with a Cast where it exists in the other only."""
        if name in self.constants:
            return self.constant(name, kind)
        if self.types.get(name) != SINGLE:
            return name
        if (name, kind) not in self.names:
            source = self.names[name, SINGLE + HALF - kind]
            self.names[name, kind] = f"{name}.fp16" if kind == HALF else f"{name}.fp32"
            self.nodes.append(cast(source, self.names[name, kind], kind))
        return self.names[name, kind]

    def constant(self, name: str, kind: int) -> str:
        tensor = self.constants[name]
        if tensor.data_type != SINGLE or kind == SINGLE:
            self.used[name] = named(tensor, name)
            return name
        new = f"{name}.fp16"
        if np.abs(to_array(tensor)).max(initial=0) > LARGEST:
            raise ModelError(
                f"the constant `{name}` of `{self.path}` is beyond 65,504, the largest number of FP16",
                hint="rescale the layer before, or keep the file FP32",
            )
        self.used[new] = halved(tensor, new)
        return new

    def put_weights_on_their_grids(self) -> None:
        """FP16 weights that rounded across the middle between two integers would yield other ones."""
        from onnx import numpy_helper

        for node in self.model.graph.node:
            if node.op_type != QUANTIZE or node.input[0] not in self.constants or len(node.input) < 3:
                continue
            weight, scale, zero = (to_array(self.constants[n]) for n in node.input)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)] if scale.size > 1 else []
            scale, zero = scale.reshape(shape), zero.reshape(shape)
            limits = np.iinfo(zero.dtype)
            integers = np.clip(np.rint(weight / scale) + zero, limits.min, limits.max) - zero
            self.constants[node.input[0]] = numpy_helper.from_array(
                (integers * scale).astype(np.float32), node.input[0]
            )


def named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    import onnx

    copied = onnx.TensorProto()
    copied.CopyFrom(tensor)
    copied.name = name
    return copied


def holds(scale: np.ndarray) -> bool:
    """Whether float16 holds scales with all of its bits."""
    return bool((scale >= SMALLEST).all() and (scale <= LARGEST).all())


def halved(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(to_array(tensor).astype(np.float16), name)


def cast(source: str, name: str, kind: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [name], name=f"cast.{name}", to=kind)
