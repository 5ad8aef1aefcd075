"""The size of keys: for hosts that show no attention."""

from __future__ import annotations

from dataclasses import dataclass

from inferos.kv.scorers.base import HeaviestTokens
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["KeyNorm"]


@dataclass(frozen=True, slots=True)
class KeyNorm(HeaviestTokens):
    """A key of small norm tends to receive much attention (https://arxiv.org/abs/2406.11430)."""

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """See `Scorer.score`."""
        return self.of_blocks(-tokens.key_norm, tokens, blocks)
