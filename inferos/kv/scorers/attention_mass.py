"""Attention alone."""

from __future__ import annotations

from dataclasses import dataclass

from inferos.kv.scorers.base import HeaviestTokens
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["AttentionMass"]


@dataclass(frozen=True, slots=True)
class AttentionMass(HeaviestTokens):
    """Averaged attention mass without the value's norm (heavy hitters, https://arxiv.org/abs/2306.14048)."""

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """See `Scorer.score`."""
        return self.of_blocks(tokens.mass, tokens, blocks)
