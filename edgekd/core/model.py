"""The interface of a network family: settings that build a network for a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.core.settings import Plugin

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Model(Plugin, ABC):
    """A family of networks, with the settings of one network."""

    FOLDER: ClassVar[str] = "models"

    @abstractmethod
    def build(self, classes: int, channels: int) -> nn.Module:
        """Build a network with random weights.

        Args:
            classes: number of logits.
            channels: of the images.

        Returns:
            A module that maps (N, channels, H, W) float32 to (N, classes) logits.
        """
