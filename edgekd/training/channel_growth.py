"""Find the layers of any module that share their channels, and give them more without touching what they have learnt.

Layers are found by running the module (as in `layers`), since a foreign forward may branch on sizes, which a symbolic
trace cannot follow. Every operation either keeps the channels of its inputs (dimension 1), and so ties them together,
or makes new ones (a convolution, a linear layer), or is not understood, which fixes them. What is left is proven: each
group is grown in a copy with random weights, whose answers must stay.
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

from edgekd.core.plugins import unknown
from edgekd.errors import ConfigError
from edgekd.training.architecture_diff import resized, sizes
from edgekd.training.layer_discovery import tensors

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
NOISE = 0.1  # standard deviation, on the weights of a copy that is tried
TOLERANCE = 1e-4  # of an answer that must stay: sums of more terms are rounded otherwise


@dataclass(frozen=True)
class Group:
    """Layers that must grow together: the dotted paths of those that give, and that take, the same channels."""

    leaving: tuple[str, ...]
    entering: tuple[str, ...]
    fixed: str = ""  # why it cannot grow; empty if it can

    @property
    def name(self) -> str:
        return self.leaving[0]

    def channels(self, network: nn.Module) -> int:
        return dict(sizes(network))[self.name][1]


class Space:
    """The channels that some tensors share; several spaces become one when they are tied."""

    def __init__(self, channels: int) -> None:
        self.channels, self.fixed = channels, ""
        self.joined: Space | None = None

    def root(self) -> Space:
        return self if self.joined is None else self.joined.root()

    def tie(self, other: Space) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b.joined, a.fixed = a, a.fixed or b.fixed

    def fix(self, why: str) -> None:
        self.root().fixed = self.root().fixed or why


class Following(TorchFunctionMode):
    """Follows every operation of a forward pass, and which tensors and layers share their channels."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.modules = {path: m for path, m in network.named_modules() if isinstance(m, LAYERS)}
        self.paths = {
            id(t): path for path, m in self.modules.items() for t in (*m.parameters(False), *m.buffers(False))
        }
        self.spaces: dict[int, Space] = {}  # by the id of a tensor
        self.alive: list[Tensor] = []  # an id is only unique among tensors that live
        self.entering: dict[str, Space] = {}  # by path, in order of execution
        self.leaving: dict[str, Space] = {}
        self.put(x, Space(x.shape[1])).fix("they are those of the images")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs, outputs = list(tensors([args, kwargs or {}])), list(tensors(made))
        if any(id(t) in self.spaces for t in inputs):
            name = getattr(func, "__name__", "an operation")
            path = next((self.paths[id(t)] for t in inputs if id(t) in self.paths), None)
            if path and name in ("conv2d", "linear", "batch_norm"):
                self.layer(path, self.spaces[id(inputs[0])], inputs[0], outputs[0])
            else:
                self.operation(name, inputs, outputs)
        return made

    def put(self, tensor: Tensor, space: Space) -> Space:
        self.spaces[id(tensor)] = space
        self.alive.append(tensor)
        return space

    def layer(self, path: str, space: Space, x: Tensor, made: Tensor) -> None:
        """A layer that runs twice ties what it reads, and what it makes."""
        module = self.modules[path]
        carries = isinstance(module, nn.BatchNorm2d) or depthwise(module)
        leaving = self.put(made, space if carries else Space(made.shape[1]))
        self.entering.setdefault(path, space).tie(space)
        self.leaving.setdefault(path, leaving).tie(leaving)
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise(module):
            why = f"`{path}` is a convolution in {module.groups} groups"
        elif isinstance(module, nn.Linear) and x.ndim != 2:
            why = f"`{path}` is a linear layer of more than two dimensions"
        else:
            if space.channels == 1:
                space.fix(f"`{path}` takes one channel, where a depthwise convolution looks like any other")
            return
        space.fix(why)
        leaving.fix(why)

    def operation(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Ties what it reads and makes if all has the same channels, or one that is broadcast; else fixes them."""
        known = [self.spaces[id(t)] for t in inputs if id(t) in self.spaces]
        most = max(known, key=lambda space: space.channels)
        alike = all(space.channels in (1, most.channels) for space in known)
        alike &= all(id(t) in self.spaces or t.numel() == 1 for t in inputs)
        for made in outputs:
            if alike and made.ndim > 1 and made.shape[1] == most.channels:
                self.put(made, most)
            else:
                alike = False
                self.put(made, Space(made.shape[1] if made.ndim > 1 else 1)).fix(f"they come from `{name}`")
        for space in known:
            if not alike:
                space.fix(f"`{name}` mixes or divides them")
            elif space.channels == most.channels:
                most.tie(space)


def depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


@torch.no_grad()
def groups(network: nn.Module, x: Tensor) -> list[Group]:
    """All groups of a network, in order of execution; what cannot grow says why.

    `x` are images, (N, C, H, W); the network is in eval mode, and stays as it is.
    """
    mode = Following(network, x)
    with mode:
        answer = network(x)
    for tensor in tensors(answer):
        if id(tensor) in mode.spaces:
            mode.spaces[id(tensor)].fix("they are the answer")
    roots = dict.fromkeys(space.root() for space in mode.leaving.values())
    found = []
    for root in roots:
        leaving, entering = (
            tuple(path for path, space in side.items() if space.root() is root)
            for side in (mode.leaving, mode.entering)
        )
        group = Group(leaving, entering, root.fixed)
        found.append(group if group.fixed else replace(group, fixed=fault(network, group, x)))
    return found


def fault(network: nn.Module, group: Group, x: Tensor) -> str:
    """Why a group cannot grow after all, found by trying; empty if it can."""
    trial = copy.deepcopy(network)
    for parameter in trial.parameters():  # weights of zero would hide a mistake
        parameter.add_(NOISE * torch.randn_like(parameter))
    want = trial(x)
    try:
        got = grown(trial, group, 1)(x)
    except (RuntimeError, ValueError, AssertionError) as error:
        return f"the network does not run with more of them ({str(error).splitlines()[0][:120]})"
    near = TOLERANCE * want.abs().max().item()
    return "" if got.shape == want.shape and torch.allclose(got, want, 0, near) else "more of them change the answer"


def named(found: list[Group], layer: str) -> Group:
    """The group whose channels a layer gives. Raises ConfigError if there is no such layer, or it cannot grow."""
    group = next((g for g in found if layer in g.leaving), None)
    if group is None:
        raise unknown(f"the student has no layer `{layer}` with channels", layer, [p for g in found for p in g.leaving])
    if group.fixed:
        able = [g.name for g in found if not g.fixed]
        raise ConfigError(
            f"the channels of `{layer}` cannot grow: {group.fixed}",
            hint=f"choose among {', '.join(able)}" if able else "use a student of plain convolutions",
        )
    return group


def grown(network: nn.Module, group: Group, count: int) -> nn.Module:
    """A copy of `network` with `count` more channels in a group, which have no effect yet. All else is frozen.

    What the channels bring along is in `planted`; `merged` makes plain layers of it.
    """
    made = copy.deepcopy(network).requires_grad_(False)
    for path in dict.fromkeys((*group.leaving, *group.entering)):
        layer = made.get_submodule(path)
        wider = (
            GrownNorm(layer, count)
            if isinstance(layer, nn.BatchNorm2d)
            else GrownLayer(layer, count * (path in group.entering), count * (path in group.leaving))
        )
        put(made, path, wider)
    return made.eval()


def planted(network: nn.Module) -> tuple[nn.Module, ...]:
    """What is new in a grown network: all that a step may train."""
    return tuple(m.new for m in network.modules() if isinstance(m, (GrownLayer, GrownNorm)))


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A copy of a grown network, of plain layers."""
    made = copy.deepcopy(network)
    for path, module in list(made.named_modules()):
        if isinstance(module, (GrownLayer, GrownNorm)):
            put(made, path, module.merged())
    return made


def put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


class GrownLayer(nn.Module):
    """A convolution or linear layer with more channels: old weights are frozen, and only joined with new ones to run.

    Weights from new channels to old ones begin at zero, those into new channels as torch draws them.
    """

    def __init__(self, layer: nn.Module, entering: int, leaving: int) -> None:
        super().__init__()
        ((_, (width, height)),) = sizes(layer)
        old = layer.state_dict()
        self.wide = resized(layer, width + entering, height + leaving).to(old["weight"]).requires_grad_(False)
        weight = self.wide.state_dict()["weight"]
        self.old = nn.ParameterDict(old).requires_grad_(False)
        self.new = nn.ParameterDict()
        if entering and not depthwise(layer):
            self.new["columns"] = torch.zeros_like(weight[:height, width:])
        if leaving:
            self.new["rows"] = weight[height:].clone()
            if "bias" in old:
                self.new["bias"] = self.wide.state_dict()["bias"][height:].clone()

    def tensors(self) -> dict[str, Tensor]:
        """The state of the wide layer."""
        made = dict(self.old.items())
        for key, name, dim in (("weight", "columns", 1), ("weight", "rows", 0), ("bias", "bias", 0)):
            if name in self.new:
                made[key] = torch.cat([made[key], self.new[name]], dim)
        return made

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = functional_call(self.wide, self.tensors(), (x,))
        return made

    def merged(self) -> nn.Module:
        self.wide.load_state_dict(self.tensors())
        return self.wide


class GrownNorm(nn.Module):
    """A BatchNorm with more channels: old ones keep their statistics, new ones gather theirs."""

    def __init__(self, layer: nn.BatchNorm2d, count: int) -> None:
        super().__init__()
        width = layer.num_features
        device = next((tensor.device for tensor in layer.state_dict().values()), None)
        self.old, self.new = layer, resized(layer, count, count).to(device)
        self.wide = resized(layer, width + count, width + count).to(device).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        width = self.old.num_features
        return torch.cat([self.old(x[:, :width]), self.new(x[:, width:])], 1)

    def merged(self) -> nn.Module:
        new = self.new.state_dict()
        state = {key: torch.cat([t, new[key]]) if t.ndim else t for key, t in self.old.state_dict().items()}
        self.wide.load_state_dict(state)
        return self.wide
