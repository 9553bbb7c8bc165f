"""Match layers of the teacher with layers of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.errors import ConfigError
from edgekd.training.layer_discovery import LayerInfo, cut_layers, find_layer, is_cut

SHOWN = 3  # pairs in an error message


@dataclass(frozen=True)
class LayerMatch:
    """A layer of the teacher and one of the student."""

    teacher: LayerInfo
    student: LayerInfo

    @property
    def mismatch(self) -> float:
        """The difference of the receptive fields, relative to the teacher's (KPN, section 3.4: at most beta)."""
        return abs(self.student.receptive - self.teacher.receptive) / max(self.teacher.receptive, 1)

    @property
    def name(self) -> str:
        return f"{self.teacher.path}>{self.student.path}"


def match_layers(teacher: nn.Module, student: nn.Module, x: Tensor, tolerance: float) -> list[LayerMatch]:
    """Return for each student layer the teacher layer of equal size with the nearest receptive field, deep ones first.

    Raises:
        ConfigError: if no two layers have equal size and receptive fields within `tolerance`.
    """
    teacher_layers, student_layers = cut_layers(teacher, x), cut_layers(student, x)
    nearest = []
    for layer in reversed(student_layers):
        fitting = [LayerMatch(candidate, layer) for candidate in teacher_layers if candidate.size == layer.size]
        nearest += sorted(fitting, key=lambda c: c.mismatch)[:1]
    matches = [match for match in nearest if match.mismatch <= tolerance]
    if nearest and not matches:
        raise receptive_field_error(nearest, tolerance)
    if not matches:
        sizes = [sorted({"{}x{}".format(*layer.size) for layer in side}) for side in (teacher_layers, student_layers)]
        raise ConfigError(
            "no layer of the student has the size of one of the teacher's "
            f"(teacher: {', '.join(sizes[0])}; student: {', '.join(sizes[1])})",
            hint="choose a student with the same map sizes",
        )
    return matches


def receptive_field_error(nearest: list[LayerMatch], tolerance: float) -> ConfigError:
    """Return the error for pairs that are beyond the tolerance, with the tolerance that would accept the nearest."""
    closest = sorted(nearest, key=lambda c: c.mismatch)[:SHOWN]
    shown = [f"{c.teacher.path} {c.teacher.receptive}, {c.student.path} {c.student.receptive}" for c in closest]
    return ConfigError(
        f"the receptive fields of all layers of equal size differ by more than {tolerance:g} "
        f"(teacher's, student's, in pixels: {'; '.join(shown)})",
        hint=f"set receptive_tolerance to {math.ceil(100 * closest[0].mismatch) / 100:g} or more, or name `routes`",
    )


def match_named_layers(
    teacher: nn.Module, student: nn.Module, teacher_path: str, student_path: str, x: Tensor
) -> LayerMatch:
    """Return a route by the paths of its layers. Raise ConfigError if they do not exist or do not fit."""
    match = LayerMatch(find_layer(teacher, teacher_path, x, "teacher"), find_layer(student, student_path, x, "student"))
    if match.teacher.size != match.student.size:
        sizes = "{}x{} and {}x{}".format(*match.teacher.size, *match.student.size)
        raise ConfigError(
            f"the layers of route {teacher_path} > {student_path} have sizes {sizes}",
            hint="knowledge is projected over channels only; choose layers of equal height and width",
        )
    if not is_cut(student, student_path, x):
        raise ConfigError(
            f"the student has paths around layer `{student_path}`, so injecting there would not replace its front",
            hint="choose a layer that everything passes through, such as the end of a block",
        )
    return match


def check_distinct_ends(routes: list[LayerMatch], num_routes: int) -> None:
    """Raise ConfigError if routes that are trained together end in one layer: only one feature can be injected."""
    layers = [route.student.path for route in routes]
    repeated = next((path for path in layers if layers.count(path) > 1), None)
    if num_routes > 1 and repeated:
        raise ConfigError(
            f"two routes end in `{repeated}` of the student", hint="set num_routes to 1, or name other layers"
        )
