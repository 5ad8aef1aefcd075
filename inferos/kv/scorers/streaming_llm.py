"""Attention sinks and age."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inferos.kv.scorers.base import Scorer, check_count
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, slots=True)
class StreamingLLM(Scorer):
    """The first tokens are worth most, then the newest (https://arxiv.org/abs/2309.17453).

    Parameters
    ----------
    sinks : int, default 4
        First tokens whose blocks are never given up, 0..512.

    Raises
    ------
    ConfigError
        If it is out of range.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        check_count(self, "sinks", self.sinks, 0, 512)

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:  # noqa: ARG002 - positions are enough
        """See `Scorer.score`."""
        return np.where(blocks.start < self.sinks, np.inf, blocks.stop)
