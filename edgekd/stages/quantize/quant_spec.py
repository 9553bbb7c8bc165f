"""Read what an INT8 file quantizes, for quantization-aware training, and apply the ranges that it learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import Exported, Fingerprint, LearnedRange
from edgekd.core.quant_scheme import QuantScheme
from edgekd.core.quant_spec import QuantizedTensor, QuantSpec
from edgekd.core.tensor_fingerprint import compute_fingerprint, nearest_fingerprint, probe_images
from edgekd.errors import ModelError
from edgekd.onnx import inspect
from edgekd.onnx.graph import DEQUANTIZE, QUANTIZE, GraphView, to_array
from edgekd.stages.quantize.ranges import Ranges, load_prepared

if TYPE_CHECKING:
    import onnx

RENAMED = "_QuantizeLinear_Input"  # onnxruntime's suffix of a float tensor whose name its rounded form took
STORED = "_quantized"  # its suffix of a constant that became integers


def read_quant_spec(fp32: Path, int8: Path, ranges: Ranges, scheme: QuantScheme) -> QuantSpec:
    """Return what the file `int8` quantizes of the file `fp32` that it comes from."""
    prints = fingerprints(fp32)
    view = GraphView(inspect.load(int8))
    weights = quantized_weights(view, prints)

    def consumer_prints(node: onnx.NodeProto) -> Iterable[Fingerprint]:
        of_weights = [weights[name][0] for name in node.input if name in weights]
        outputs = (name.removesuffix(RENAMED) for name in node.output)
        return of_weights or [prints[name] for name in outputs if name in prints]

    bounds = ranges.bounds_for(scheme.symmetric_activation)
    tensors: dict[str, QuantizedTensor] = {}  # by the name of their scale
    for node in view.model.graph.node:
        if node.op_type != QUANTIZE or node.input[0] in view.initializers:
            continue
        name = node.input[0].removesuffix(RENAMED)
        has_float_consumer = len(view.consumers(node.input[0])) > 1 or node.input[0] in view.outputs
        consumers = None
        if has_float_consumer:
            readers = (n for dequantize in view.successors(node) for n in view.successors(dequantize))
            consumers = tuple(fingerprint for n in readers for fingerprint in consumer_prints(n))
        tensor = QuantizedTensor((prints[name],), *bounds[name], consumers)
        same = (
            key for key, other in tensors.items() if nearest_fingerprint(prints[name], other.fingerprints) is not None
        )
        key = node.input[1] if node.input[1] in tensors else next(same, node.input[1])
        tensors[key] = merge(tensors[key], tensor) if key in tensors else tensor
    return QuantSpec(scheme, tuple(tensors.values()), tuple(dict.fromkeys(weights.values())))


def quantized_weights(view: GraphView, prints: dict[str, Fingerprint]) -> dict[str, tuple[Fingerprint, bool]]:
    """Return the quantized weights, and whether they have a scale for each channel.

    They are by the name of what an operator reads instead of the weight.
    """
    from onnx import TensorProto

    weights: dict[str, tuple[Fingerprint, bool]] = {}
    for node in view.model.graph.node:
        constant = view.initializers.get(node.input[0]) if node.op_type in (QUANTIZE, DEQUANTIZE) else None
        if constant is None:
            continue
        if node.op_type == QUANTIZE:
            (dequantize,) = view.successors(node)
            weights[dequantize.output[0]] = prints[node.input[0]], view.is_per_channel(node)
        elif constant.data_type == TensorProto.INT8:
            weights[node.output[0]] = prints[node.input[0].removesuffix(STORED)], view.is_per_channel(node)
    return weights


def merge(one: QuantizedTensor, other: QuantizedTensor) -> QuantizedTensor:
    """Return one range for two tensors: the scale of the first serves the other, or they hold the same numbers."""
    readers = None if one.readers is None or other.readers is None else (*one.readers, *other.readers)
    return replace(one, fingerprints=(*one.fingerprints, *other.fingerprints), readers=readers)


def fingerprints(path: Path) -> dict[str, Fingerprint]:
    """Return the fingerprint of every float tensor and float constant of a file, as the quantizers see it."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto

    model = load_prepared(path)
    view = GraphView(model)
    constants = [(n, to_array(t)) for n, t in view.initializers.items() if t.data_type == TensorProto.FLOAT]
    inner = [name for node in model.graph.node for name in node.output if name and name not in view.outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    images = probe_images(tuple(value.shape[1:]))
    names = [output.name for output in session.get_outputs()]
    outputs = zip(names, session.run(None, {value.name: images}), strict=True)
    arrays = [(value.name, images), *constants, *outputs]
    return {name: compute_fingerprint(array) for name, array in arrays if array.dtype == np.float32 and array.size}


def apply_learned_ranges(out: Path, model: Exported, ranges: Ranges, learned: Sequence[LearnedRange]) -> Ranges:
    """Return `ranges` of `model` with those that training learned in their place. Nothing is written into `out`.

    Raises ModelError where `model` computes no tensor that a range was learned for.
    """
    prints = fingerprints(model.dynamic.file.path)
    wanted = [one.fingerprint for one in learned]
    matches = {name: nearest_fingerprint(prints[name], wanted) for name in ranges.bounds if name in prints}
    indices = {name: index for name, index in matches.items() if index is not None}
    missing = len(wanted) - len(set(indices.values()))
    if missing:
        raise ModelError(
            f"`{model.dynamic.name}` has no tensor for {missing} of the {len(wanted)} ranges that were learned with it",
            hint="export the weights that were trained, and leave out cross_layer_equalization, smoothquant_alpha and "
            "bias_correction",
        )
    bounds = ranges.bounds | {name: (learned[index].low, learned[index].high) for name, index in indices.items()}
    limits = {name: limit for name, limit in ranges.limits.items() if name not in indices}
    return Ranges(bounds, limits, f"learned in training, {len(indices)} of {len(bounds)}; the others: {ranges.method}")
