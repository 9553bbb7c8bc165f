"""Histograms of tensor values in a fixed number of bins, and where to clip them for 8 bits."""

from __future__ import annotations

import math

import numpy as np

SIDE = 4096  # bins on either side of 0: 8 or more to a step of unsigned INT8 over all values, 16 of signed
FINEST = -126  # exponent of the narrowest bin: its inverse is still a float32
STEPS, SIGNED_STEPS = 255, 127  # of INT8: from the lowest to the highest value, and from 0 to the largest magnitude
EMPTY = 1e-4  # values in a level without any, as onnxruntime smooths its histograms
CANDIDATES = 100  # thresholds to compare, evenly spaced up to the largest magnitude, which is the first
FRACTIONS = tuple(n / CANDIDATES for n in range(CANDIDATES, 0, -1))


class Histogram:
    """Counts of values in the bins [k w, (k + 1) w), k from -SIDE to SIDE - 1.

    w is a power of two, the smallest that holds all values: they are binned without rounding, bins merge in pairs when
    the values outgrow them, and neither the order of the values nor their portions change the result.
    """

    def __init__(self) -> None:
        self.exponent = FINEST  # of w
        self.counts = np.zeros(2 * SIDE, np.int64)

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    def add(self, values: np.ndarray, reach: float) -> None:
        """Count finite float32 `values`, none of which has a magnitude above `reach`."""
        if reach:
            self.widen(math.frexp(reach)[1] - int(math.log2(SIDE)))
        bins = np.multiply(values, np.float32(math.ldexp(1.0, -self.exponent))).ravel()
        np.floor(bins, out=bins)
        places = bins.astype(np.int64)
        places += SIDE
        self.counts += np.bincount(places, minlength=2 * SIDE)

    def widen(self, exponent: int) -> None:
        """Merge bins until their width is 2 to that power."""
        while self.exponent < exponent:
            if not self.counts.any():
                self.exponent = exponent
                return
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(2 * SIDE, np.int64)
            self.counts[SIDE // 2 : SIDE // 2 + SIDE] = merged
            self.exponent += 1

    def magnitudes(self) -> np.ndarray:
        """Return the counts of |x|, (SIDE,), in the bins from 0 on."""
        return self.counts[SIDE:] + self.counts[:SIDE][::-1]

    def occupied(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the middles of the bins that are not empty, and their counts; both float64."""
        places = np.flatnonzero(self.counts)
        return (places - SIDE + 0.5) * self.width, self.counts[places].astype(np.float64)


def percentile(histogram: Histogram, percent: float) -> tuple[float, float]:
    """Return the bounds that keep `percent` of the values, as many cut off below as above; up to a bin too wide."""
    below = np.cumsum(histogram.counts)
    cut = below[-1] * (1 - percent / 100) / 2
    lowest = int(np.searchsorted(below, cut, side="right"))
    highest = int(np.searchsorted(below, below[-1] - cut, side="left"))
    return (lowest - SIDE) * histogram.width, (highest + 1 - SIDE) * histogram.width


def magnitude_percentile(histogram: Histogram, percent: float) -> float:
    """Return the magnitude that `percent` of the values do not exceed; up to a bin too large."""
    below = np.cumsum(histogram.magnitudes())
    return float(np.searchsorted(below, below[-1] * percent / 100, side="left") + 1) * histogram.width


def entropy(histogram: Histogram, levels: int) -> float:
    """Return the magnitude to clip at so that |x| in `levels` levels diverges least from |x| (Kullback-Leibler).

    As in Migacz, 8-bit inference with TensorRT, GTC 2017. Exact zeros, which any range represents, would drown the
    rest: their bin counts as its neighbour. Of equal thresholds the largest.
    """
    counts = histogram.magnitudes().astype(np.float64)
    counts[0] = counts[1]
    used = np.flatnonzero(counts)
    if not len(used) or used[-1] < levels:
        return SIDE * histogram.width
    ends = np.unique(np.linspace(levels, used[-1] + 1, CANDIDATES).astype(int))[::-1]
    losses = [divergence(counts, int(end), levels) for end in ends]
    return float(ends[int(np.argmin(losses))]) * histogram.width


def divergence(counts: np.ndarray, end: int, levels: int) -> float:
    """Return the divergence of `counts`, clipped at bin `end`, from the same in `levels` levels."""
    kept = counts[:end]
    clipped = kept.copy()
    clipped[-1] += counts[end:].sum()
    level = np.arange(end) * levels // end
    live = clipped > 0
    mean = np.bincount(level, kept, levels) / np.maximum(np.bincount(level, live, levels), 1)
    spread = np.maximum(mean[level][live], EMPTY)  # a level that holds outliers only
    p, q = clipped[live] / clipped.sum(), spread / spread.sum()
    return float((p * np.log(p / q)).sum())


def least_error(histogram: Histogram, lowest: float, highest: float) -> tuple[float, float]:
    """Return the bounds, within those given, with the least mean squared error of 8-bit numbers with a zero point.

    The upper bound is searched first, then the lower.
    """
    values, counts = histogram.occupied()
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    if highest > 0:
        highest = min(
            (fraction * highest for fraction in FRACTIONS), key=lambda end: error(values, counts, lowest, end)
        )
    if lowest < 0:
        lowest = min((fraction * lowest for fraction in FRACTIONS), key=lambda end: error(values, counts, end, highest))
    return lowest, highest


def error(values: np.ndarray, counts: np.ndarray, lowest: float, highest: float) -> float:
    """Return the sum of squared differences to 8-bit numbers from `lowest` to `highest`, one of which is 0."""
    step = (highest - lowest) / STEPS
    zero = round(-lowest / step)
    kept = (np.clip(np.rint(values / step), -zero, STEPS - zero)) * step
    return float(counts @ (values - kept) ** 2)


def least_symmetric_error(histogram: Histogram, reach: float) -> float:
    """Return the magnitude, at most `reach`, with the least mean squared error of signed symmetric 8-bit numbers."""
    values, counts = histogram.occupied()

    def loss(end: float) -> float:
        step = end / SIGNED_STEPS
        kept = np.clip(np.rint(values / step), -SIGNED_STEPS, SIGNED_STEPS) * step
        return float(counts @ (values - kept) ** 2)

    return min((fraction * reach for fraction in FRACTIONS), key=loss)
