"""What a scorer is, and the two ways most of them get from tokens to blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from inferos.errors import ConfigError
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["HEAVIEST", "HeaviestTokens", "Scorer", "best_mean", "check_count", "measured_mean"]

HEAVIEST = 8  # tokens: as the cache's own score counts (kernels::kHeaviest)


class Scorer(ABC):
    """Says what each block of one (layer, kv head) is worth. A frozen dataclass of its options; no state."""

    __slots__ = ()

    @abstractmethod
    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """Worth of every block.

        Parameters
        ----------
        tokens : TokenStatistics
        blocks : Blocks

        Returns
        -------
        (blocks,) float64
            Higher = keep longer; only the order counts. NaN where nothing is known.
        """


@dataclass(frozen=True, slots=True)
class HeaviestTokens(Scorer):
    """Base of scorers that weigh tokens: a block is worth the mean of its heaviest ones.

    One token worth keeping is enough for its block; an average over 64 would hide it.

    Parameters
    ----------
    heaviest : int, default 8
        Tokens of a block that count, 1..64.

    Raises
    ------
    ConfigError
        If it is out of range.
    """

    heaviest: int = HEAVIEST

    def __post_init__(self) -> None:
        check_count(self, "heaviest", self.heaviest, 1, 64)

    def of_blocks(self, worth: Float64, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """Scores (blocks,) from the worth of every token (tokens,)."""
        return best_mean(blocks.table(worth, tokens), self.heaviest)


def check_count(scorer: object, name: str, value: object, low: int, high: int) -> None:
    """Refuse an option that is no whole number within low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{type(scorer).__name__}: {name} {value!r} is not a whole number within {low}..{high}")


def best_mean(table: Float64, count: int) -> Float64:
    """Mean of the `count` highest measured values of each row (rows, columns) -> (rows,); NaN without any."""
    # NaN sorts last: highest first means smallest of the negated.
    return measured_mean(-np.sort(-table, axis=1)[:, :count])


def measured_mean(table: Float64) -> Float64:
    """Mean of the measured values of each row (rows, columns) -> (rows,); NaN without any."""
    known = ~np.isnan(table)
    counts = known.sum(1)
    sums = np.where(known, table, 0.0).sum(1)
    means: Float64 = np.divide(sums, counts, out=np.full(len(table), np.nan), where=counts > 0)
    return means
