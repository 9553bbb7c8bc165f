"""The doctor looks for all that edgekd needs, and calls nothing missing that is merely slow."""

import re
import tomllib
from pathlib import Path

from edgekd.stages.doctor import NEEDED, examine, int8_speed


def test_every_dependency_is_looked_for():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    assert set(NEEDED) == wanted


def test_a_processor_without_int8_products_is_told_and_not_missing(tmp_path):
    assert "little speed-up" in int8_speed(("avx2",))
    assert "little" not in int8_speed(("avx2", "avx512_vnni"))
    assert [f.fine for f in examine(tmp_path) if f.what == "int8"] == [True]
