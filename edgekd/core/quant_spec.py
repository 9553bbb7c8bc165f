"""What an INT8 file of a network rounds, for methods that train with it."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.core.artifact import Mark
from edgekd.core.quant_scheme import Dialect


@dataclass(frozen=True)
class Rounded:
    """A tensor that the INT8 file of a network rounds, with all that are rounded in the same steps."""

    marks: tuple[Mark, ...]  # the tensor's own first
    low: float  # calibrated range
    high: float
    readers: tuple[Mark, ...] | None  # who takes it rounded, by their weights, else by their outputs; None: everyone


@dataclass(frozen=True)
class Blueprint:
    """What the INT8 file of a network rounds, and how."""

    dialect: Dialect
    tensors: tuple[Rounded, ...]
    weights: tuple[tuple[Mark, bool], ...]  # BatchNorms folded in; with a scale for each output channel or for all
