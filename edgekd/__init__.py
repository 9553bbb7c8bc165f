"""edgekd: from a trained teacher to a measured INT8 student on an edge device.

`import edgekd` offers what `edgekd.api` lists, loaded when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd import methods as methods
    from edgekd import models as models
    from edgekd.api import DistilledModel as DistilledModel
    from edgekd.api import Result as Result
    from edgekd.api import benchmark as benchmark
    from edgekd.api import build as build
    from edgekd.api import compare as compare
    from edgekd.api import distill as distill
    from edgekd.api import explain as explain
    from edgekd.api import export as export
    from edgekd.api import lint as lint
    from edgekd.api import load_config as load_config
    from edgekd.api import quantize as quantize
    from edgekd.config import BuildConfig as BuildConfig
    from edgekd.core.dataset import Dataset as Dataset
    from edgekd.core.method import Batch as Batch
    from edgekd.core.method import Method as Method
    from edgekd.core.method import Phase as Phase
    from edgekd.core.method import TrainingContext as TrainingContext
    from edgekd.core.target import Target as Target
    from edgekd.core.task import Task as Task
    from edgekd.errors import EdgekdError as EdgekdError
    from edgekd.pipelines.build_result import BuildResult as BuildResult

__version__ = "0.1.0"
__all__ = [
    *("distill", "export", "quantize", "benchmark", "explain", "lint", "compare", "build", "load_config"),
    *("methods", "models", "Batch", "BuildConfig", "BuildResult", "Dataset", "DistilledModel", "EdgekdError"),
    *("Method", "Phase", "Result", "Target", "Task", "TrainingContext"),
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "models"):
        import_module("edgekd.api")
        return import_module(f"edgekd.{name}")
    if name in __all__:
        return getattr(import_module("edgekd.api"), name)
    raise AttributeError(f"module 'edgekd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
