"""What is known about the tokens of one (layer, kv head), and which blocks they form: what a scorer looks at."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from inferos.errors import ShapeError

__all__ = ["Blocks", "Float64", "Int64", "TokenStatistics"]

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenStatistics:
    """One row a token, oldest first. What was not measured is NaN.

    Parameters
    ----------
    position : (tokens,) int64
        In the sequence, ascending.
    mass : (tokens,) float64
        Attention probability the token receives, averaged over the sampled queries.
    value_norm, key_norm : (tokens,) float64
        Euclidean norms.
    key_similarity : (tokens,) float64
        Cosine between the token's key and the mean of all keys, -1..1.

    Raises
    ------
    ShapeError
        If they are not one-dimensional and equally long, or positions do not ascend.
    """

    position: Int64
    mass: Float64
    value_norm: Float64
    key_norm: Float64
    key_similarity: Float64

    def __post_init__(self) -> None:
        for field in fields(self):
            shape = np.shape(getattr(self, field.name))
            if len(shape) != 1 or shape != np.shape(self.position):
                raise ShapeError(
                    f"TokenStatistics: {field.name} has shape {shape}, wanted {np.shape(self.position)[:1]}"
                )
        if np.any(np.diff(self.position) <= 0):
            raise ShapeError("TokenStatistics: position does not ascend")

    def __len__(self) -> int:
        return int(self.position.size)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Blocks to be scored.

    Parameters
    ----------
    start, stop : (blocks,) int64
        First position of each, and one past its last.

    Raises
    ------
    ShapeError
        If they are not one-dimensional and equally long, or a block has no position.
    """

    start: Int64
    stop: Int64

    def __post_init__(self) -> None:
        if np.ndim(self.start) != 1 or np.shape(self.start) != np.shape(self.stop):
            raise ShapeError(f"Blocks: start has shape {np.shape(self.start)}, stop {np.shape(self.stop)}")
        if np.any(self.stop <= self.start):
            raise ShapeError("Blocks: a stop is not behind its start")

    def __len__(self) -> int:
        return int(self.start.size)

    def table(self, values: Float64, tokens: TokenStatistics) -> Float64:
        """The tokens' values block by block.

        Parameters
        ----------
        values : (tokens,) float64
        tokens : TokenStatistics

        Returns
        -------
        (blocks, tokens of the largest block) float64
            NaN behind the end of a smaller block, and where a position is not among the tokens.
        """
        first = np.searchsorted(tokens.position, self.start)
        last = np.searchsorted(tokens.position, self.stop)
        width = int((last - first).max(initial=0))
        if width == 0:
            return np.full((len(self), 0), np.nan)
        rows = first[:, None] + np.arange(width)
        inside = rows < last[:, None]
        return np.where(inside, np.asarray(values, np.float64)[np.minimum(rows, len(tokens) - 1)], np.nan)
