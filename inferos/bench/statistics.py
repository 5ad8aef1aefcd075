"""Medians with their confidence interval, and a line through measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Line", "fit_line", "median_interval", "median_ratio"]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval that holds the median with at least this confidence, whatever the distribution.

    Two order statistics: the number of values below the median is binomial. None where there are too few values.

    Parameters
    ----------
    values : sequence of float
    confidence : float, default 0.95
    """
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0  # tail = P(fewer than rank + 1 values lie below the median)
    for k in range(n // 2):
        tail += math.comb(n, k) / 2.0**n
        if 2 * tail > 1 - confidence:
            break
        rank = k + 1
    return (ordered[rank - 1], ordered[n - rank]) if rank else None


def median_ratio(base: Sequence[float], own: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Median of base / own over pairs that were measured next to each other, and its interval."""
    ratios = [b / o for b, o in zip(base, own, strict=True)]
    return statistics.median(ratios), median_interval(ratios)


@dataclass(frozen=True, slots=True)
class Line:
    """y = intercept + slope * x, with y - that for each point, and the largest of those relative to y."""

    slope: float
    intercept: float
    residuals: tuple[float, ...]
    worst_relative_residual: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares on the relative error, so that small and large points count the same.

    Parameters
    ----------
    x, y : sequences of float
        At least two points, y above 0.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    design = np.stack([xs, np.ones_like(xs)], 1) / ys[:, None]
    slope, intercept = np.linalg.lstsq(design, np.ones_like(ys), rcond=None)[0]
    residuals = ys - (intercept + slope * xs)
    worst = float(np.max(np.abs(residuals / ys)))
    return Line(float(slope), float(intercept), tuple(residuals.tolist()), worst)
