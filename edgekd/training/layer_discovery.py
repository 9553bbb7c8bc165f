"""Find layers of any module, with map size and receptive field, and those that everything passes through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.errors import ConfigError
from edgekd.training.feature_hooks import FeatureExtractor


@dataclass(frozen=True)
class LayerInfo:
    """A layer with its path, map size, channels and receptive field."""

    path: str
    channels: int
    size: tuple[int, int]  # height, width
    receptive: int  # S of KPN's section 3.3: sum over layers of (kernel - 1) * product of strides before
    signed: bool  # has negative outputs: a pre-activation


class ReceptiveFields(TorchFunctionMode):
    """Traces every operation of a forward pass: (receptive field, stride) of each tensor.

    Where paths join, the larger field counts.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.fields = {id(images): (0, 1)}
        self.alive = [images]  # an id is only unique among tensors that live

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [self.fields[id(t)] for t in iterate_tensors([args, kwargs]) if id(t) in self.fields]
        if inputs:
            field, stride = max(f for f, _ in inputs), max(s for _, s in inputs)
            kernel, step = kernel_and_stride(getattr(func, "__name__", ""), args, kwargs)
            for tensor in iterate_tensors(result):
                self.fields[id(tensor)] = (field + (kernel - 1) * stride, stride * step)
                self.alive.append(tensor)
        return result


def kernel_and_stride(name: str, args: Any, kwargs: Any) -> tuple[int, int]:
    """Return kernel extent and stride of a convolution or pooling call; (1, 1) for everything else."""
    arguments = dict(zip(("input", "kernel", "bias", "stride", "padding", "dilation"), args, strict=False)) | kwargs
    if name == "conv2d":
        kernel = max(arguments.get("weight", arguments.get("kernel")).shape[2:])
        return (kernel - 1) * max_extent(arguments.get("dilation", 1)) + 1, max_extent(arguments.get("stride", 1))
    if name.lstrip("_").startswith(("max_pool2d", "avg_pool2d")):
        kernel = max_extent(arguments.get("kernel_size", arguments.get("kernel")))
        return kernel, max_extent(
            arguments.get("stride", arguments.get("bias")) or kernel
        )  # third positional is the stride
    return 1, 1


def max_extent(value: Any) -> int:
    return int(max(value)) if isinstance(value, (tuple, list)) else int(value)


def iterate_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iterate_tensors(item)
    elif isinstance(value, dict):
        yield from iterate_tensors(list(value.values()))


@torch.no_grad()
def trace_layers(model: nn.Module, x: Tensor) -> list[tuple[LayerInfo, tuple[int, int]]]:
    """Return every layer that runs once and gives a map (N, C, H, W) of more than one pixel, in order of execution.

    With each goes what identifies its output: two names of one tensor have the same.
    """
    records: list[tuple[str, Tensor, int, bool]] = []
    mode = ReceptiveFields(x)

    def watch(name: str) -> Any:
        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                # read at once: an activation in place may follow
                records.append((name, output, output._version, bool((output < 0).any())))

        return see

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with mode:
            model(x)
    finally:
        for handle in hooks:
            handle.remove()
    calls = Counter(name for name, *_ in records)
    return [
        (LayerInfo(name, t.shape[1], (t.shape[2], t.shape[3]), mode.fields[id(t)][0], signed), (id(t), version))
        for name, t, version, signed in records
        if calls[name] == 1 and id(t) in mode.fields
    ]


def find_layer(model: nn.Module, path: str, x: Tensor, role: str) -> LayerInfo:
    """Return a layer by name. Raise ConfigError if there is none, or if it has no map or runs more than once.

    `role` is teacher or student, for the message.
    """
    FeatureExtractor(model, path, role=role)
    layer = next((layer for layer, _ in trace_layers(model, x) if layer.path == path), None)
    if layer is None:
        raise ConfigError(
            f"layer `{path}` of the {role} gives no (N, C, H, W) map, or runs more than once in a pass",
            hint="name a convolution, a normalisation or a block",
        )
    return layer


