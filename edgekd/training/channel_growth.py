"""Find the layers of any module that share channels, and add channels without changing trained parameters.

The module is run (as in `layer_discovery`), since a user's forward may branch on sizes, which a symbolic trace cannot
follow. Every operation either keeps the channels of its inputs (dimension 1), and so ties them, or computes new
ones (a convolution, a linear layer), or is not understood, which fixes them. The remaining groups are verified: each is
grown in a copy with random weights, whose outputs must not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from edgekd.core.plugins import unknown_name
from edgekd.errors import ConfigError
from edgekd.training.architecture_diff import layer_channels, resize_layer
from edgekd.training.layer_discovery import iterate_tensors

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
NOISE = 0.1  # standard deviation, on the weights of a copy that is tried
TOLERANCE = 1e-4  # relative: sums of more terms round differently


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that must grow together, by dotted path: those that compute, and those that read, the same channels."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    fixed: str = ""  # the reason why it cannot grow; empty if it can

    @property
    def name(self) -> str:
        """The path of the first producer."""
        return self.producers[0]

    def channels(self, network: nn.Module) -> int:
        """Return the number of channels in a network."""
        return dict(layer_channels(network))[self.name][1]


class ChannelSpace:
    """The channels that some tensors share; spaces that are tied become one."""

    def __init__(self, channels: int) -> None:
        self.channels, self.fixed = channels, ""
        self.merged_into: ChannelSpace | None = None

    def root(self) -> ChannelSpace:
        return self if self.merged_into is None else self.merged_into.root()

    def tie(self, other: ChannelSpace) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b.merged_into, a.fixed = a, a.fixed or b.fixed

    def fix(self, reason: str) -> None:
        self.root().fixed = self.root().fixed or reason


class ChannelTracer(TorchFunctionMode):
    """Traces every operation of a forward pass: which tensors and layers share channels."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.modules = {path: m for path, m in network.named_modules() if isinstance(m, LAYERS)}
        self.paths = {
            id(t): path for path, m in self.modules.items() for t in (*m.parameters(False), *m.buffers(False))
        }
        self.spaces: dict[int, ChannelSpace] = {}  # by the id of a tensor
        self.alive: list[Tensor] = []  # an id is only unique among tensors that live
        self.consumers: dict[str, ChannelSpace] = {}  # by path, in order of execution
        self.producers: dict[str, ChannelSpace] = {}
        self.put(images, ChannelSpace(images.shape[1])).fix("they are those of the images")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = list(iterate_tensors([args, kwargs or {}])), list(iterate_tensors(result))
        if any(id(t) in self.spaces for t in inputs):
            name = getattr(func, "__name__", "an operation")
            path = next((self.paths[id(t)] for t in inputs if id(t) in self.paths), None)
            if path and name in ("conv2d", "linear", "batch_norm"):
                self.trace_layer(path, self.spaces[id(inputs[0])], inputs[0], outputs[0])
            else:
                self.trace_operation(name, inputs, outputs)
        return result

    def put(self, tensor: Tensor, space: ChannelSpace) -> ChannelSpace:
        self.spaces[id(tensor)] = space
        self.alive.append(tensor)
        return space

    def trace_layer(self, path: str, space: ChannelSpace, x: Tensor, output: Tensor) -> None:
        """Trace a layer; one that runs twice ties its inputs, and its outputs."""
        module = self.modules[path]
        carries = isinstance(module, nn.BatchNorm2d) or depthwise(module)
        output_space = self.put(output, space if carries else ChannelSpace(output.shape[1]))
        self.consumers.setdefault(path, space).tie(space)
        self.producers.setdefault(path, output_space).tie(output_space)
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise(module):
            reason = f"`{path}` is a convolution in {module.groups} groups"
        elif isinstance(module, nn.Linear) and x.ndim != 2:
            reason = f"`{path}` is a linear layer of more than two dimensions"
        else:
            if space.channels == 1:
                space.fix(f"`{path}` takes one channel, where a depthwise convolution looks like any other")
            return
        space.fix(reason)
        output_space.fix(reason)

    def trace_operation(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Trace an operation: tie inputs and outputs with the same channels (or one, broadcast), else fix them."""
        spaces = [self.spaces[id(t)] for t in inputs if id(t) in self.spaces]
        widest = max(spaces, key=lambda space: space.channels)
        alike = all(space.channels in (1, widest.channels) for space in spaces)
        alike &= all(id(t) in self.spaces or t.numel() == 1 for t in inputs)
        for output in outputs:
            if alike and output.ndim > 1 and output.shape[1] == widest.channels:
                self.put(output, widest)
            else:
                alike = False
                self.put(output, ChannelSpace(output.shape[1] if output.ndim > 1 else 1)).fix(
                    f"they come from `{name}`"
                )
        for space in spaces:
            if not alike:
                space.fix(f"`{name}` mixes or divides them")
            elif space.channels == widest.channels:
                widest.tie(space)


def depthwise(module: nn.Module) -> bool:
    """Return whether a module is a depthwise convolution."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


@torch.no_grad()
def find_groups(network: nn.Module, x: Tensor) -> list[ChannelGroup]:
    """Return all groups of a network, in order of execution; what cannot grow says why.

    `x` are images, (N, C, H, W); the network is in eval mode, and stays as it is.
    """
    tracer = ChannelTracer(network, x)
    with tracer:
        output = network(x)
    for tensor in iterate_tensors(output):
        if id(tensor) in tracer.spaces:
            tracer.spaces[id(tensor)].fix("they are the output")
    roots = dict.fromkeys(space.root() for space in tracer.producers.values())
    groups = []
    for root in roots:
        producers, consumers = (
            tuple(path for path, space in side.items() if space.root() is root)
            for side in (tracer.producers, tracer.consumers)
        )
        group = ChannelGroup(producers, consumers, root.fixed)
        groups.append(group if group.fixed else replace(group, fixed=why_not_growable(network, group, x)))
    return groups


def why_not_growable(network: nn.Module, group: ChannelGroup, x: Tensor) -> str:
    """Return the reason why a group cannot grow, by trying; empty if it can."""
    trial = copy.deepcopy(network)
    for parameter in trial.parameters():  # weights of zero would hide a mistake
        parameter.add_(NOISE * torch.randn_like(parameter))
    expected = trial(x)
    try:
        actual = grow_group(trial, group, 1)(x)
    except (RuntimeError, ValueError, AssertionError) as error:
        return f"the network does not run with more of them ({str(error).splitlines()[0][:120]})"
    tolerance = TOLERANCE * expected.abs().max().item()
    return (
        ""
        if actual.shape == expected.shape and torch.allclose(actual, expected, 0, tolerance)
        else "more of them change the output"
    )


def group_of_layer(groups: list[ChannelGroup], layer: str) -> ChannelGroup:
    """Return the group that a layer computes. Raise ConfigError if there is no such layer, or it cannot grow."""
    group = next((g for g in groups if layer in g.producers), None)
    if group is None:
        raise unknown_name(
            f"the student has no layer `{layer}` with channels", layer, [p for g in groups for p in g.producers]
        )
    if group.fixed:
        growable = [g.name for g in groups if not g.fixed]
        raise ConfigError(
            f"the channels of `{layer}` cannot grow: {group.fixed}",
            hint=f"choose among {', '.join(growable)}" if growable else "use a student of plain convolutions",
        )
    return group


def grow_group(network: nn.Module, group: ChannelGroup, count: int) -> nn.Module:
    """Return a copy of `network` with `count` more channels in a group, which have no effect yet. All else is frozen.

    `new_modules` returns the new parts; `merge_growth` turns the grown layers into plain ones.
    """
    grown = copy.deepcopy(network).requires_grad_(False)
    for path in dict.fromkeys((*group.producers, *group.consumers)):
        layer = grown.get_submodule(path)
        grown_layer = (
            GrownNorm(layer, count)
            if isinstance(layer, nn.BatchNorm2d)
            else GrownLayer(layer, count * (path in group.consumers), count * (path in group.producers))
        )
        replace_module(grown, path, grown_layer)
    return grown.eval()


def new_modules(network: nn.Module) -> tuple[nn.Module, ...]:
    """Return the new parts of a grown network, which a step trains."""
    return tuple(m.new for m in network.modules() if isinstance(m, (GrownLayer, GrownNorm)))


@torch.no_grad()
def merge_growth(network: nn.Module) -> nn.Module:
    """Return a copy of a grown network, of plain layers."""
    merged = copy.deepcopy(network)
    for path, module in list(merged.named_modules()):
        if isinstance(module, (GrownLayer, GrownNorm)):
            replace_module(merged, path, module.merged())
    return merged


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


class GrownLayer(nn.Module):
    """A convolution or linear layer with more channels: old weights are frozen, and concatenated with new ones to run.

    Weights from new channels to old ones start at zero, those of new channels as torch initialises them.
    """

    def __init__(self, layer: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        ((_, (width, height)),) = layer_channels(layer)
        old = layer.state_dict()
        self.wide = (
            resize_layer(layer, width + in_channels, height + out_channels).to(old["weight"]).requires_grad_(False)
        )
        weight = self.wide.state_dict()["weight"]
        self.old = nn.ParameterDict(old).requires_grad_(False)
        self.new = nn.ParameterDict()
        if in_channels and not depthwise(layer):
            self.new["columns"] = torch.zeros_like(weight[:height, width:])
        if out_channels:
            self.new["rows"] = weight[height:].clone()
            if "bias" in old:
                self.new["bias"] = self.wide.state_dict()["bias"][height:].clone()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state dict of the wide layer."""
        state = dict(self.old.items())
        for key, name, dim in (("weight", "columns", 1), ("weight", "rows", 0), ("bias", "bias", 0)):
            if name in self.new:
                state[key] = torch.cat([state[key], self.new[name]], dim)
        return state

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = functional_call(self.wide, self.tensors(), (x,))
        return output

    def merged(self) -> nn.Module:
        self.wide.load_state_dict(self.tensors())
        return self.wide


class GrownNorm(nn.Module):
    """A BatchNorm with more channels: old ones keep their statistics, new ones collect theirs."""

    def __init__(self, layer: nn.BatchNorm2d, count: int) -> None:
        super().__init__()
        width = layer.num_features
        device = next((tensor.device for tensor in layer.state_dict().values()), None)
        self.old, self.new = layer, resize_layer(layer, count, count).to(device)
        self.wide = resize_layer(layer, width + count, width + count).to(device).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        width = self.old.num_features
        return torch.cat([self.old(x[:, :width]), self.new(x[:, width:])], 1)

    def merged(self) -> nn.Module:
        new = self.new.state_dict()
        state = {key: torch.cat([t, new[key]]) if t.ndim else t for key, t in self.old.state_dict().items()}
        self.wide.load_state_dict(state)
        return self.wide
