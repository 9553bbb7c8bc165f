"""Jetsons and workstations with TensorRT: what each is sent, what is refused, and a build that ends honestly."""

import json
import logging
from dataclasses import replace

import onnx
import pytest

from edgekd.cli import main
from edgekd.config import load_config, with_device_settings
from edgekd.core import serialization
from edgekd.core.quant_scheme import QUANT_SCHEMES
from edgekd.core.target import Target
from edgekd.errors import ConfigError
from edgekd.methods.supervised import Supervised
from edgekd.models.resnet import ResNet
from edgekd.pipelines.build import build
from edgekd.pipelines.build_result import build_summary, format_build
from edgekd.pipelines.deploy import builds_engines, label_targets
from edgekd.targets.cpu import Cpu
from edgekd.targets.jetson import Jetson
from edgekd.targets.tensorrt import TensorRt

ALL = ("fp32", "fp16", "int8")


@pytest.mark.parametrize(
    ("jetpack", "board", "dla", "engines", "opset", "typed", "core", "scheme"),
    [
        ("4.6", "nano", False, ("fp32", "fp16"), 13, False, None, "tensorrt"),
        ("4.6", "xavier-nx", False, ALL, 13, False, None, "tensorrt"),
        ("4.6", "xavier-nx", True, ("fp16", "int8"), 13, False, 0, "dla"),
        ("5.1", "orin-nano", False, ALL, 17, False, None, "tensorrt"),
        ("6.2", "orin-nano", False, ALL, 20, False, None, "tensorrt"),
        ("6.2", "orin-nano", True, ALL, 20, False, None, "tensorrt"),
        ("6.2", "agx-orin", True, ("fp16", "int8"), 20, False, 0, "dla"),
        ("7.0", "thor", False, ALL, 24, True, None, "tensorrt"),
        ("7.2", "agx-orin", True, ALL, 24, True, None, "tensorrt"),
    ],
)
def test_a_jetson_is_sent_what_its_jetpack_and_board_can_do(jetpack, board, dla, engines, opset, typed, core, scheme):
    target = Jetson(jetpack=jetpack, board=board, dla=dla)
    sent = target.deployment_plan
    assert (sent.engines, sent.opset, sent.typed, sent.dla) == (engines, opset, typed, core)
    assert (sent.jetpack, sent.board) == (jetpack, board) and sent.tensorrt and sent.why
    assert target.scheme == QUANT_SCHEMES[scheme]
    assert bool(sent.instead) == (board == "nano" or dla != (core is not None))
    assert target.engine_plan().board.title in target.unavailable_reason() and builds_engines(target)


def test_a_workstation_is_sent_strongly_typed_networks_and_says_what_it_lacks():
    target = TensorRt()
    assert (target.deployment_plan.engines, target.deployment_plan.typed, target.scheme) == (
        ALL,
        True,
        QUANT_SCHEMES["tensorrt"],
    )
    found = target.unavailable_reason()
    assert not found or "tensorrt is not installed" in found or "NVIDIA driver" in found
    assert builds_engines(target)


def test_what_does_not_exist_or_fit_is_refused_before_anything_is_built():
    for settings, says in (
        ({"jetpack": "6.3"}, "there is no JetPack `6.3`"),
        ({"board": "nanno"}, "did you mean `nano`"),
        ({"board": "thor"}, "JetPack 6.2 does not run on Jetson Thor\n\nhint: Jetson Thor runs JetPack 7.0, 7.1, 7.2"),
        ({"threads": 2}, "threads is 2, which TensorRT has none of"),
        ({"jetpack": 6.2}, "in quotes if it looks like a number"),
        ({"jetpak": "6.2"}, "did you mean `jetpack`"),
    ):
        with pytest.raises(ConfigError) as refused:
            serialization.from_json(Target, {"use": "jetson", **settings})
        assert says in str(refused.value)


def test_the_command_line_sets_what_targets_have():
    config = load_config("digits", (), ("cpu", "jetson"), True)
    assert with_device_settings(config, jetpack=None, board=None, dla=None) == config
    targets = with_device_settings(config, jetpack="7.1", board="thor", dla=None).targets
    assert targets == (Cpu(), Jetson(jetpack="7.1", board="thor"))
    with pytest.raises(ConfigError, match="no target has the setting jetpack\n\nhint: name a Jetson"):
        with_device_settings(load_config("digits", (), ("cpu",), True), jetpack="6.2", board=None, dla=None)


