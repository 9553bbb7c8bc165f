"""JetPacks and boards: the table holds together, and what cannot be had is said with what is done instead."""

import pytest

from edgekd.errors import ConfigError
from edgekd.targets._jetpack import board, cache_release, jetpack, plan_engines, table

OFFERED = ("4.6", "5.1", "6.0", "6.1", "6.2", "7.0", "7.1", "7.2")


def test_the_table_holds_every_jetpack_that_is_offered():
    assert tuple(row.version for row in table().jetpacks) == OFFERED
    assert table() is table()  # read once


@pytest.mark.parametrize(
    ("version", "tensorrt", "python", "opsets"),
    [
        ("4.6", (8, 2), "3.6", (7, 13)),
        ("5.1", (8, 5), "3.8", (7, 17)),
        ("6.0", (8, 6), "3.10", (7, 17)),
        ("6.1", (10, 3), "3.10", (9, 20)),
        ("6.2", (10, 3), "3.10", (9, 20)),
        ("7.0", (10, 13), "3.12", (9, 24)),
        ("7.2", (10, 16), "3.12", (9, 24)),
    ],
)
def test_a_jetpack_brings_one_tensorrt_with_its_opsets(version, tensorrt, python, opsets):
    row = jetpack(version)
    assert (row.tensorrt_version, row.python, row.opset) == (tensorrt, python, opsets)


def test_every_board_has_a_jetpack_and_every_jetpack_has_boards():
    named = {name for row in table().jetpacks for name in row.boards}
    assert named == {kind.name for kind in table().boards}
    assert all(row.boards for row in table().jetpacks)


def test_newer_jetpacks_never_read_less():
    rows = table().jetpacks
    for older, newer in zip(rows, rows[1:], strict=False):
        assert older.opset[1] <= newer.opset[1] and older.ir <= newer.ir
        assert older.tensorrt_version <= newer.tensorrt_version


def test_the_route_to_int8_follows_tensorrt():
    assert {v: plan_engines(v, jetpack(v).boards[-1]).int8 for v in OFFERED} == {
        **dict.fromkeys(OFFERED[:5], "explicit"),
        **dict.fromkeys(OFFERED[5:], "strongly_typed"),
    }


@pytest.mark.parametrize(("name", "sm"), [("nano", "5.3"), ("tx1", "5.3"), ("tx2", "6.2")])
def test_without_int8_a_board_gets_fp16_and_the_plan_says_so(name, sm):
    made = plan_engines("4.6", name)
    assert made.engines == ("fp32", "fp16") and made.int8 is None and not made.dla
    assert made.instead == (
        f"INT8 is not available on SM {sm} ({board(name).title}): the student is built in FP16 and FP32 there",
    )


def test_a_dla_takes_a_calibration_cache():
    made = plan_engines("6.2", "orin-nx-16gb", dla=True)
    assert made.dla and made.int8 == "calibration" and made.engines == ("fp16", "int8") and made.instead == ()
    assert plan_engines("6.2", "orin-nx-16gb").int8 == "explicit"


@pytest.mark.parametrize(
    ("version", "name", "reason"),
    [
        ("6.2", "orin-nano", "Jetson Orin Nano has no DLA: the engine runs on the GPU"),
        ("7.2", "agx-orin", "TensorRT 10.16 of JetPack 7.2 supports no DLA: the engine runs on the GPU"),
        ("7.0", "thor", "Jetson Thor has no DLA: the engine runs on the GPU"),
    ],
)
def test_without_a_dla_the_gpu_is_used_and_the_plan_says_so(version, name, reason):
    made = plan_engines(version, name, dla=True)
    assert made.instead == (reason,) and not made.dla and made.int8 == jetpack(version).int8[0]


def test_two_things_that_cannot_be_had_are_two_sentences():
    assert len(plan_engines("4.6", "nano", dla=True).instead) == 2


@pytest.mark.parametrize(
    ("version", "name", "sentence"),
    [
        ("6.2", "thor", "JetPack 6.2 does not run on Jetson Thor\n\nhint: Jetson Thor runs JetPack 7.0, 7.1, 7.2"),
        ("7.0", "agx-orin", "hint: Jetson AGX Orin runs JetPack 5.1, 6.0, 6.1, 6.2, 7.2"),
        ("5.1", "nano", "hint: Jetson Nano runs JetPack 4.6"),
        ("6.3", "thor", "there is no JetPack `6.3` in edgekd's table"),
        ("6.2.1", "agx-orin", "did you mean `6.2`"),
        ("6.2", "orin-nanno", "there is no board `orin-nanno` in edgekd's table\n\nhint: did you mean `orin-nano`"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(version, name, sentence):
    with pytest.raises(ConfigError) as refused:
        plan_engines(version, name)
    assert sentence in str(refused.value)


def test_a_calibration_cache_is_for_the_tensorrt_of_one_jetpack():
    assert [cache_release(v) for v in ("4.6", "5.1", "6.2")] == ["8.2.1", "8.5.2", "10.3.0"]
    with pytest.raises(ConfigError, match="give --jetpack, one of 4.6, 5.1, 6.0, 6.1, 6.2"):
        cache_release(None)
    with pytest.raises(ConfigError, match="nothing reads a calibration cache"):
        cache_release("7.1")
