"""One run of a pipeline: its configuration, and the cache of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgekd.config import BuildConfig
from edgekd.core.artifact import File
from edgekd.core.dataset import PreparedDataset
from edgekd.core.step_cache import StepCache
from edgekd.core.target import Target
from edgekd.stages.quantize.calibration_set import CalibrationSet
from edgekd.training.trained_model import TrainedModel


@dataclass(frozen=True)
class Run:
    """A configuration, and the cache of its steps."""

    config: BuildConfig
    cache: StepCache

    def depends_on(self, dependencies: Any, is_valid: Callable[[Any], bool] = lambda output: True) -> Run:
        """Return the same run, with steps that depend on more; see `StepCache.depends_on`."""
        return replace(self, cache=self.cache.depends_on(dependencies, is_valid))

    def on(self, name: str, target: Target) -> TargetRun:
        """Return the part of the run that is about one target."""
        return TargetRun(self.config, self.cache, name, target)

    def opset(self, target: Target) -> int:
        """Return the opset of the files for a target: as configured, or the highest that its runtime reads."""
        configured = self.config.export.opset
        return min(configured, target.deployment_plan.opset or configured)

    def opset_suffix(self, opset: int) -> str:
        """Return what ends the names of steps for another opset than the configured one."""
        return "" if opset == self.config.export.opset else f"-opset{opset}"


@dataclass(frozen=True)
class TargetRun(Run):
    """The part of a run that is about one target."""

    name: str  # of the target, unique within the build
    target: Target


@dataclass(frozen=True)
class BuildInputs:
    """What is quantized and measured on every target."""

    dataset: PreparedDataset
    calibration: CalibrationSet
    inputs: File  # test images as a network takes them
    networks: tuple[TrainedModel, ...]  # the teacher first
