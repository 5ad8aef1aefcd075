"""The piece of a graph that one attention operator is, run with a query, key and value of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inferos.errors import UnsupportedError
from inferos.runtime.forms.evaluate import Array, Case
from inferos.runtime.forms.graph import GraphIndex
from inferos.runtime.forms.measure import Scores, Sizes, case_of, measure_window, verify

_SPARE = 3  # places of a buffer that nothing is in

__all__ = ["Piece", "causal_scores", "measured"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One attention operator.

    Attributes
    ----------
    query, key, value : str
        Tensors of the new tokens; with `heads_first` (batch, heads, tokens, head_dim), else (batch, tokens, width).
    past_key, past_value : str
        (batch, kv_heads, past, head_dim) each.
    output : str
        Laid out as the query.
    fixed : dict of str to array
        Tensors that stand for the graph's own in every run.
    places : tuple of str
        Where pasts are buffers of a fixed size: the tensors that say where new tokens go, and how many are held then.
    """

    index: GraphIndex
    sizes: Sizes
    dtype: np.dtype[np.generic]
    query: str
    key: str
    value: str
    past_key: str
    past_value: str
    output: str
    heads_first: bool
    fixed: dict[str, Array] = field(default_factory=dict)
    places: tuple[str, ...] = ()

    def attend(self, case: Case, q: Array, k: Array, v: Array, past: int) -> Array:
        """See `inferos.runtime.forms.measure.Attend`."""
        given: dict[str, Any] = dict(self.fixed)
        given[self.query] = self._laid(q)
        for new, old, tokens in ((self.key, self.past_key, k), (self.value, self.past_value, v)):
            given[new] = self._laid(tokens[:, :, past:])
            given[old] = np.ascontiguousarray(tokens[:, :, :past]).astype(self.dtype)
            if self.places:
                given[old] = np.pad(given[old], ((0, 0), (0, 0), (0, tokens.shape[2] - past + _SPARE), (0, 0)))
        for name in self.places:
            given[name] = np.full(len(q), past if name != self.places[-1] else k.shape[2])
        out = case.value(self.output, given)
        if self.heads_first:
            return out
        return out.reshape(*out.shape[:2], self.sizes.heads, self.sizes.head_dim).transpose(0, 2, 1, 3)

    def _laid(self, x: Array) -> Array:
        if not self.heads_first:
            x = x.transpose(0, 2, 1, 3)
            x = x.reshape(*x.shape[:2], -1)
        return np.ascontiguousarray(x).astype(self.dtype)


def causal_scores(bias: Array | None, past: int, new: int, *, causal: bool) -> Array:
    """Scores of products that are zero under a bias (.., new, past + new) and, where asked for, a causal mask."""
    scores = np.zeros((1, 1, new, past + new))
    if bias is not None:
        spread = bias if bias.dtype != np.bool_ else np.where(bias, 0.0, -np.inf)
        scores = scores + spread.astype(np.float64)
    if causal:
        hidden = np.arange(past + new)[None, :] > np.arange(past, past + new)[:, None]
        scores = np.where(hidden, -np.inf, scores)
    return scores


def measured(piece: Piece, name: str, mask: str, scores: Scores, scale: float, softcap: float) -> int:
    """The window of an operator, which is checked to be the attention we compute.

    Parameters
    ----------
    mask : str
        The tensor its mask comes from, "" = none.

    Raises
    ------
    UnsupportedError
        Naming the node and the reason.
    """
    index, sizes = piece.index, piece.sizes
    try:
        cone = case_of(index, 1, 1, 1).cone(mask, {piece.past_key, piece.past_value}) if mask else []
        window = measure_window(index, scores, cone)
        half = piece.dtype == np.float16
        verify(index, piece.attend, sizes, scale or sizes.head_dim**-0.5, softcap, window, half=half)
    except UnsupportedError as error:
        raise UnsupportedError(f"node {name!r}: {error}") from error
    return window
