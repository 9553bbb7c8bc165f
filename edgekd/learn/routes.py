"""Pairs of a teacher's and a student's layer between which knowledge can be projected."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.core.errors import ConfigError
from edgekd.learn.layers import Layer, cuts, layers, look


@dataclass(frozen=True)
class Candidate:
    teacher: Layer
    student: Layer

    @property
    def mismatch(self) -> float:
        """By how much the receptive fields differ, as a share of the teacher's (KPN, section 3.4: at most beta)."""
        return abs(self.student.receptive - self.teacher.receptive) / max(self.teacher.receptive, 1)

    @property
    def name(self) -> str:
        return f"{self.teacher.path}>{self.student.path}"


def candidates(teacher: nn.Module, student: nn.Module, x: Tensor, tolerance: float) -> list[Candidate]:
    """For each student layer the teacher layer of equal size with the nearest receptive field; deep ones first.

    Raises ConfigError if no two layers have equal size and receptive fields within `tolerance`.
    """
    wide, thin = layers(teacher, x), layers(student, x)
    found = []
    for own in reversed(thin):
        fitting = [Candidate(theirs, own) for theirs in wide if theirs.size == own.size]
        near = min(fitting, key=lambda c: c.mismatch, default=None)
        if near and near.mismatch <= tolerance:
            found.append(near)
    if not found:
        sizes = [sorted({"{}x{}".format(*layer.size) for layer in side}) for side in (wide, thin)]
        raise ConfigError(
            "no layer of the student fits one of the teacher in size and receptive field "
            f"(teacher: {', '.join(sizes[0])}; student: {', '.join(sizes[1])}; receptive_tolerance {tolerance})",
            hint="raise receptive_tolerance, name `routes`, or choose a student that shrinks maps alike",
        )
    return found


def named(teacher: nn.Module, student: nn.Module, theirs: str, own: str, x: Tensor) -> Candidate:
    """A route that the user named by the paths of its layers. Raises ConfigError if they do not exist or do not fit."""
    found = Candidate(look(teacher, theirs, x), look(student, own, x))
    if found.teacher.size != found.student.size:
        sizes = "{}x{} and {}x{}".format(*found.teacher.size, *found.student.size)
        raise ConfigError(
            f"the layers of route {theirs} > {own} have sizes {sizes}",
            hint="knowledge is projected over channels only; choose layers of equal height and width",
        )
    if not cuts(student, own, x):
        raise ConfigError(
            f"the student has paths around layer `{own}`, so injecting there would not replace its front",
            hint="choose a layer that everything passes through, such as the end of a block",
        )
    return found
