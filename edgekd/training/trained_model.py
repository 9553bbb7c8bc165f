"""A trained network on disk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgekd.core import plugins
from edgekd.core.artifact import Weights
from edgekd.core.model import Model
from edgekd.training import checkpoint
from edgekd.training.architecture_diff import Surgery, operated
from edgekd.utils.external import foreign


@dataclass(frozen=True)
class Trained:
    """A trained network: what builds it, what it answers, and its weights."""

    model: Model
    weights: Weights
    classes: tuple[str, ...]  # that it knows, in the order of its logits
    channels: int  # of its images
    surgery: Surgery = Surgery()  # what its method changed beyond weights

    def network(self) -> nn.Module:
        """The module, with its weights."""
        module = operated(self.model.build(len(self.classes), self.channels), self.surgery)
        checkpoint.load(module, self.weights.file.path)
        return module.eval()


def built(family: Model, classes: int, channels: int) -> nn.Module:
    """A new network. Raises ConfigError for settings that make none: one that no memory holds, say."""
    name = plugins.name_of(family)
    with foreign(f"a network of the family `{name}` cannot be built as it is set", "check its width and depth"):
        return family.build(classes, channels)
