"""The doctor looks for all that edgekd needs, and calls nothing missing that is merely slow."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekd.cli.main import app
from edgekd.core import plugins
from edgekd.stages.doctor import NEEDED, Check, check_machine, check_ssh, check_target, format_checks, int8_speed
from edgekd.targets.openvino import OpenVino


def test_every_dependency_is_looked_for():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    assert set(NEEDED) == wanted


def test_a_processor_without_int8_products_is_told_and_not_missing(tmp_path):
    assert "little speed-up" in int8_speed(("avx2",))
    assert "little" not in int8_speed(("avx2", "avx512_vnni"))
    assert [f.fine for f in check_machine(tmp_path) if f.what == "int8"] == [True]


def test_every_target_says_what_it_needs_and_only_the_default_one_must_be_here(tmp_path):
    found = {f.what.removeprefix("target "): f for f in check_machine(tmp_path) if f.what.startswith("target ")}
    assert set(found) == set(plugins.names("targets"))
    assert found["cpu"].fine and found["cpu"].needed
    assert found["jetson"].fine and "--device" in found["jetson"].detail and "import-result" in found["jetson"].detail
    assert not any(f.needed for name, f in found.items() if name != "cpu")


def test_what_a_target_lacks_comes_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("edgekd.targets.openvino.find_spec", lambda name: None)
    lacking = check_target("openvino", OpenVino())
    assert not lacking.fine and not lacking.needed
    assert "pip install 'edgekd[openvino]'" in lacking.detail and "--device" in lacking.fix
    assert format_checks([lacking]).splitlines()[0].startswith("not here target openvino")


def test_without_ssh_only_devices_are_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = check_ssh()
    assert not lacking.fine and not lacking.needed and "openssh-client" in lacking.fix


@pytest.mark.parametrize(("needed", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_is_0_unless_the_default_use_lacks_something(needed, code, monkeypatch):
    found = [Check("python", True, "3.11.7"), Check("it", False, "gone", "get it", needed)]
    monkeypatch.setattr("edgekd.stages.doctor.check_machine", lambda place: found)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == code
    assert [f["needed"] for f in json.loads(done.stdout)] == [True, needed]
