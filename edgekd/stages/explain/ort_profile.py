"""Profile: what onnxruntime makes of ONNX files on this processor, and how long each operator of that takes."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.errors import ModelError
from edgekd.onnx import inspect
from edgekd.onnx import session as onnx_session
from edgekd.onnx.graph import QDQ
from edgekd.utils import progress

if TYPE_CHECKING:
    import onnx

Kind = Literal["integer", "pairs", "layout", "float"]
BLOCKS = 12  # rounds; in each, every file has one block of calls
SECONDS = 1.0  # of calls, for each file
CALLS = (8, 60)  # of a block, at least and at most
DISCARDED = 5  # calls at the beginning of a block: the caches still hold the other file
TRIED = 5  # calls that tell about how long one takes
PAUSE_S = 0.005  # between blocks of several threads: the workers of one session spin a while, and hold a core
QDQ_OPS = (*QDQ, "DynamicQuantizeLinear")
INTEGER = ("QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention")
TO_FLOAT = ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention")
REORDERS = ("ReorderInput", "ReorderOutput")
MARKS = re.compile(r"(_token_\d+|_nchwc|/duplicated)+$")  # what onnxruntime appends to the names of nodes it rewrites
EIGHT = (2, 3)  # TensorProto.UINT8, INT8


@dataclass(frozen=True)
class Operator:
    """A node of the optimised graph."""

    name: str  # of the node in the file, as far as onnxruntime kept it; "" if it made the node itself
    op: str
    kind: Kind
    us: np.ndarray  # (blocks,) microseconds of one call, the mean of the middle half of a block's calls

    @property
    def median_us(self) -> float:
        return float(np.median(self.us))


@dataclass(frozen=True)
class Profile:
    """One file as onnxruntime executes it."""

    graph: onnx.GraphProto
    operators: tuple[Operator, ...]  # in the order of graph.node

    @cached_property
    def total_us(self) -> float:
        """Of all operators in one call; without what lies between them."""
        return float(sum(o.median_us for o in self.operators))

    def us(self, *kinds: Kind) -> float:
        return float(sum(o.median_us for o in self.operators if o.kind in kinds))

    def share(self, us: float) -> float:
        return us / self.total_us if self.total_us else 0.0


def profile_files(paths: tuple[Path, ...], inputs: np.ndarray, threads: int) -> list[Profile]:
    """Every file as onnxruntime optimises it for this processor, timed in turns on `inputs`, (N, ...).

    The optimised graph is saved, its nodes are numbered, and it is run as it stands: so each time belongs to one node.
    Raises ModelError if onnxruntime does not load a file, or not what it made of it.
    """
    with TemporaryDirectory(prefix="edgekd-") as folder:
        graphs = [optimised(path, Path(folder, f"{i}.onnx"), threads) for i, path in enumerate(paths)]
        sessions = [opened(Path(folder, f"{i}.onnx"), threads) for i in range(len(paths))]
        calls = calls_for(sessions, inputs)
        with progress.progress_bar("time of each operator", BLOCKS) as advance:
            for block in range(BLOCKS + 1):  # the first one warms up
                for session in sessions:
                    time.sleep(PAUSE_S if threads != 1 else 0)
                    run(session, inputs, block * calls, DISCARDED + calls)
                advance(1 if block else 0)
        events = [json.loads(Path(session.end_profiling()).read_text()) for session in sessions]
    return [read(*each, calls) for each in zip(paths, graphs, events, strict=True)]


def optimised(path: Path, target: Path, threads: int) -> onnx.GraphProto:
    """What onnxruntime executes for `path`; it lies in `target` with numbers for names. It fits this processor only."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # of what it writes to disk, it warns that it fits this processor only
    options.intra_op_num_threads = threads
    options.optimized_model_filepath = str(target)
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnx_session.ort_errors() as error:
        raise ModelError(
            f"onnxruntime {ort.__version__} does not load `{path}`: {' '.join(str(error).split())}",
            hint="lower the opset, or update onnxruntime; a file for TensorRT: --target jetson",
        ) from error
    model = onnx.load(str(target))
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    for index, node in enumerate(model.graph.node):
        node.name = str(index)
    onnx.save(model, str(target))
    return graph


