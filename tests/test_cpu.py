"""The cpu target: which INT8 it writes for which processor, and where it can measure."""

import platform

from edgekd.core.dialects import DIALECTS
from edgekd.targets.cpu import Cpu, here

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


def test_targets_of_two_architectures_are_told_apart():
    assert {Cpu(arch="arm").trait, Cpu().trait, Cpu(arch="arm", threads=2).trait} == {"arm-1t", "1t", "arm-2t"}
