"""A trained network on disk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgekd.core import plugins
from edgekd.core.artifact import Weights
from edgekd.core.model import Model
from edgekd.training import checkpoint
from edgekd.training.architecture_diff import ArchitectureDiff, apply_diff
from edgekd.utils.external import external_code


@dataclass(frozen=True)
class TrainedModel:
    """A trained network: the model that builds it, its classes, and its weights."""

    model: Model
    weights: Weights
    classes: tuple[str, ...]  # that it knows, in the order of its logits
    channels: int  # of its images
    diff: ArchitectureDiff = ArchitectureDiff()  # what its method changed beyond weights

    def network(self) -> nn.Module:
        """Return the module, with its weights."""
        module = apply_diff(self.model.build(len(self.classes), self.channels), self.diff)
        checkpoint.load(module, self.weights.file.path)
        return module.eval()


def build_network(family: Model, classes: int, channels: int) -> nn.Module:
    """Return a new network. Raises ConfigError for settings that make none: one that no memory holds, say."""
    name = plugins.name_of(family)
    with external_code(f"a network of the family `{name}` cannot be built as it is set", "check its width and depth"):
        return family.build(classes, channels)
