"""Sub-networks of several depths inside of one network: the same weights, fewer of each stage's repeated blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.learn.norms import norms

Depth: TypeAlias = tuple[int, ...]  # blocks that are left of each stage


@dataclass(frozen=True)
class Stage:
    """An nn.Sequential that ends in blocks which can be skipped."""

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
    entering = inputs(network, x)
    found: list[Stage] = []
    inner: set[nn.Module] = set()
    for path, module in network.named_modules():
        if not isinstance(module, nn.Sequential) or module in inner:
            continue
        least = len(module)
        while least > 1 and skippable(module, least - 1, entering):
            least -= 1
        if least < len(module):
            found.append(Stage(path, len(module), least))
            inner.update(module.modules())
    return found


@torch.no_grad()
def inputs(network: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """What enters each module that takes one map (N, C, H, W) and nothing else."""
    seen: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4:
            seen[module] = args[0]

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in network.modules()]
    try:
        network(x)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


@torch.no_grad()
def skippable(stage: nn.Sequential, number: int, entering: dict[nn.Module, Tensor]) -> bool:
    """Whether a child of `stage` is a residual block, one of several of its class, that keeps the shape of its map.

    Residual is what passes its input on when all its weights are zero; that is seen by running it, not in its code.
    """
    block = stage[number]
    repeated = sum(type(other) is type(block) for other in stage) > 1
    composite = any(True for _ in block.children()) and not isinstance(block, nn.Sequential)
    if block not in entering or not repeated or not composite:
        return False
    x, silent = entering[block], copy.deepcopy(block)
    for weight in silent.parameters():
        weight.zero_()
    made, other = silent(x), silent(x + 1)
    return isinstance(made, Tensor) and made.shape == x.shape and not torch.equal(made, other)


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
    shared = {id(tensor): tensor for tensor in (*whole.parameters(), *whole.buffers())}
    for norm in norms(whole):
        for tensor in (*norm.buffers(), *(norm.parameters() if private else ())):
            del shared[id(tensor)]
    common = set(shared)
    module = copy.deepcopy(whole, shared)  # deepcopy takes what is in its memo as it is
    for stage, blocks in zip(found, depth, strict=True):
        sequential = module.get_submodule(stage.path)
        assert isinstance(sequential, nn.Sequential)
        del sequential[blocks:]
    own = nn.Module()
    for name, weight in module.named_parameters():
        if id(weight) not in common:
            own.register_parameter(name.replace(".", "-"), weight)
    for name, buffer in module.named_buffers():
        if id(buffer) not in common:
            own.register_buffer(name.replace(".", "-"), buffer)
    return SubNet(depth, module, own)
