"""Find the layers of any module where its knowledge passes through, with size, channels and receptive field."""

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
from edgekd.training.feature_hooks import Taps


@dataclass(frozen=True)
class Layer:
    """A layer that all of a network's information passes through: its output alone decides the rest."""

    path: str
    channels: int
    size: tuple[int, int]  # height, width
    receptive: int  # S of KPN's section 3.3: sum over layers of (kernel - 1) * product of strides before
    signed: bool  # has negative outputs: a pre-activation


class ReceptiveFields(TorchFunctionMode):
    """Follows every operation of a forward pass and keeps (receptive field, stride) of each tensor.

    Where paths join, the larger field counts. Works on what is executed, so on any module.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.fields = {id(x): (0, 1)}
        self.alive = [x]  # an id is only unique among tensors that live

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        known = [self.fields[id(t)] for t in tensors([args, kwargs]) if id(t) in self.fields]
        if known:
            field, stride = max(f for f, _ in known), max(s for _, s in known)
            kernel, step = window(getattr(func, "__name__", ""), args, kwargs)
            for tensor in tensors(made):
                self.fields[id(tensor)] = (field + (kernel - 1) * stride, stride * step)
                self.alive.append(tensor)
        return made


def window(name: str, args: Any, kwargs: Any) -> tuple[int, int]:
    """Kernel extent and stride of a convolution or pooling call; (1, 1) for everything else."""
    given = dict(zip(("input", "kernel", "bias", "stride", "padding", "dilation"), args, strict=False)) | kwargs
    if name == "conv2d":
        kernel = max(given.get("weight", given.get("kernel")).shape[2:])
        return (kernel - 1) * largest(given.get("dilation", 1)) + 1, largest(given.get("stride", 1))
    if name.lstrip("_").startswith(("max_pool2d", "avg_pool2d")):
        kernel = largest(given.get("kernel_size", given.get("kernel")))
        return kernel, largest(given.get("stride", given.get("bias")) or kernel)  # third positional is the stride
    return 1, 1


def largest(value: Any) -> int:
    return int(max(value)) if isinstance(value, (tuple, list)) else int(value)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[tuple[Layer, tuple[int, int]]]:
    """Every layer that runs once and gives a map (N, C, H, W) of more than one pixel, in order of execution.

    With each goes what identifies its output: two names of one tensor have the same.
    """
    seen: list[tuple[str, Tensor, int, bool]] = []
    mode = ReceptiveFields(x)

    def watch(name: str) -> Any:
        def see(_module: nn.Module, _args: Any, made: Any) -> None:
            if isinstance(made, Tensor) and made.ndim == 4 and min(made.shape[2:]) > 1:
                # read at once: an activation in place may follow
                seen.append((name, made, made._version, bool((made < 0).any())))

        return see

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with mode:
            model(x)
    finally:
        for handle in hooks:
            handle.remove()
    calls = Counter(name for name, *_ in seen)
    return [
        (Layer(name, t.shape[1], (t.shape[2], t.shape[3]), mode.fields[id(t)][0], signed), (id(t), version))
        for name, t, version, signed in seen
        if calls[name] == 1 and id(t) in mode.fields
    ]


def look(model: nn.Module, path: str, x: Tensor, role: str) -> Layer:
    """One layer by name. Raises ConfigError if there is none, or if its output is not a map that is made once.

    `role` is what the model is called there: teacher or student, which may be of one class.
    """
    Taps(model, path, role=role)
    found = next((layer for layer, _ in outputs(model, x) if layer.path == path), None)
    if found is None:
        raise ConfigError(
            f"layer `{path}` of the {role} gives no (N, C, H, W) map, or runs more than once in a pass",
            hint="name a convolution, a normalisation or a block",
        )
    return found


def layers(model: nn.Module, x: Tensor) -> list[Layer]:
    """The layers of `model`, in order of execution, that cut it into a front and a rear part.

    `x` is a batch of two images or more, (N, C, H, W); the model is in eval mode. Of layers that differ only by a
    normalisation or an activation, the last one with a signed output stands for all.
    """
    kept = all_cuts(model, unique(outputs(model, x)), x)
    groups = groupby(kept, key=lambda layer: (layer.receptive, layer.size, layer.channels))
    return [([m for m in members if m.signed] or members)[-1] for members in (list(g) for _, g in groups)]


def unique(found: list[tuple[Layer, tuple[int, int]]]) -> list[Layer]:
    """Without the second name of one tensor: a block and its last layer return the same; the shorter path stays."""
    shortest: dict[tuple[int, int], str] = {}
    for layer, tensor in found:
        shortest[tensor] = min(shortest.get(tensor, layer.path), layer.path, key=len)
    return [layer for layer, tensor in found if shortest[tensor] == layer.path]


@torch.no_grad()
def cuts(model: nn.Module, path: str, x: Tensor) -> bool:
    """Whether everything passes through a layer: its output fixed, another input must change nothing."""
    taps = Taps(model, path)
    want, seen = taps(x)
    got, _ = taps(x.flip(0), {path: seen[path]})
    return torch.equal(want, got)


class Reached(BaseException):
    """A pass came to the layer where it was to end; whether that made what it makes of the first input."""

    def __init__(self, same: bool) -> None:
        self.same = same


@torch.no_grad()
def all_cuts(model: nn.Module, found: list[Layer], x: Tensor) -> list[Layer]:
    """Those of `found`, in order of execution, that everything passes through, as `cuts` says of one.

    From the last to the first: what reaches the next cut unchanged reaches the output unchanged, so a pass ends there.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _args, made: seen.update({name: made.clone()})

    hooks = [model.get_submodule(layer.path).register_forward_hook(keep(layer.path)) for layer in found]
    try:
        want = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    kept: list[Layer] = []
    for layer in reversed(found):
        fixed = {layer.path: seen[layer.path]}
        following = kept[-1].path if kept else None
        if unchanged(model, fixed, x.flip(0), following, seen[following] if following else want):
            kept.append(layer)
    return kept[::-1]


def unchanged(model: nn.Module, fixed: dict[str, Tensor], x: Tensor, end: str | None, want: Tensor) -> bool:
    """Whether the layer `end`, or the model, makes `want` of `x` where layers give what is in `fixed`."""

    def stop(_module: nn.Module, _args: Any, made: Tensor) -> None:
        raise Reached(torch.equal(made, want))

    handle = model.get_submodule(end).register_forward_hook(stop) if end else None
    try:
        return torch.equal(Taps(model, *fixed)(x, fixed)[0], want)
    except Reached as reached:
        return reached.same
    finally:
        if handle:
            handle.remove()


@torch.no_grad()
def homes(model: nn.Module, order: list[str], x: Tensor) -> dict[str, int]:
    """The number of the block in which each module starts, when blocks end behind the layers in `order`."""
    home: dict[str, int] = {}
    passed: list[str] = []

    def start(name: str) -> Callable[..., None]:
        return lambda *_: None if home.setdefault(name, len(passed)) else None

    hooks = [module.register_forward_pre_hook(start(name)) for name, module in model.named_modules()]
    hooks += [model.get_submodule(path).register_forward_hook(lambda *_: passed.append("")) for path in order]
    try:
        model(x)
    finally:
        for handle in hooks:
            handle.remove()
    return home