def cut_layers(model: nn.Module, x: Tensor) -> list[LayerInfo]:
    """Return the layers of `model`, in order of execution, that cut it into a front and a rear part.

    `x` is a batch of two images or more, (N, C, H, W); the model is in eval mode. Of layers that differ only by a
    normalisation or an activation, the last one with a signed output stands for all.
    """
    cuts = filter_cuts(model, drop_aliases(trace_layers(model, x)), x)
    groups = groupby(cuts, key=lambda layer: (layer.receptive, layer.size, layer.channels))
    return [([m for m in members if m.signed] or members)[-1] for members in (list(g) for _, g in groups)]


def drop_aliases(traced: list[tuple[LayerInfo, tuple[int, int]]]) -> list[LayerInfo]:
    """Drop second names of one tensor, keeping the shorter path: a block and its last layer return the same."""
    shortest: dict[tuple[int, int], str] = {}
    for layer, tensor in traced:
        shortest[tensor] = min(shortest.get(tensor, layer.path), layer.path, key=len)
    return [layer for layer, tensor in traced if shortest[tensor] == layer.path]


@torch.no_grad()
def is_cut(model: nn.Module, path: str, x: Tensor) -> bool:
    """Return whether everything passes through a layer: its output fixed, another input must change nothing."""
    extractor = FeatureExtractor(model, path)
    expected, features = extractor(x)
    actual, _ = extractor(x.flip(0), {path: features[path]})
    return torch.equal(expected, actual)


class EndReached(BaseException):
    """A pass reached the layer where it ends; `same` is whether its output is the expected one."""

    def __init__(self, same: bool) -> None:
        self.same = same


@torch.no_grad()
def filter_cuts(model: nn.Module, layers: list[LayerInfo], x: Tensor) -> list[LayerInfo]:
    """Return those of `layers`, in order of execution, that everything passes through, as `is_cut` says of one.

    From the last to the first: what reaches the next cut unchanged reaches the output unchanged, so a pass ends there.
    """
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: features.update({name: output.clone()})

    hooks = [model.get_submodule(layer.path).register_forward_hook(keep(layer.path)) for layer in layers]
    try:
        expected = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    cuts: list[LayerInfo] = []
    for layer in reversed(layers):
        fixed = {layer.path: features[layer.path]}
        following = cuts[-1].path if cuts else None
        if is_unchanged(model, fixed, x.flip(0), following, features[following] if following else expected):
            cuts.append(layer)
    return cuts[::-1]


def is_unchanged(model: nn.Module, fixed: dict[str, Tensor], x: Tensor, end: str | None, expected: Tensor) -> bool:
    """Return whether the layer `end`, or the model, makes `want` of `x` where layers give what is in `fixed`."""

    def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
        raise EndReached(torch.equal(output, expected))

    handle = model.get_submodule(end).register_forward_hook(stop) if end else None
    try:
        return torch.equal(FeatureExtractor(model, *fixed)(x, fixed)[0], expected)
    except EndReached as reached:
        return reached.same
    finally:
        if handle:
            handle.remove()


@torch.no_grad()
def block_of_modules(model: nn.Module, order: list[str], x: Tensor) -> dict[str, int]:
    """Return the number of the block in which each module starts, when blocks end behind the layers in `order`."""
    block_of: dict[str, int] = {}
    passed: list[str] = []

    def start(name: str) -> Callable[..., None]:
        return lambda *_: None if block_of.setdefault(name, len(passed)) else None

    hooks = [module.register_forward_pre_hook(start(name)) for name, module in model.named_modules()]
    hooks += [model.get_submodule(path).register_forward_hook(lambda *_: passed.append("")) for path in order]
    try:
        model(x)
    finally:
        for handle in hooks:
            handle.remove()
    return block_of
