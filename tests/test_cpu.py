"""The cpu target: which INT8 it writes for which processor, and where it can measure."""

import platform

from edgekd.core.quant_scheme import DIALECTS
from edgekd.targets.cpu import Cpu, here
from edgekd.utils import cpu

OTHER = {"x86": "arm", "arm": "x86"}[here()]


def test_arm_gets_signed_activations_and_x86_unsigned_ones():
    assert Cpu(arch="arm").dialect == DIALECTS["ort-arm"]
    assert Cpu(arch="x86").dialect.activation == "uint8"


def test_another_architecture_is_measured_elsewhere():
    assert platform.machine() in Cpu(arch=OTHER).missing() and OTHER in Cpu(arch=OTHER).missing()
    assert not Cpu().missing() and not Cpu(arch=here()).missing()
    assert Cpu(arch=here()).dialect == Cpu().dialect


def test_an_unknown_x86_chip_gets_weights_that_saturate_on_none(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert Cpu(arch="x86").dialect.reduce_range
    assert Cpu().dialect == DIALECTS["ort-arm"]


def test_weights_have_7_bits_for_an_x86_device_without_vnni_or_that_does_not_tell():
    for flags in (("avx2",), (), None):
        target = Cpu().on("x86_64", flags)
        assert target.dialect.reduce_range and "7 bits" in target.delivery.instead[0]
    for flag in ("avx512_vnni", "avx_vnni"):
        target = Cpu().on("x86_64", ("avx2", flag))
        assert not target.dialect.reduce_range and not target.delivery.instead
    assert Cpu().on("aarch64", None).dialect == DIALECTS["ort-arm"] and not Cpu().on("aarch64", ()).delivery.instead


def test_a_device_like_this_machine_is_the_same_target_and_what_the_user_says_of_it_stands():
    assert Cpu(threads=2).on(platform.machine(), cpu.flags()) == Cpu(threads=2)
    assert Cpu(arch="x86", vnni=False).on("x86_64", ("avx_vnni",)).dialect.reduce_range


def test_full_weights_are_not_measured_where_they_saturate(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("edgekd.targets.cpu.flags", lambda: ("avx2",))
    assert "no VNNI" in Cpu(vnni=True).missing() and not Cpu().missing() and Cpu().dialect.reduce_range


def test_targets_of_two_architectures_are_told_apart():
    assert {Cpu(arch="arm").trait, Cpu().trait, Cpu(arch="arm", threads=2).trait} == {"arm-1t", "1t", "arm-2t"}
