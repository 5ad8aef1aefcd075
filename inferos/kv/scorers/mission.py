"""Attention, frequency, meaning and age together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inferos.kv.importance import ImportanceCalculator
from inferos.kv.scorers.base import HEAVIEST, Scorer, best_mean, measured_mean
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["MissionImportance"]


@dataclass(frozen=True, slots=True)
class MissionImportance(Scorer):
    """`ImportanceCalculator` over what the cache measures. Every term is a share or a rank, 0..1:

    * attention: the block's rank by attention times value norm among the blocks that were measured;
    * frequency: the share of its tokens that receive more than an equal share of the attention;
    * semantic: how little its keys resemble the mean key, (1 - cosine) / 2;
    * age: 0 for the newest of the blocks, 1 for the oldest.

    A block of which a term was not measured scores NaN.

    Parameters
    ----------
    alpha, beta, gamma, eta : float
        Weights, as in `ImportanceCalculator`.

    Raises
    ------
    ConfigError
        If they are out of range.
    """

    alpha: float = 0.4
    beta: float = 0.3
    gamma: float = 0.2
    eta: float = 0.1

    def __post_init__(self) -> None:
        self._calculator()

    def _calculator(self) -> ImportanceCalculator:
        return ImportanceCalculator(self.alpha, self.beta, self.gamma, self.eta)

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:
        """See `Scorer.score`."""
        if len(blocks) == 0:
            return np.empty(0)
        mass = blocks.table(tokens.mass, tokens)
        equal = 1.0 / max(len(tokens), 1)
        frequent = np.where(np.isnan(mass), np.nan, mass > equal)
        likeness = blocks.table(tokens.key_similarity, tokens)
        span = blocks.stop.max() - blocks.stop.min()
        return self._calculator().calculate(
            attention=_ranks(best_mean(blocks.table(tokens.mass * tokens.value_norm, tokens), HEAVIEST)),
            frequency=measured_mean(frequent),
            semantic=np.clip((1.0 - measured_mean(likeness)) / 2.0, 0.0, 1.0),
            age=(blocks.stop.max() - blocks.stop) / max(span, 1),
        )


def _ranks(scores: Float64) -> Float64:
    """Fractional rank of every measured score, 0..1; equal scores share their mean rank."""
    known = ~np.isnan(scores)
    ranks = np.full(scores.shape, np.nan)
    ordered = np.sort(scores[known])
    below, upto = (np.searchsorted(ordered, scores[known], side) for side in ("left", "right"))
    ranks[known] = (below + upto - 1) / 2 / max(ordered.size - 1, 1)
    return ranks
