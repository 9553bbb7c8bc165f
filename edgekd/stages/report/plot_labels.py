"""Where the names of dots stand in a plot, so that they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]  # left, bottom, right, top in points


def offsets(
    axes: Axes, dots: Sequence[tuple[float, ...]], names: Sequence[str], taken: Sequence[Box]
) -> list[tuple[float, float]]:
    """Where each dot's label begins, in points from it: the nearest place that covers nothing `taken` and no other."""
    frame, taken = axes.get_window_extent(), list(taken)
    rows = sorted((12.0 * k for k in range(-12, 13)), key=abs)
    labels = []
    for (x, y), name in zip(dots, names, strict=True):
        wide = 5.6 * len(name)  # a letter of 9.5 points is about that wide
        middle = max(frame.x0 + 2, min(x - wide / 2, frame.x1 - wide))
        places = [(left, y + row) for row in rows for left in (x + 9, x - 9 - wide, middle)]
        boxes = [(left, level - 6, left + wide, level + 6) for left, level in places]
        free = [
            box
            for box in boxes
            if frame.x0 <= box[0] and box[2] <= frame.x1 + 8 and frame.y0 <= box[1] and box[3] <= frame.y1 + 6
            if not any(overlap(box, other) for other in taken)
        ]
        box = (free or boxes)[0]  # in a crowd that leaves no room, labels may cover each other
        taken.append(box)
        labels.append((box[0] - x, box[1] + 6 - y))
    return labels


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
