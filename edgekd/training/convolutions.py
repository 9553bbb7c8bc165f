"""Convolutions whose gradients torch 2.13 gets wrong on x86 processors, computed in another way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Sizes = int | tuple[int, ...] | list[int] | str


def sound_convolutions(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """What the forward and the backward pass of training them are to run in; nothing, where nothing would go wrong."""
    needed = any(narrow(weight, channel_block()) for module in modules for weight in module.parameters())
    return SoundConvolutions() if needed else nullcontext()


class SoundConvolutions(TorchFunctionMode):
    """While it is active, strided 1x1 convolutions of few channels are computed in a form with right gradients.

    oneDNN's backward pass over their weights, channels-last, writes beyond its workspace where the channels do not
    fill a vector register (its issue 6035): wrong gradients, a crash or a hang. A mode of torch, because it sees layers
    and plain calls alike and leaves no trace in a module; it has to be active in the backward pass, too, where
    checkpointed layers run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block = channel_block()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and torch.is_grad_enabled():
            return conv2d(self.block, *args, **kwargs)
        if func is torch.conv_transpose2d and torch.is_grad_enabled():
            return conv_transpose2d(self.block, *args, **kwargs)
        return func(*args, **kwargs)


@cache
def channel_block() -> int:
    """How many channels oneDNN's kernels take at a time; 0 on processors that have others."""
    features = torch.cpu.get_capabilities()
    if features["architecture"] != "x86_64":
        return 0
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper().startswith(("SSE", "AVX2"))
    return 16 if features["avx512_f"] and not limited else 8


def conv2d(
    block: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Where it would go wrong: the pixels that are read, at stride 1."""
    down, across = pair(stride)
    height, width = input.shape[-2:]
    exact = height % down == 0 and width % across == 0  # else oneDNN takes another kernel
    if wrong(block, weight, stride, padding, groups) and exact and not input.is_cuda:
        input, stride = input[..., ::down, ::across], 1
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]


def conv_transpose2d(
    block: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """Its gradient is that of a convolution from what it makes to what it reads. Where it would go wrong: in float64,
    which oneDNN does not compute."""
    kind = input.dtype
    exact = pair(output_padding) == tuple(step - 1 for step in pair(stride))
    if wrong(block, weight, stride, padding, groups) and exact and not input.is_cuda:
        input, weight, bias = input.double(), weight.double(), bias if bias is None else bias.double()
    output = torch.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)  # type: ignore[arg-type]
    return output.to(kind)


def wrong(block: int, weight: Tensor, stride: Sizes, padding: Sizes, groups: int) -> bool:
    """As measured with 1 to 48 channels at AVX2 and all AVX-512 kinds, in float32 and bfloat16."""
    strided = pair(stride) != (1, 1) and (padding == "valid" or pair(padding) == (0, 0))
    return weight.requires_grad and narrow(weight, block) and strided and groups == 1


def narrow(weight: Tensor, block: int) -> bool:
    """Whether it may be one of 1x1 pixel and fewer channels than a block."""
    return weight.ndim == 4 and weight.shape[1] < block and weight.shape[2:] == (1, 1)


def pair(sizes: Sizes) -> tuple[int, ...]:
    """One size for each direction."""
    both = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    return both * 2 if len(both) == 1 else both  # type: ignore[return-value]
