"""Intervals: a circular block bootstrap of means and percentiles, Wilson's interval of a share.

The bootstrap (https://doi.org/10.1214/aos/1176347265) resamples blocks of neighbouring values, because neighbouring
positions of one text are not independent. Intervals are 95 % percentile intervals, the same for the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inferos.errors import ConfigError

__all__ = ["Interval", "interval", "mean_interval", "percentile_interval", "resampled_means", "wilson"]

Float64 = npt.NDArray[np.float64]

_BLOCK = 32  # positions
_RESAMPLES = 2000
_AT_ONCE = 1 << 22  # values of resamples held at one time
_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def interval(resampled: Float64) -> Interval:
    """The 95 % percentile interval of a statistic's resamples."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(low), float(high))


def resampled_means(values: Float64, block: int = _BLOCK) -> Float64:
    """Means of `_RESAMPLES` circular block resamples of values (positions,)."""
    count = len(values)
    block = min(block, count)
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    block_sums = around[block:] - around[:-block]
    starts = _starts(count, block)
    means: Float64 = block_sums[starts].sum(axis=1) / (starts.shape[1] * block)
    return means


def mean_interval(values: Float64, block: int = _BLOCK) -> Interval:
    """The interval of the mean of values (positions,)."""
    return interval(resampled_means(values, block))


def percentile_interval(values: Float64, percent: float, block: int = _BLOCK) -> Interval:
    """The interval of a percentile, 0..100, of values (positions,)."""
    found = [np.percentile(rows, percent, axis=1) for rows in _resamples(values, min(block, len(values)))]
    return interval(np.concatenate(found))


def _starts(count: int, block: int) -> npt.NDArray[np.int64]:
    """First positions (resamples, blocks) of the blocks of every resample."""
    return np.random.default_rng(0).integers(0, count, (_RESAMPLES, -(-count // block)))


def _resamples(values: Float64, block: int) -> Iterator[Float64]:
    """Resamples (some, values), a bounded number of values at a time."""
    count = len(values)
    starts = _starts(count, block)
    rows = max(1, _AT_ONCE // (starts.shape[1] * block))
    offsets = np.arange(block)
    for first in range(0, len(starts), rows):
        places = (starts[first : first + rows, :, None] + offsets) % count
        yield values[places.reshape(len(places), -1)]


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (https://doi.org/10.1080/01621459.1927.10502953).

    Raises
    ------
    ConfigError
        If not 0 <= right <= total and total > 0.
    """
    if total <= 0 or not 0 <= right <= total:
        raise ConfigError(f"wilson: {right} of {total}, expected 0 <= right <= total and total > 0")
    share, z2 = right / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # At the ends the interval touches 0 or 1 exactly; rounding must not push it past the share.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)
