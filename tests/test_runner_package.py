"""The runner as a package: what it may import, how it is started, and how it is packed into one file."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from edgekd.stages.bench import runner as host
from edgekd.stages.bench.runner import pack_runner, runner_path
from tests.standins.bundles import make_bundle, read_result

FOLDER = runner_path()
MODULES = {
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
AGENT = "edgekd_runner.ssh_agent"
RUNTIMES = {"numpy", "onnxruntime", "openvino"}  # tensorrt is loaded by its name, in children only
NEWER = {"dataclasses", "contextvars", "importlib.resources", "importlib.metadata", "zoneinfo", "graphlib", "tomllib"}
NEWER_WORDS = ("capture_output", "annotations", "removeprefix", "removesuffix", "text=True", "missing_ok")


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), feature_version=(3, 6))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_python_3_6_and_says_what_it_is(module: str) -> None:
    tree = tree_of(module)
    assert ast.get_docstring(tree), "a module begins with one sentence that says what it is"
    assert not imported(ast.walk(tree)) & NEWER, "newer than 3.6, though the grammar takes them"
    for word in NEWER_WORDS:
        assert not re.search(rf"\b{word}\b", MODULES[module].read_text()), word
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, node.name


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_itself_the_standard_library_and_in_functions_a_runtime(module: str) -> None:
    tree = tree_of(module)
    at_top = imported(iter(tree.body))
    outside = {name.partition(".")[0] for name in imported(ast.walk(tree)) - MODULES.keys()} - sys.stdlib_module_names
    assert outside <= RUNTIMES and not outside & {name.partition(".")[0] for name in at_top}
    inside = imported(ast.walk(tree)) & MODULES.keys()
    assert inside <= at_top, "its own modules are imported at the top"
    if module == AGENT:
        assert not outside and not inside, "its text alone is sent to a device"


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {module: imported(ast.walk(tree_of(module))) & MODULES.keys() for module in MODULES}
    assert list(TopologicalSorter(graph).static_order()), "a CycleError names the circle"


def test_one_file_holds_the_package_and_is_byte_equal_whenever_and_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_runner(tmp_path / "one.pyz")
    copy = tmp_path / "elsewhere" / "edgekd_runner"
    for name, path in reversed(MODULES.items()):  # another order in the folder, other dates, other rights
        place = copy / path.relative_to(FOLDER)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
        place.chmod(0o600)
        os.utime(place, (len(name), 10**9))
    monkeypatch.setattr(host, "runner_path", lambda: copy)
    pack_runner(tmp_path / "other.pyz")
    assert (tmp_path / "one.pyz").read_bytes() == (tmp_path / "other.pyz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.pyz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert len(archive.namelist()) == len(MODULES) + 1


@pytest.mark.parametrize("way", ["folder", "module", "file"])
def test_it_and_its_children_start_by_the_folder_as_a_module_and_from_one_file(tmp_path: Path, way: str) -> None:
    pack_runner(tmp_path / "runner.pyz")
    program = {"folder": [str(FOLDER)], "module": ["-m", "edgekd_runner"], "file": ["runner.pyz"]}[way]
    home = make_bundle(tmp_path / "bundle")
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)} if way == "module" else None
    for command in ("doctor", "build"):  # both start children
        words = [sys.executable, *program, command, "--bundle", str(home)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert set(read_result(home, "doctor")["versions"]) == {"numpy", "onnxruntime"}
    assert not any("error" in engine for engine in read_result(home, "build")["engines"])


def test_its_modules_hide_no_module_of_the_system_from_it(tmp_path: Path) -> None:
    """Started by its folder, `power` or `errors` must not be found at the top of sys.path."""
    code = f"import runpy, sys; sys.argv = ['x', 'doctor']; runpy.run_path({str(FOLDER)!r}, run_name='__main__')"
    code = f"import atexit, json, sys; atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    names = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "edgekd_runner" in names and not names & {"power", "errors", "results", "bench", "checks"}
