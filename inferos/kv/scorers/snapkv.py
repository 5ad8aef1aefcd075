"""What the end of the prompt looks at, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inferos.errors import ConfigError
from inferos.kv.scorers.base import HeaviestTokens, check_count
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["SnapKV"]


@dataclass(frozen=True, slots=True)
class SnapKV(HeaviestTokens):
    """Attention mass, averaged over neighbouring tokens (https://arxiv.org/abs/2404.14469).

    A token beside a heavy one counts too, so that what belongs together is kept together. The paper looks once, with
    the prompt's last queries: right behind a prompt `mass` is just that, of the last 64. Later the average goes on
    with the decoded tokens' queries; to freeze the scores as the paper does, call this once, behind the prompt.

    Parameters
    ----------
    heaviest : int, default 8
        As in `HeaviestTokens`.
    pool : int, default 5
        Tokens averaged over, centred; odd, 1..63.

    Raises
    ------
    ConfigError
        If an option is out of range.
    """

    pool: int = 5

    def __post_init__(self) -> None:
        HeaviestTokens.__post_init__(self)
        check_count(self, "pool", self.pool, 1, 63)
        if self.pool % 2 == 0:
            raise ConfigError(f"SnapKV: pool {self.pool} is even, wanted an odd number")

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """See `Scorer.score`."""
        return self.of_blocks(_pooled(tokens.mass, self.pool), tokens, blocks)


def _pooled(values: Float64, width: int) -> Float64:
    """Centred moving average of the measured values; NaN where the value itself was not measured."""
    if values.size == 0:
        return values
    known = ~np.isnan(values)

    def sums(row: Float64) -> Float64:
        upto = np.concatenate([[0.0], np.cumsum(np.pad(row, width // 2))])
        within: Float64 = upto[width:] - upto[:-width]
        return within

    counts = np.maximum(sums(known.astype(np.float64)), 1.0)
    return np.where(known, sums(np.where(known, values, 0.0)) / counts, np.nan)
