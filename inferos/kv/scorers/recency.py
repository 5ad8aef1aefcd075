"""Age alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inferos.kv.scorers.base import Scorer
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["Recency"]


@dataclass(frozen=True, slots=True)
class Recency(Scorer):
    """Newer blocks are worth more. What a cache does that looks at nothing; a baseline."""

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:  # noqa: ARG002 - it looks at nothing
        """See `Scorer.score`."""
        return blocks.stop.astype(np.float64)
