"""A control: what a score is worth shows beside one that means nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inferos.kv.scorers.base import Scorer, check_count
from inferos.kv.statistics import Blocks, Float64, TokenStatistics

__all__ = ["RandomOrder"]


@dataclass(frozen=True, slots=True)
class RandomOrder(Scorer):
    """A number in 0..1 drawn from a block's position: the same block gets the same one in every review.

    All (layer, kv head) draw alike from one seed; give each its own for independent draws.

    Parameters
    ----------
    seed : int, default 0
        0..2**63 - 1.

    Raises
    ------
    ConfigError
        If it is out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, 0, 2**63 - 1)

    def score(self, tokens: TokenStatistics, blocks: Blocks) -> Float64:  # noqa: ARG002 - it looks at nothing
        """See `Scorer.score`."""
        mixed = _mix(_mix(np.full(len(blocks), self.seed, np.uint64)) ^ blocks.start.astype(np.uint64))
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """SplitMix64 (https://doi.org/10.1145/2660193.2660195); wraps around as meant."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
