"""Islands: where a quantized network runs in float on onnxruntime, what that takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekd.onnx.graph import DEQUANTIZE, QUANTIZE, GraphView, node_label
from edgekd.onnx.ops import WEIGHTED
from edgekd.stages.explain.ort_profile import QDQ_OPS, REORDERS, Operator, Profile

if TYPE_CHECKING:
    import onnx

MOVING = ("Gather", "Reshape", "Expand", "Flatten", "Transpose", "MaxPool", "Resize", "Squeeze", "Unsqueeze", "Split")
# what onnxruntime replaces by an integer kernel when pairs stand all around it (its selectors of Q/DQ groups:
# onnxruntime/core/optimizer/qdq_transformer/selectors_actions, qdq_selector_action_transformer.cc)
KERNELS = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Where", "AveragePool", "GlobalAveragePool"),
    *("LeakyRelu", "Sigmoid", "Softmax", *MOVING),
)
ABSORBED = ("Relu", "Clip")  # into the pair behind it, where its lowest integer stands for 0
INLINED = ("HardSwish", "Gelu", "Mish", "Swish", "Celu", "ThresholdedRelu", "LayerNormalization")  # into nameless nodes
SIGNED = "signed activations"
LOWEST = {"uint8": 0, "int8": -128}


@dataclass(frozen=True)
class FloatRegion:
    """Operators that touch each other and all run in float, with the pairs around them."""

    operators: tuple[Operator, ...]  # float ones and pairs
    between: tuple[str, ...]  # the integer operators before and behind
    reasons: tuple[tuple[str, str], ...]  # a kind of reason, and a sentence; the deciding one first
    edge: bool  # only the conversion of the network's input or output

    @property
    def us(self) -> float:
        return sum(o.median_us for o in self.operators)

    @property
    def floats(self) -> tuple[Operator, ...]:
        return tuple(o for o in self.operators if o.kind == "float")

    @property
    def pairs(self) -> int:
        return sum(o.op in QDQ_OPS for o in self.operators)


def find_float_regions(view: GraphView, profile: Profile) -> list[FloatRegion]:
    """The float parts of the optimised graph, the slowest first. `view` shows the file as it was written."""
    members = [i for i, o in enumerate(profile.operators) if o.kind in ("float", "pairs") or o.op in REORDERS]
    nodes = profile.graph.node
    home = {i: i for i in members}

    def root(i: int) -> int:
        while home[i] != i:
            i = home[i]
        return i

    maker = {name: i for i in range(len(nodes)) for name in nodes[i].output}
    for i in members:
        for name in nodes[i].input:
            before = maker.get(name)
            # an input that two islands read through pairs of their own does not make them one
            if (
                before in home
                and nodes[before].op_type != QUANTIZE
                or before in home
                and nodes[i].op_type == DEQUANTIZE
            ):
                home[root(i)] = root(before)
    parts: dict[int, list[int]] = {}
    for i in members:
        parts.setdefault(root(i), []).append(i)
    regions = [build_float_region(view, profile, part, maker) for part in parts.values()]
    return sorted(regions, key=lambda one: -one.us)


def build_float_region(view: GraphView, profile: Profile, part: list[int], maker: dict[str, int]) -> FloatRegion:
    nodes, operators, inside = profile.graph.node, profile.operators, set(part)
    outputs = {name for i in part for name in nodes[i].output}
    before = {maker[name] for i in part for name in nodes[i].input if name in maker} - inside
    behind = {i for i in range(len(nodes)) if outputs & set(nodes[i].input)} - inside
    named = tuple(dict.fromkeys(operators[i].name or operators[i].op for i in (*sorted(before), *sorted(behind))))
    members = tuple(operators[i] for i in part)
    ends = {value.name for value in (*profile.graph.input, *profile.graph.output)}
    touches = bool(ends & (outputs | {name for i in part for name in nodes[i].input}))
    edge = touches and not any(o.kind == "float" for o in members)
    reasons: list[tuple[str, str]] = []
    if any(o.kind == "float" for o in members):
        floats = sorted((o for o in members if o.kind == "float"), key=lambda o: -o.median_us)
        by_label = {node_label(node): node for node in view.nodes}
        costly = [(by_label[o.name], o.median_us) for o in floats if o.name in by_label]
        nameless = sum(o.median_us for o in floats if o.name not in by_label)
        costly += [(node, nameless) for node in neighbours(view, profile, part)]
        costs: dict[str, float] = {}  # by the kind of reason
        for node, us in costly:
            cause = reason(view, node)
            reasons += [cause] if cause not in reasons else []
            costs[cause[0]] = costs.get(cause[0], 0.0) + us
        reasons.sort(key=lambda one: (one[0] == "unknown", -costs[one[0]]))
    return FloatRegion(members, named, tuple(reasons), edge)


def neighbours(view: GraphView, profile: Profile, part: list[int]) -> list[onnx.NodeProto]:
    """What stands in the file between the pairs of an island: onnxruntime inlines some operators into nameless ones."""
    by_label = {node_label(node): node for node in view.nodes}
    pairs = [by_label.get(profile.operators[i].name) for i in part if profile.operators[i].kind == "pairs"]
    readers = [reader for pair in pairs if pair is not None for reader in view.successors(pair)]
    return [node for node in readers if node.op_type in INLINED]


def reason(view: GraphView, node: onnx.NodeProto) -> tuple[str, str]:
    """Why onnxruntime runs a node of the file in float: a kind of reason, and a sentence about the node."""
    name, op = node_label(node), node.op_type
    live = [tensor for tensor in node.input if tensor and tensor not in view.input_independent]
    if any(n.op_type in ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger") for n in view.nodes):
        return "dynamic", "ranges are found anew at every call, and what follows a product runs in float"
    after = [r for r in behind_activations(view, node) if r.op_type == QUANTIZE]
    before = {tensor: carried(view, tensor) for tensor in live}
    pairs = [pair for pair in (*before.values(), *after) if pair is not None]
    if op in ABSORBED or any(r.op_type in ABSORBED for r in view.successors(node)):
        for pair in after:
            kind, zero = kind_of(view, pair), zero_of(view, pair)
            if zero != LOWEST.get(kind, zero):
                what = f"the zero of `{pair.input[0]}` is {zero}, not the lowest {kind}: its Relu stays"
                return SIGNED if kind == "int8" else "relu", what
    if op not in KERNELS and op not in ABSORBED:
        return "kernel", f"onnxruntime has no integer kernel for {op}"
    unpaired = op in WEIGHTED and len(node.input) > 1 and not view.is_dequantized(node.input[1])
    floating = "weight", f"the weight of {op} `{name}` has no Q/DQ pair"
    for scales in (view.constant_input(pair, 1) for pair in pairs if view.is_per_channel(pair)):
        if unpaired and scales is not None and np.ptp(scales) == 0:
            return floating  # edgekd writes equal scales to keep a float layer float
        return "channels", "activations have a scale for each channel, which no integer kernel takes"
    bare = [tensor for tensor, pair in before.items() if pair is None]
    if bare and op not in ABSORBED:
        return "input", f"the input of {op} `{name}` has no Q/DQ pair (`{bare[0]}`)"
    others = [r for r in behind_activations(view, node) if r.op_type != QUANTIZE]
    if others or not after:
        reader = (
            f"{others[0].op_type} `{node_label(others[0])}` reads it" if others else "it is an output of the network"
        )
        return "output", f"the output of {op} `{name}` is not quantized: {reader}"
    if unpaired:
        return floating
    if op in MOVING and not same_scale(view, node, after[0]):
        return "scales", f"the scales before and behind {op} `{name}` differ"
    if any(kind_of(view, pair) == "int8" for pair in pairs):  # those that several operators read stay
        return SIGNED, f"{op} `{name}` is between int8 pairs, which onnxruntime on x86 cannot always turn into uint8"
    return "unknown", f"onnxruntime keeps {op} `{name}` in float"


def carried(view: GraphView, name: str) -> onnx.NodeProto | None:
    """The DequantizeLinear that a tensor comes from, operators that only move in between left out."""
    maker = view.producers.get(name)
    while maker is not None and maker.op_type in MOVING:
        maker = view.producers.get(maker.input[0])
    return maker if maker is not None and maker.op_type == DEQUANTIZE else None


def kind_of(view: GraphView, pair: onnx.NodeProto) -> str:
    """The integer type that a QuantizeLinear or DequantizeLinear has on its one side."""
    zeros = view.constant_input(pair, 2)
    return "uint8" if zeros is None else str(zeros.dtype)


def zero_of(view: GraphView, pair: onnx.NodeProto) -> int:
    zeros = view.constant_input(pair, 2)
    return 0 if zeros is None else int(zeros.ravel()[0])


def behind_activations(view: GraphView, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """What reads a node's output, a Relu or Clip in between left out."""
    found = []
    for reader in view.successors(node):
        found += behind_activations(view, reader) if reader.op_type in ABSORBED else [reader]
    return found


def same_scale(view: GraphView, node: onnx.NodeProto, quantizer: onnx.NodeProto) -> bool:
    before = view.producer(node.input[0], DEQUANTIZE)
    if before is None:
        return False
    numbers = [(view.constant_input(before, i), view.constant_input(quantizer, i)) for i in (1, 2)]
    return all(a is not None and b is not None and (a == b).all() for a, b in numbers)
