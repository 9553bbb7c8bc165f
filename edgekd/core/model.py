"""What a family of networks is: settings that build one for a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.core.settings import Plugin

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Model(Plugin, ABC):
    """A family of networks, with the settings of one member."""

    FOLDER: ClassVar[str] = "models"

    @abstractmethod
    def build(self, classes: int, channels: int) -> nn.Module:
        """A network with random weights: (N, channels, H, W) float32 to (N, classes) logits."""
