"""The cpu target: which INT8 it writes for which processor, and where it can measure."""

import platform

from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.targets.cpu import Cpu, this_arch
from edgekd.utils import cpu

OTHER = {"x86": "arm", "arm": "x86"}[this_arch()]


def test_arm_gets_signed_activations_and_x86_unsigned_ones():
    assert Cpu(arch="arm").scheme == QUANT_SCHEMES["ort-arm"]
    assert Cpu(arch="x86").scheme.activation == "uint8"


def test_another_architecture_is_measured_elsewhere():
    assert platform.machine() in Cpu(arch=OTHER).unavailable_reason() and OTHER in Cpu(arch=OTHER).unavailable_reason()
    assert not Cpu().unavailable_reason() and not Cpu(arch=this_arch()).unavailable_reason()
    assert Cpu(arch=this_arch()).scheme == Cpu().scheme


def test_an_unknown_x86_chip_gets_weights_that_saturate_on_none(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert Cpu(arch="x86").scheme.reduce_range
    assert Cpu().scheme == QUANT_SCHEMES["ort-arm"]


def test_weights_have_7_bits_for_an_x86_device_without_vnni_or_that_does_not_tell():
    for flags in (("avx2",), (), None):
        target = Cpu().on("x86_64", flags)
        assert target.scheme.reduce_range and "7 bits" in target.deployment_plan.instead[0]
    for flag in ("avx512_vnni", "avx_vnni"):
        target = Cpu().on("x86_64", ("avx2", flag))
        assert not target.scheme.reduce_range and not target.deployment_plan.instead
    assert (
        Cpu().on("aarch64", None).scheme == QUANT_SCHEMES["ort-arm"]
        and not Cpu().on("aarch64", ()).deployment_plan.instead
    )


def test_a_device_like_this_machine_is_the_same_target_and_what_the_user_says_of_it_stands():
    assert Cpu(threads=2).on(platform.machine(), cpu.flags()) == Cpu(threads=2)
    assert Cpu(arch="x86", vnni=False).on("x86_64", ("avx_vnni",)).scheme.reduce_range


def test_full_weights_are_not_measured_where_they_saturate(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("edgekd.targets.cpu.flags", lambda: ("avx2",))
    assert (
        "no VNNI" in Cpu(vnni=True).unavailable_reason()
        and not Cpu().unavailable_reason()
        and Cpu().scheme.reduce_range
    )


def test_targets_of_two_architectures_are_told_apart():
    assert {Cpu(arch="arm").label, Cpu().label, Cpu(arch="arm", threads=2).label} == {"arm-1t", "1t", "arm-2t"}
