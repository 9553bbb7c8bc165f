"""A small valid network, to be spoilt."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def network(nodes=None, inputs=None, outputs=None, tensors=None, opset=17, functions=(), domains=()):
    """(1, 3, 8, 8) to (1, 4) unless parts are given; valid then, and quantizable."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((4, 3, 3, 3), np.float32), "v": random.standard_normal((4, 4), np.float32)}
    nodes = nodes or [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("ReduceMean", ["b"], ["c"], "mean", axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["c", "v"], ["y"], "matmul"),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in weights.items()] if tensors is None else tensors
    inputs = [value("x", [1, 3, 8, 8])] if inputs is None else inputs
    outputs = [value("y", [1, 4])] if outputs is None else outputs
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))


def changed(change):
    """The valid network, but for what `change` does to it."""
    model = network()
    change(model)
    return model
