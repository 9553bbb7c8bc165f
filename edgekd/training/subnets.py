"""Sub-networks of several depths inside of one network: the same weights, fewer of each stage's repeated blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.training.architecture_diff import CHAINS
from edgekd.training.batchnorm import norms
from edgekd.utils.external import foreign

Depth: TypeAlias = tuple[int, ...]  # blocks that are left of each stage


@dataclass(frozen=True)
class Stage:
    """An nn.Sequential, or an nn.ModuleList run in a loop, that ends in blocks which can be skipped."""

    path: str
    blocks: int
    least: int  # the first blocks, which must stay

    def end(self, network: nn.Module) -> str:
        """The path of the last block that `network` has of this stage."""
        names = [name for name, _ in network.get_submodule(self.path).named_children()]
        return f"{self.path}.{names[-1]}".lstrip(".")


def stages(network: nn.Module, x: Tensor) -> list[Stage]:
    """The stages of a network that is in eval mode; `x` is a batch for it.

    A stage inside of another one's blocks is a part of them. At least one block of each stage stays.
    """
    calls = runs(network, x)
    found: list[Stage] = []
    inner: set[nn.Module] = set()
    for path, module in network.named_modules():
        if not isinstance(module, CHAINS) or module in inner:
            continue
        least = len(module)
        while least > 1 and skippable(module, least - 1, calls):
            least -= 1
        while least < len(module) and not removable(network, path, least, x[:1]):
            least += 1
        if least < len(module):
            found.append(Stage(path, len(module), least))
            inner.update(module.modules())
    return found


@torch.no_grad()
def runs(network: nn.Module, x: Tensor) -> dict[nn.Module, tuple[Tensor, Any]]:
    """What enters and leaves each module that takes one map (N, C, H, W) and nothing else, once."""
    seen: dict[nn.Module, tuple[Tensor, Any]] = {}
    ran: set[nn.Module] = set()

    def see(module: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        seen.pop(module, None)
        if module not in ran and len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4:
            seen[module] = args[0], made
        ran.add(module)

    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in network.modules()]
    try:
        network(x)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


@torch.no_grad()
def skippable(stage: nn.Sequential | nn.ModuleList, number: int, calls: Mapping[nn.Module, tuple[Tensor, Any]]) -> bool:
    """Whether a child of `stage` is a residual block, one of several of its class, that keeps the shape of its map.

    The map is what the child before it made, as it is. Residual is what passes its input on when all its weights are
    zero; that is seen by running it, not in its code.
    """
    before, block = stage[number - 1], stage[number]
    repeated = sum(type(other) is type(block) for other in stage) > 1
    composite = any(True for _ in block.children()) and not isinstance(block, CHAINS)
    chained = before in calls and block in calls and calls[before][1] is calls[block][0]
    if not (repeated and composite and chained):
        return False
    x, silent = calls[block][0], copy.deepcopy(block)
    for weight in silent.parameters():
        weight.zero_()
    made, other = silent(x), silent(x + 1)
    return isinstance(made, Tensor) and made.shape == x.shape and not torch.equal(made, other)


@torch.no_grad()
def removable(network: nn.Module, path: str, left: int, x: Tensor) -> bool:
    """Whether a network without the children of `path` behind the first `left` answers as if they passed their map on.

    Not so where its code counts on their number, or reads what a certain one makes.
    """
    passed = cut(network, {}, share(network))
    stage = passed.get_submodule(path)
    assert isinstance(stage, CHAINS)
    for number in range(left, len(stage)):
        stage[number] = nn.Identity()
    try:
        with foreign("the network does not run without its last blocks", "keep them"):
            want, got = passed(x), cut(network, {path: left}, share(network))(x)
    except ConfigError:
        return False
    return isinstance(got, Tensor) and isinstance(want, Tensor) and torch.equal(got, want)


def share(network: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which takes what is in it as it is: all tensors of `network`."""
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}


def cut(network: nn.Module, lengths: Mapping[str, int], memo: dict[int, Any]) -> nn.Module:
    """A copy with only the first children of some stages, by path."""
    made = copy.deepcopy(network, memo)
    for path, length in lengths.items():
        stage = made.get_submodule(path)
        assert isinstance(stage, CHAINS)
        del stage[length:]
    return made


def spread(found: list[Stage], count: int) -> list[Depth]:
    """Up to `count` depths below the full one: the shallowest, and others at even distances in every stage."""
    steps = [tuple(s.least + (s.blocks - s.least) * step // count for s in found) for step in range(count)]
    return list(dict.fromkeys(steps))


@dataclass(frozen=True, eq=False)
class SubNet:
    """A part of a network, as a module of its own that holds the very weights of the whole."""

    depth: Depth
    module: nn.Module
    own: nn.Module  # holds those tensors that it does not share, to be trained and saved with the whole

    @property
    def name(self) -> str:
        return "depth-" + "-".join(map(str, self.depth))

    def alone(self) -> nn.Module:
        """A copy that shares nothing."""
        return copy.deepcopy(self.module)


def subnet(whole: nn.Module, found: list[Stage], depth: Depth, private: bool) -> SubNet:
    """`whole` with only the first blocks of each stage.

    It keeps its own statistics of every BatchNorm. With `private`, the scales and shifts are its own, too.
    """
    shared = share(whole)
    for norm in norms(whole):
        for tensor in (*norm.buffers(), *(norm.parameters() if private else ())):
            del shared[id(tensor)]
    common = set(shared)
    module = cut(whole, {stage.path: blocks for stage, blocks in zip(found, depth, strict=True)}, shared)
    own = nn.Module()
    for name, weight in module.named_parameters():
        if id(weight) not in common:
            own.register_parameter(name.replace(".", "-"), weight)
    for name, buffer in module.named_buffers():
        if id(buffer) not in common:
            own.register_buffer(name.replace(".", "-"), buffer)
    return SubNet(depth, module, own)