def opened(path: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnx_session.ort_errors() as error:
        raise ModelError(
            f"onnxruntime {ort.__version__} does not load what it made of the file: {' '.join(str(error).split())}",
            hint="report it with the file",
        ) from error


def calls_for(sessions: list[Any], inputs: np.ndarray) -> int:
    """How many calls of a block take about as long as they shall."""
    fastest_s = 0.0
    for session in sessions:
        took = []
        for i in range(TRIED):
            started = time.perf_counter()
            run(session, inputs, i, 1)
            took.append(time.perf_counter() - started)
        fastest_s = max(fastest_s, min(took))
    return int(np.clip(SECONDS / BLOCKS / fastest_s, *CALLS))


def run(session: Any, inputs: np.ndarray, first: int, calls: int) -> None:
    value = session.get_inputs()[0]
    batch = value.shape[0] if isinstance(value.shape[0], int) else 1
    for i in range(first, first + calls):
        x = np.take(inputs, range(i * batch, (i + 1) * batch), axis=0, mode="wrap")
        session.run(None, {value.name: x})


def read(path: Path, graph: onnx.GraphProto, events: list[dict[str, Any]], calls: int) -> Profile:
    """The profile that onnxruntime wrote for an optimised graph whose nodes are called by their numbers."""
    runs = sum(event["name"] == "model_run" for event in events)
    spent: dict[str, list[int]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"])
    names = original_names(path, graph)
    operators = []
    for index, (node, kind) in enumerate(zip(graph.node, kinds(graph, names), strict=True)):
        us = np.array(spent.get(str(index), [0] * runs), float)
        us = us.reshape(runs, -1).sum(1) if len(us) % runs == 0 else np.full(runs, us.sum() / runs)
        timed = us[-BLOCKS * (DISCARDED + calls) :].reshape(BLOCKS, -1)[:, DISCARDED:]
        blocks = np.sort(timed, axis=1)
        middle = blocks[:, calls // 4 : calls - calls // 4].mean(1)  # the clock counts whole microseconds
        operators.append(Operator(names[index], node.op_type, kind, middle))
    return Profile(graph, tuple(operators))


def original_names(path: Path, graph: onnx.GraphProto) -> list[str]:
    """For every node of the optimised graph, the node of the file that it comes from; "" for one of onnxruntime's own.

    Blocked convolutions are called after their output, which may be that of an activation that they took up.
    """
    model = inspect.load(path)
    names = {node.name for node in model.graph.node if node.name}
    makers = {name: node for node in model.graph.node for name in node.output}
    originals = []
    for node in graph.node:
        name = MARKS.sub("", node.name)
        if name not in names:
            maker = makers.get(name) or next((makers[o] for o in node.output if o in makers), None)
            while maker and maker.op_type != node.op_type and maker.input and maker.input[0] in makers:
                maker = makers[maker.input[0]]
            name = maker.name or maker.output[0] if maker and maker.op_type == node.op_type else ""
        originals.append(name)
    return originals


def kinds(graph: onnx.GraphProto, names: list[str]) -> list[Kind]:
    """What each node of an optimised graph is to a quantized network; shape arithmetic counts as float."""
    eight = {tensor.name for tensor in graph.initializer if tensor.data_type in EIGHT}
    eight |= {value.name for value in graph.input if value.type.tensor_type.elem_type in EIGHT}
    result: list[Kind] = []
    for node, name in zip(graph.node, names, strict=True):
        op, reads = node.op_type, bool(node.input) and node.input[0] in eight
        integer_op = op.startswith("QLinear") or op in INTEGER
        if op in QDQ_OPS:
            result.append("pairs")
        elif op in REORDERS or (op == "Transpose" and not name):
            result.append("layout")
        else:
            result.append("integer" if integer_op or reads else "float")
        to_float = op in TO_FLOAT or (op == "QGemm" and len(node.input) < 8)  # without a scale of its output
        if op == "DynamicQuantizeLinear":
            eight.add(node.output[0])
        elif op == "QuantizeLinear" or (integer_op and not to_float and not op.endswith("Integer")):
            eight.update(node.output)
        elif reads and op not in TO_FLOAT and not integer_op and op != "Cast":
            eight.update(node.output)  # it moves or compares integers
    return result
