"""Thresholds as shares: how many blocks each level keeps, and which ones go down. The rule of the cache's reviews."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

from inferos.errors import ConfigError

__all__ = ["QuantizationLevel", "allowed_above", "check_thresholds", "demotions", "settled_shares"]

_ROUNDING = 1e-9  # 0.3 * 10 must be 3, not the 3.0000000000000004 that 1 - 0.7 makes of it


class QuantizationLevel(IntEnum):
    """How precisely a block is kept; a block only ever moves on to a higher number."""

    L0 = 0
    """FP16."""
    L1 = 1
    """INT8."""
    L2 = 2
    """K8V4 or INT4."""
    L3 = 3
    """May be evicted; held as L2 until the budget is used up."""


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, float, float]:
    """L1, L2, L3 themselves. Raises ConfigError unless 0 <= L3 <= L2 <= L1 <= 1."""
    given = tuple(thresholds)
    if len(given) != 3 or not 0 <= given[2] <= given[1] <= given[0] <= 1:
        raise ConfigError(f"thresholds: {given} are not three numbers with 0 <= L3 <= L2 <= L1 <= 1")
    return given


def allowed_above(threshold: float, blocks: int) -> int:
    """How many of `blocks` may stay above the level that `threshold` leads to: ceil((1 - threshold) * blocks)."""
    return math.ceil((1.0 - threshold) * blocks - _ROUNDING)


def settled_shares(thresholds: Sequence[float], blocks: int) -> tuple[int, int, int, int]:
    """Blocks at L0, L1, L2, L3 once every verdict about `blocks` unpinned ones is carried out."""
    above1, above2, above3 = (allowed_above(threshold, blocks) for threshold in check_thresholds(thresholds))
    return above1, above2 - above1, above3 - above2, blocks - above3


def demotions(
    levels: Sequence[int], order: Sequence[int], thresholds: Sequence[tuple[float, float, float]]
) -> dict[int, QuantizationLevel]:
    """The blocks to be demoted, lowest importance first and only until each threshold's share holds.

    Parameters
    ----------
    levels : (blocks,)
        Present level of every unpinned block. Blocks demoted earlier count.
    order : indexes of blocks
        Least important first.
    thresholds : (blocks,) of (L1, L2, L3)
        Each block's own.

    Returns
    -------
    dict
        Index of a block -> its new level.
    """
    wanted: dict[int, QuantizationLevel] = {}
    for level in (QuantizationLevel.L3, QuantizationLevel.L2, QuantizationLevel.L1):
        above = sum(wanted.get(index, levels[index]) < level for index in range(len(levels)))
        allowed = [allowed_above(own[level - 1], len(levels)) for own in thresholds]
        least = min(allowed, default=0)
        for index in order:
            if above <= least:
                break
            if wanted.get(index, levels[index]) < level and above > allowed[index]:
                wanted[index] = level
                above -= 1
    return wanted