def test_two_jetsons_are_told_apart_by_their_settings():
    both = (Jetson(), Jetson(board="agx-orin", dla=True))
    assert list(label_targets(both)) == ["jetson-orin-nano-6.2", "jetson-agx-orin-6.2-dla"]
    assert list(label_targets((Cpu(), Jetson()))) == ["cpu", "jetson"]
    with pytest.raises(ConfigError, match="a target is there twice"):
        label_targets((Jetson(), Jetson()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "--target", "jetson", "--jetpack", "6.2", "--board", "thor"], "does not run on Jetson Thor"),
        (["build", "--target", "jetson", "--jetpack", "3"], "there is no JetPack `3`"),
        (["build", "--target", "cpu", "--dla"], "no target has the setting dla"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_code_2(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["edgekd", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2 and says in capsys.readouterr().err and not list(tmp_path.iterdir())


# a whole build


@pytest.fixture(scope="module")
def config():
    """Small networks, for a processor, a Jetson with INT8 and one without."""
    config = load_config("digits", (), ("cpu",), True)
    tiny = ResNet(depth=8, width=4)
    student = replace(config.student, model=tiny, method=Supervised(), baselines=(), epochs=1)
    targets = (Cpu(), Jetson(), Jetson(jetpack="4.6", board="nano"))
    return replace(
        config, teacher=replace(config.teacher, model=tiny, epochs=1), student=student, targets=targets, name="toy"
    )


@pytest.fixture(scope="module")
def built(config, tmp_path_factory):
    home = tmp_path_factory.mktemp("build")
    return home / "out", build(config, home / "out", home / "calib", "edgekd build")


def test_a_build_without_a_board_ends_with_a_bundle_and_says_what_to_type(built):
    out, record = built
    cpu, orin, nano = record.benches
    assert cpu.measurements and not cpu.not_measured
    assert (orin.target, nano.target) == ("jetson-orin-nano-6.2", "jetson-nano-4.6")
    for bench in (orin, nano):
        assert not bench.measurements and bench.machine is None
        assert bench.not_measured.startswith("not measured on device: ") and "sh run.sh" in bench.not_measured
        assert (out / f"bundle-{bench.target}" / "manifest.json").is_file()
    assert "INT8 is not available on SM 5.3" in nano.not_measured and "INT8 is not" not in orin.not_measured
    assert not (out / "bundle-cpu").exists()
    assert set(build_summary(record)["not_measured"]) == {orin.target, nano.target}
    for text in (format_build(record), (out / "report.html").read_text(), (out / "report.md").read_text()):
        assert "not measured on device" in text and "not measured: not measured" not in text


def test_each_target_gets_files_of_its_own_opset_from_one_calibration(built):
    out, _ = built
    steps = {path.name.rpartition("-")[0] for path in (out / "steps").iterdir() if path.is_dir()}
    assert {
        "export-supervised",
        "export-supervised-opset13",
        "ranges-supervised",
    } <= steps and "ranges-supervised-opset13" not in steps
    assert {"quantize-supervised-cpu", "quantize-supervised-jetson-orin-nano-6.2"} <= steps
    for name, opset, ir in (("orin-nano-6.2", 20, 10), ("nano-4.6", 13, 7)):
        for path in (out / f"bundle-jetson-{name}" / "models").glob("*.onnx"):
            model = onnx.load(path)
            assert (model.opset_import[0].version, model.ir_version) == (opset, ir)
    nano = json.loads((out / "bundle-jetson-nano-4.6" / "manifest.json").read_text())
    assert {tuple(e["precisions"]) for e in nano["engines"]} == {("fp32",), ("fp16",)}


def test_a_second_build_makes_nothing_new_and_another_folder_gets_the_same_bundles(built, config, tmp_path, caplog):
    out, _ = built
    caplog.set_level(logging.INFO, "edgekd")
    build(config, out, tmp_path / "calib", "edgekd build")
    assert not [line for line in caplog.messages if line.endswith("...")]
    jetsons = replace(config, targets=config.targets[1:])
    build(jetsons, tmp_path / "again", tmp_path / "calib", "edgekd build")
    for name in ("bundle-jetson-orin-nano-6.2", "bundle-jetson-nano-4.6"):
        first, second = (
            {path.relative_to(home / name): path.read_bytes() for path in (home / name).rglob("*") if path.is_file()}
            for home in (out, tmp_path / "again")
        )
        assert first == second


def test_a_bundle_of_a_target_that_is_measured_here_comes_when_asked_for(built, config, tmp_path):
    out, _ = built
    build(config, out, tmp_path / "calib", "edgekd build --bundle", bundles=True)
    told = json.loads((out / "bundle-cpu" / "manifest.json").read_text())
    assert [e["name"] for e in told["engines"]] == ["teacher fp32", "supervised fp32", "supervised int8"]
