"""Split a set of labelled samples so that every class keeps its fraction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def sample_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the indices of `count` samples of each class, sorted. Raise DataError if a class has fewer."""
    import numpy as np

    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) < count:
            raise DataError(
                f"labels_per_class is {count}, but class number {label} has {len(members)} training images",
                hint="use fewer labels per class, or give that class more images",
            )
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


def stratified_split(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of `count` samples with the fractions of the classes kept, and of the others; both sorted.

    The same labels, count and seed give the same cut on every machine.
    """
    import numpy as np

    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    # position of each sample within its class, as a share of the class: taking the lowest takes all classes evenly
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.lexsort((np.arange(len(labels)), rank))[:count]
    return np.sort(chosen), np.setdiff1d(np.arange(len(labels)), chosen)
