"""Pairs of a teacher's and a student's layer between which knowledge can be projected."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.training.layer_discovery import Layer, cuts, layers, look

SHOWN = 3  # pairs that an error tells of


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
    nearest = []
    for own in reversed(thin):
        fitting = [Candidate(theirs, own) for theirs in wide if theirs.size == own.size]
        nearest += sorted(fitting, key=lambda c: c.mismatch)[:1]
    found = [near for near in nearest if near.mismatch <= tolerance]
    if nearest and not found:
        raise far(nearest, tolerance)
    if not found:
        sizes = [sorted({"{}x{}".format(*layer.size) for layer in side}) for side in (wide, thin)]
        raise ConfigError(
            "no layer of the student has the size of one of the teacher's "
            f"(teacher: {', '.join(sizes[0])}; student: {', '.join(sizes[1])})",
            hint="choose a student that shrinks maps alike",
        )
    return found


def far(nearest: list[Candidate], tolerance: float) -> ConfigError:
    """No pair of equal size is near enough: the nearest ones with what they see, and the tolerance that lets one in."""
    closest = sorted(nearest, key=lambda c: c.mismatch)[:SHOWN]
    told = [f"{c.teacher.path} {c.teacher.receptive}, {c.student.path} {c.student.receptive}" for c in closest]
    return ConfigError(
        f"the receptive fields of all layers of equal size differ by more than the share of {tolerance:g} "
        f"(teacher's, student's, in pixels: {'; '.join(told)})",
        hint=f"set receptive_tolerance to {math.ceil(100 * closest[0].mismatch) / 100:g} or more, or name `routes`",
    )


def named(teacher: nn.Module, student: nn.Module, theirs: str, own: str, x: Tensor) -> Candidate:
    """A route that the user named by the paths of its layers. Raises ConfigError if they do not exist or do not fit."""
    found = Candidate(look(teacher, theirs, x, "teacher"), look(student, own, x, "student"))
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


def check_partners(chosen: list[Candidate], keep: int) -> None:
    """Raises ConfigError where routes that may be taught together end in one layer: only one feature can go there."""
    layers = [route.student.path for route in chosen]
    twice = next((path for path in layers if layers.count(path) > 1), None)
    if keep > 1 and twice:
        raise ConfigError(f"two routes end in `{twice}` of the student", hint="set keep to 1, or name other layers")
