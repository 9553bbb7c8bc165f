"""Cut a set of labelled samples so that every class keeps its share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stratified(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` samples with the classes' shares kept, and of the others; both sorted.

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
