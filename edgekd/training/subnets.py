"""Sub-networks of several depths in one network: the same weights, fewer of the repeated blocks of each stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.training.architecture_diff import CHAINS
from edgekd.training.batchnorm import list_batchnorms
from edgekd.utils.external import external_code

StageDepths: TypeAlias = tuple[int, ...]  # remaining blocks of each stage


@dataclass(frozen=True)
class SkippableStage:
    """An nn.Sequential, or an nn.ModuleList run in a loop, that ends in blocks which can be skipped."""

    path: str
    blocks: int
    least: int  # the first blocks, which must stay

    def end(self, network: nn.Module) -> str:
        """Return the path of the last block that `network` has of this stage."""
        names = [name for name, _ in network.get_submodule(self.path).named_children()]
        return f"{self.path}.{names[-1]}".lstrip(".")


def find_stages(network: nn.Module, x: Tensor) -> list[SkippableStage]:
    """Return the stages of a network that is in eval mode; `x` is a batch for it.

    A stage inside of another one's blocks is a part of them. At least one block of each stage stays.
    """
    calls = record_calls(network, x)
    stages: list[SkippableStage] = []
    inner: set[nn.Module] = set()
    for path, module in network.named_modules():
        if not isinstance(module, CHAINS) or module in inner:
            continue
        least = len(module)
        while least > 1 and is_skippable(module, least - 1, calls):
            least -= 1
        while least < len(module) and not is_removable(network, path, least, x[:1]):
            least += 1
        if least < len(module):
            stages.append(SkippableStage(path, len(module), least))
            inner.update(module.modules())
    return stages


@torch.no_grad()
def record_calls(network: nn.Module, x: Tensor) -> dict[nn.Module, tuple[Tensor, Any]]:
    """Return input and output of each module that runs once, on one map (N, C, H, W) and nothing else."""
    calls: dict[nn.Module, tuple[Tensor, Any]] = {}
    ran: set[nn.Module] = set()

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.pop(module, None)
        if module not in ran and len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4:
            calls[module] = args[0], output
        ran.add(module)

    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in network.modules()]
    try:
        network(x)
    finally:
        for handle in hooks:
            handle.remove()
    return calls


@torch.no_grad()
def is_skippable(
    stage: nn.Sequential | nn.ModuleList, number: int, calls: Mapping[nn.Module, tuple[Tensor, Any]]
) -> bool:
    """Return whether a child of `stage` is a residual block, one of several of its class, that keeps its map's shape.

    Its input is the output of the child before it. Residual is what passes its input on when all its weights are
    zero; that is seen by running it, not in its code.
    """
    before, block = stage[number - 1], stage[number]
    repeated = sum(type(shifted) is type(block) for shifted in stage) > 1
    composite = any(True for _ in block.children()) and not isinstance(block, CHAINS)
    chained = before in calls and block in calls and calls[before][1] is calls[block][0]
    if not (repeated and composite and chained):
        return False
    x, silent = calls[block][0], copy.deepcopy(block)
    for weight in silent.parameters():
        weight.zero_()
    output, shifted = silent(x), silent(x + 1)
    return isinstance(output, Tensor) and output.shape == x.shape and not torch.equal(output, shifted)


@torch.no_grad()
def is_removable(network: nn.Module, path: str, left: int, x: Tensor) -> bool:
    """Return whether a network without the children of `path` after the first `left` equals one with identities there.

    Not so where its code counts on their number, or reads what a certain one makes.
    """
    passed = shorten_stages(network, {}, share_tensors(network))
    stage = passed.get_submodule(path)
    assert isinstance(stage, CHAINS)
    for number in range(left, len(stage)):
        stage[number] = nn.Identity()
    try:
        with external_code("the network does not run without its last blocks", "keep them"):
            expected, actual = passed(x), shorten_stages(network, {path: left}, share_tensors(network))(x)
    except ConfigError:
        return False
    return isinstance(actual, Tensor) and isinstance(expected, Tensor) and torch.equal(actual, expected)


def share_tensors(network: nn.Module) -> dict[int, Any]:
    """Return a memo for deepcopy, which takes what is in it as it is: all tensors of `network`."""
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}


def shorten_stages(network: nn.Module, lengths: Mapping[str, int], memo: dict[int, Any]) -> nn.Module:
    """Return a copy with only the first children of some stages, by path."""
    shortened = copy.deepcopy(network, memo)
    for path, length in lengths.items():
        stage = shortened.get_submodule(path)
        assert isinstance(stage, CHAINS)
        del stage[length:]
    return shortened


def spread_depths(stages: list[SkippableStage], count: int) -> list[StageDepths]:
    """Return up to `count` depths below the full one: the shallowest, and others at even distances."""
    steps = [tuple(s.least + (s.blocks - s.least) * step // count for s in stages) for step in range(count)]
    return list(dict.fromkeys(steps))


@dataclass(frozen=True, eq=False)
class SubNet:
    """A shallower network that shares its weights with the whole."""

    depth: StageDepths
    module: nn.Module
    unshared: nn.Module  # the tensors that it does not share, to be trained and saved with the whole

    @property
    def name(self) -> str:
        return "depth-" + "-".join(map(str, self.depth))

    def alone(self) -> nn.Module:
        """Return a copy that shares nothing."""
        return copy.deepcopy(self.module)


def build_subnet(whole: nn.Module, stages: list[SkippableStage], depth: StageDepths, private: bool) -> SubNet:
    """`whole` with only the first blocks of each stage.

    The statistics of its BatchNorms are not shared; with `private`, neither are their scales and shifts.
    """
    shared = share_tensors(whole)
    for norm in list_batchnorms(whole):
        for tensor in (*norm.buffers(), *(norm.parameters() if private else ())):
            del shared[id(tensor)]
    common = set(shared)
    module = shorten_stages(whole, {stage.path: blocks for stage, blocks in zip(stages, depth, strict=True)}, shared)
    unshared = nn.Module()
    for name, weight in module.named_parameters():
        if id(weight) not in common:
            unshared.register_parameter(name.replace(".", "-"), weight)
    for name, buffer in module.named_buffers():
        if id(buffer) not in common:
            unshared.register_buffer(name.replace(".", "-"), buffer)
    return SubNet(depth, module, unshared)
