"""The half that measures never needs torch; which way imports run is import-linter's (pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "edgekd"
FILES = sorted(ROOT.rglob("*.py"))
TORCH_FREE = [
    *("core.step_cache", "core.serialization", "core.method", "core.config_file", "onnx.inspect", "onnx.session"),
    *("targets.cpu", "targets.jetson", "targets.tensorrt", "metrics.latency", "cli.main", "stages.doctor"),
    *("stages.bench.benchmark", "stages.bench.compare_files", "stages.report.report", "stages.report.regressions"),
    *("stages.quantize.quantize", "stages.quantize.calibration_set", "stages.mixed_precision.search"),
    *("stages.device.bundle", "stages.device.ssh", "stages.device.remote", "stages.device.results"),
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_modules_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module begins with one line that says what it is"
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
        if path.parent.name in ("methods", "recipes") or path.name == "renamed.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{path}: {node.value}"
