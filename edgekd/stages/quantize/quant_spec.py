"""Between a network in training and its INT8 file: what the file rounds, and the ranges that training found for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import Exported, Learnt, Mark
from edgekd.core.quant_scheme import Dialect
from edgekd.core.quant_spec import Blueprint, Rounded
from edgekd.core.tensor_fingerprint import mark, nearest, probe
from edgekd.errors import ModelError
from edgekd.onnx import inspect
from edgekd.stages.quantize.ranges import Ranges, prepared

if TYPE_CHECKING:
    import onnx


RENAMED = "_QuantizeLinear_Input"  # onnxruntime's ending of a tensor whose own name its rounded form took
STORED = "_quantized"  # its ending of a constant that became integers


def read(fp32: Path, int8: Path, ranges: Ranges, dialect: Dialect) -> Blueprint:
    """What the file `int8` rounds of the file `fp32` that it was made from."""
    from onnx import TensorProto

    known = marks(fp32)
    model = inspect.load(int8)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    ends = {value.name for value in model.graph.output}
    weights: dict[str, tuple[Mark, bool]] = {}  # by the name of what an operator takes instead
    for node in model.graph.node:
        stored = node.op_type == "DequantizeLinear" and node.input[0] in constants
        if stored and constants[node.input[0]].data_type == TensorProto.INT8:
            weights[node.output[0]] = known[node.input[0].removesuffix(STORED)], several(constants[node.input[1]])
        elif node.op_type == "QuantizeLinear" and node.input[0] in constants:
            (half,) = readers[node.output[0]]
            weights[half.output[0]] = known[node.input[0]], several(constants[node.input[1]])

    def reader(node: onnx.NodeProto) -> Iterable[Mark]:
        own = [weights[name][0] for name in node.input if name in weights]
        return own or [known[name] for name in (n.removesuffix(RENAMED) for n in node.output) if name in known]

    bounds = ranges.serving(dialect.symmetric_activation)
    tensors: dict[str, Rounded] = {}  # by the name of their scale
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        name = node.input[0].removesuffix(RENAMED)
        free = [other for other in readers[node.input[0]] if other is not node]
        takers = None
        if free or node.input[0] in ends:
            takers = tuple(m for half in readers[node.output[0]] for n in readers[half.output[0]] for m in reader(n))
        own = Rounded((known[name],), *bounds[name], takers)
        same = (scale for scale, other in tensors.items() if nearest(known[name], other.marks) is not None)
        scale = node.input[1] if node.input[1] in tensors else next(same, node.input[1])
        tensors[scale] = joined(tensors[scale], own) if scale in tensors else own
    return Blueprint(dialect, tuple(tensors.values()), tuple(dict.fromkeys(weights.values())))


def several(scale: onnx.TensorProto) -> bool:
    return bool(np.prod(scale.dims) > 1)


def joined(one: Rounded, other: Rounded) -> Rounded:
    """One range for two tensors: the scale of the first serves the other, or they hold the same numbers."""
    readers = None if one.readers is None or other.readers is None else (*one.readers, *other.readers)
    return replace(one, marks=(*one.marks, *other.marks), readers=readers)


def marks(path: Path) -> dict[str, Mark]:
    """The mark of every float tensor that a file computes, and of every float constant, as the quantizers see it."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, numpy_helper

    model = prepared(path)
    kept = [(t.name, numpy_helper.to_array(t)) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    ends = {value.name for value in model.graph.output}
    inner = [name for node in model.graph.node for name in node.output if name and name not in ends]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (value,) = running.get_inputs()
    x = probe(tuple(value.shape[1:]))
    names = [output.name for output in running.get_outputs()]
    computed = zip(names, running.run(None, {value.name: x}), strict=True)
    arrays = [(value.name, x), *kept, *computed]
    return {name: mark(array) for name, array in arrays if array.dtype == np.float32 and array.size}


def learnt_ranges(out: Path, model: Exported, ranges: Ranges, learnt: Sequence[Learnt]) -> Ranges:
    """`ranges` of `model`, with those that training found in their place. Writes nothing into `out`.

    Raises ModelError where `model` computes no tensor that a range was learnt for.
    """
    known = marks(model.dynamic.file.path)
    wanted = [one.mark for one in learnt]
    places = {name: at for name in ranges.bounds if name in known and (at := nearest(known[name], wanted)) is not None}
    lost = len(wanted) - len(set(places.values()))
    if lost:
        raise ModelError(
            f"`{model.dynamic.name}` has no tensor for {lost} of the {len(wanted)} ranges that were learnt with it",
            hint="export the weights that were trained, and leave out equalize, smooth and correct_bias",
        )
    bounds = ranges.bounds | {name: (learnt[at].low, learnt[at].high) for name, at in places.items()}
    limits = {n: limit for n, limit in ranges.limits.items() if n not in places}
    return Ranges(bounds, limits, f"learnt in training, {len(places)} of {len(bounds)}; the others: {ranges.method}")
