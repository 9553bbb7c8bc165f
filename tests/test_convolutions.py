"""Gradients of narrow convolutions, on this processor and as on others. See edgekd/learn/convolutions.py."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

from edgekd.models.resnet import ResNet
from edgekd.training.convolutions import SoundConvolutions, channel_block, sound_convolutions

ISAS = ["", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16"]  # one that the processor does not have is its best
WIDTHS = range(2, 18)

TAUGHT = """
import torch
from torch import nn
from edgekd.training.convolutions import sound_convolutions
from tests.test_convolutions import WIDTHS, gradients, shaped

torch.set_num_threads(2)
for width in WIDTHS:
    for kind, size, batch in ((nn.Conv2d, 64, 7), (nn.Conv2d, 8, 16), (nn.ConvTranspose2d, 32, 7)):
        torch.manual_seed(width)
        layer = shaped(kind, width)
        x = torch.randn(batch, layer.in_channels, size, size)
        exact = gradients(layer, x.double(), torch.float64)
        for layout in (torch.channels_last, torch.contiguous_format):
            for precision in (torch.float32, torch.bfloat16):
                made = gradients(layer, x.to(memory_format=layout), precision, layout)
                far = max(((a - b).norm() / b.norm()).item() for a, b in zip(made, exact))
                near = 1e-5 if precision is torch.float32 else 1e-2
                assert far < near, (width, kind, size, layout, precision, far)
print("right")
"""


def shaped(kind, width):
    """A strided 1x1 layer whose gradient has few channels to go through."""
    if kind is nn.Conv2d:
        return nn.Conv2d(width, 24, 1, stride=2)
    return nn.ConvTranspose2d(24, width, 1, stride=2, output_padding=1)


def gradients(layer, x, precision, layout=torch.contiguous_format):
    """Of weight, bias and input after a step of training, in float64."""
    twin = type(layer)(
        layer.in_channels,
        layer.out_channels,
        1,
        stride=2,
        **({"output_padding": 1} if isinstance(layer, nn.ConvTranspose2d) else {}),
    )
    twin.load_state_dict(layer.state_dict())
    twin.to(dtype=x.dtype).to(memory_format=layout)
    x = x.detach().requires_grad_()
    convolutions = sound_convolutions([twin])
    with convolutions, torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        made = twin(x)
    torch.manual_seed(0)
    with convolutions:
        made.backward(torch.randn(made.shape).to(made))
    return [t.grad.double() for t in (twin.weight, twin.bias, x)]


@pytest.mark.parametrize("isa", ISAS)
def test_narrow_layers_are_taught_right_gradients_on_every_kind_of_processor(isa):
    """In a process of its own: what is tested corrupts memory where it fails, or hangs."""
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    with subprocess.Popen(
        [sys.executable, "-c", TAUGHT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
    assert (process.returncode, out) == (0, "right\n"), err


def test_only_what_would_go_wrong_is_computed_in_another_way(monkeypatch):
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.conv2d:
                calls.append((tuple(args[0].shape[2:]), args[3]))
            return func(*args, **(kwargs or {}))

    def read(layer, size=8):
        calls.clear()
        with Watch(), SoundConvolutions():
            layer(torch.randn(2, layer.in_channels, size, size))
        return calls[0]

    monkeypatch.setattr("edgekd.training.convolutions.channel_block", lambda: 8)
    assert read(nn.Conv2d(7, 4, 1, stride=2)) == ((4, 4), 1)
    assert read(nn.Conv2d(7, 4, 1, stride=(1, 2))) == ((8, 4), 1)
    for layer, size in (
        (nn.Conv2d(8, 4, 1, stride=2), 8),
        (nn.Conv2d(7, 4, 1), 8),
        (nn.Conv2d(7, 4, 3, stride=2), 8),
        (nn.Conv2d(7, 4, 1, stride=2, padding=1), 8),
        (nn.Conv2d(4, 4, 1, stride=2, groups=2), 8),
        (nn.Conv2d(7, 4, 1, stride=2), 9),
        (nn.Conv2d(7, 4, 1, stride=2).requires_grad_(False), 8),
    ):
        assert read(layer, size) == ((size, size), layer.stride)
    assert isinstance(sound_convolutions([ResNet(8, 4).build(3, 1)]), SoundConvolutions)
    assert not isinstance(sound_convolutions([ResNet(8, 16).build(3, 1)]), SoundConvolutions)


def test_the_block_follows_the_processor_and_what_limits_onednn(monkeypatch):
    def block(isa="", **features):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | features)
        return channel_block.__wrapped__()

    assert block(avx512_f=True) == 16 and block(avx512_f=False) == 8
    assert block("avx2", avx512_f=True) == block("AVX2_VNNI", avx512_f=True) == 8
    assert block("AVX512_CORE", avx512_f=True) == block("DEFAULT", avx512_f=True) == 16
    assert block(architecture="aarch64") == 0
