"""How much a key differs from the others: for hosts that show no attention."""

from __future__ import annotations

from dataclasses import dataclass

from inferos.kv.scorers.base import HeaviestTokens
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["KeyDiff"]


@dataclass(frozen=True, slots=True)
class KeyDiff(HeaviestTokens):
    """A key unlike the mean key is worth more: minus their cosine (https://arxiv.org/abs/2504.15364)."""

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """See `Scorer.score`."""
        return self.of_blocks(-tokens.key_similarity, tokens, blocks)
