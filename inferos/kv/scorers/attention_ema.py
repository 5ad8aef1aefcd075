"""The default: what attention reads, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from inferos.kv.scorers.base import HeaviestTokens
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["AttentionEma"]


@dataclass(frozen=True, slots=True)
class AttentionEma(HeaviestTokens):
    """Averaged attention mass times the value's norm: what a token contributes to the output. The cache's own score."""

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """See `Scorer.score`."""
        return self.of_blocks(tokens.mass * tokens.value_norm, tokens, blocks)
