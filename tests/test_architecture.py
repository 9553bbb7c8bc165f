"""Imports run one way, files stay short, and the half that measures never needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "edgekd"
FILES = sorted(ROOT.rglob("*.py"))
RANK = {
    "core": 0,
    "learn": 1,
    "methods": 2,
    "targets": 2,
    "metrics": 2,
    "models": 2,
    "data": 2,
    "stages": 3,
    "recipes": 4,
    "configuration": 4,
    "console": 4,
    "quantization": 5,
    "delivery": 5,
    "pipeline": 5,
    "marking": 5,
    "comparison": 5,
    "arrival": 5,
    "cli_files": 6,
    "cli": 6,
    "__main__": 7,
}
PLUGINS = {"methods", "targets", "metrics", "models", "data"}
TORCH_FREE = ["core.ledger", "core.plain", "core.method", "core.config", "core.onnx_facts", "targets.cpu"]
TORCH_FREE += ["targets.jetson", "targets.tensorrt", "metrics.p99_ms", "cli", "stages.doctor"]
TORCH_FREE += ["stages.bench.benchmark", "stages.bench.compare", "stages.report.report", "stages.quantize.quantize"]
TORCH_FREE += ["stages.quantize.calibrate", "stages.device.bundle", "stages.device.ssh", "stages.device.remote"]
TORCH_FREE += ["stages.device.results", "stages.report.regressions"]


def layer(dotted):
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "core"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgekd"):
            yield from [f"{node.module}.{a.name}" if node.module == "edgekd" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("edgekd"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    if path.name == "__init__.py":
        assert not list(imports(path))
        return
    me = ".".join(["edgekd", *path.relative_to(ROOT).with_suffix("").parts])
    for other in imports(path):
        if other == "edgekd.__version__":
            continue
        mine, theirs = layer(me), layer(other)
        assert RANK[theirs] <= RANK[mine], f"{me} may not import {other}"
        private = other.rpartition(".")[2].startswith("_")  # a file of the folder that is no plug-in
        assert private or not (mine in PLUGINS and theirs in PLUGINS), f"{me}: a plug-in never imports another"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short_and_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module begins with one line that says what it is"
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 66, node.name


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import edgekd.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_no_method_is_named_outside_of_its_file():
    """A trainer or a stage that knows a method's name is a fork in the making."""
    names = {path.stem for path in (ROOT / "methods").glob("*.py")}
    for path in FILES:
        if path.parent.name in ("methods", "recipes"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{path}: {node.value}"
