"""A network as a graph of elementary operations on its parameters, for methods that change single operations.

torch.export traces it, so that a user's code needs no change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from edgekd.errors import ConfigError

aten = torch.ops.aten
CONV, LINEAR, PRODUCT = aten.convolution.default, aten.linear.default, aten.mm.default
NORM = aten._native_batch_norm_legit_no_training.default


class ExportedGraph:
    """The elementary operations of a network in eval mode, on its live parameters; BatchNorms are folded."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        """Raise ConfigError if torch cannot trace the network."""
        try:
            program = trace_network(network, images)
        except (RuntimeError, TypeError, ValueError) as error:
            cause = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ConfigError(
                f"torch cannot trace `{type(network).__name__}`: {cause}",
                hint="forward() must take one image batch and have no branch that depends on the values of tensors",
            ) from error
        self.network, self.program = network, program
        self.nodes = list(program.graph.nodes)
        self.output = next(n for n in self.nodes if n.name == program.graph_signature.user_outputs[0])
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self.dependent = set(self.dependent_nodes())
        self.kernels = {n: axis for n in self.nodes if (axis := self.axis(n)) is not None}  # weighted -> channel axis
        self.folds = {
            n.args[0]: n
            for n in self.nodes
            if n.target is NORM and n.args[0] in self.kernels and len(n.args[0].users) == 1
        }

    def dependent_nodes(self) -> Iterator[fx.Node]:
        """Yield the nodes that depend on the image."""
        dependent: set[fx.Node] = set()
        for node in self.nodes:
            spec = self.specs.get(node.name)
            image = spec is not None and spec.kind is InputKind.USER_INPUT
            if image or dependent & set(node.all_input_nodes):
                dependent.add(node)
                yield node

    def axis(self, node: fx.Node) -> int | None:
        """Return the output-channel dimension of the weight of a weighted operation; None for any other."""
        if node.target not in (CONV, LINEAR, PRODUCT) or node.args[1] in self.dependent:
            return None
        return 1 if node.target is PRODUCT or (node.target is CONV and node.args[6]) else 0

    def run(
        self,
        x: Tensor,
        read: Callable[[fx.Node, fx.Node, Tensor], Tensor] = lambda source, reader, value: value,
        weigh: Callable[[fx.Node, Any], Any] = lambda node, args: args,
    ) -> dict[fx.Node, Any]:
        """Return the value of every node. `read` changes the inputs of an operation, `weigh` the folded arguments."""
        values: dict[fx.Node, Any] = {}
        normed = {norm: node for node, norm in self.folds.items()}
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = x if node in self.dependent else self.tensor(node.name)
            elif node.op == "get_attr":
                values[node] = attrgetter(str(node.target))(self.program.graph_module)
            elif node in normed:
                values[node] = (values[normed[node]],)
            elif node.op == "call_function":

                def value(source: fx.Node, reader: fx.Node = node) -> Any:
                    return read(source, reader, values[source]) if source in self.dependent else values[source]

                args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
                if node in self.kernels:
                    args = weigh(node, self.folded(node, args, values))
                # a view of what a trace with another memory format called a view
                call: Any = torch.reshape if node.target is aten.view.default else node.target
                values[node] = call(*args, **kwargs)
        return values

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of a placeholder."""
        target = str(self.specs[name].target)
        constants = self.program.constants
        value: Tensor = constants[target] if target in constants else attrgetter(target)(self.network)
        return value

    def folded(self, node: fx.Node, args: Any, values: dict[fx.Node, Any]) -> tuple[Any, ...]:
        """Return the arguments of a weighted operation, its BatchNorm folded: input, weight, perhaps bias ..."""
        if node not in self.folds:
            return tuple(args)
        x, weight, bias, *rest = (*args, None) if len(args) == 2 else args
        gamma, beta, mean, variance = (n and values[n] for n in self.folds[node].args[1:5])
        factor = (variance + self.folds[node].args[6]).rsqrt() * (1 if gamma is None else gamma)
        shift = (-mean if bias is None else bias - mean) * factor
        shape = [1] * weight.ndim
        shape[self.kernels[node]] = -1
        return x, weight * factor.reshape(shape), shift if beta is None else shift + beta, *rest


def trace_network(network: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """Trace a network into core operations, for any batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code; what matters raises
        program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        decomposed: torch.export.ExportedProgram = program.run_decompositions(decompositions())
        return decomposed


def decompositions() -> Any:
    """torch's decompositions, except for operations that ONNX has as a whole."""
    table: Any = torch.export.default_decompositions()
    for whole in (LINEAR, aten.hardsigmoid.default):
        table.pop(whole)
    table[aten.hardswish.default] = lambda x: x * aten.hardsigmoid.default(x)
    return table
