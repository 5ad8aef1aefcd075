"""The inputs of a run of the rewritten graph, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.runtime._trim import FROM_INPUT
from inferos.runtime.layout import HANDLE_INPUT, LENGTHS_INPUT, TOTAL_INPUT, ModelLayout
from inferos.runtime.protocols import Engine, Ids

__all__ = ["OneToken", "step_inputs"]

Feeds = dict[str, npt.NDArray[Any]]


def step_inputs(
    engine: Engine, layout: ModelLayout, past: list[int], handles: list[int], ids: Ids, *, keep_all: bool
) -> Feeds:
    """What a step is fed.

    Parameters
    ----------
    engine : Engine
        Whose graph it is for.
    layout : ModelLayout
    past, handles : one for each row
        Tokens the cache holds, and its handle.
    ids : (rows, tokens)
    keep_all : bool
        Whether logits of every token are wanted; else those of the last.
    """
    tokens = ids.shape[1]
    lengths = np.array(past)
    totals = lengths + tokens
    feeds: Feeds = {
        layout.input_ids: ids,
        LENGTHS_INPUT: totals - 1,
        TOTAL_INPUT: totals.max(),
        HANDLE_INPUT: np.array(handles),
        FROM_INPUT: np.array([0 if keep_all else tokens - 1]),
    }
    if layout.position_ids:
        feeds[layout.position_ids] = lengths[:, None] + np.arange(tokens)
    if layout.logits_to_keep:
        feeds[layout.logits_to_keep] = np.array(0 if keep_all else 1)
    if layout.attention_mask in engine.types:  # something besides attention reads it
        feeds[layout.attention_mask] = np.arange(totals.max()) < totals[:, None]
    return feeds


class OneToken:
    """The inputs of a step of one token of one sequence, in arrays that every step fills again.

    Only for runs that are over when the next begins.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self._mask = layout.attention_mask
        self._token = np.zeros((1, 1), np.int64)
        self._length = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._handle = np.zeros(1, np.int64)
        self._position = np.zeros((1, 1), np.int64)
        self._feeds: Feeds = {
            layout.input_ids: self._token,
            LENGTHS_INPUT: self._length,
            TOTAL_INPUT: self._total,
            HANDLE_INPUT: self._handle,
            FROM_INPUT: np.zeros(1, np.int64),
        }
        if layout.position_ids:
            self._feeds[layout.position_ids] = self._position
        if layout.logits_to_keep:
            self._feeds[layout.logits_to_keep] = np.array(1)

    def fill(self, engine: Engine, past: int, handle: int, token: np.int64) -> Feeds:
        """What the step is fed; valid until the next call."""
        self._token[0, 0] = token
        self._length[0] = past
        self._total[()] = past + 1
        self._handle[0] = handle
        self._position[0, 0] = past
        if self._mask in engine.types:
            self._feeds[self._mask] = np.ones((1, past + 1), np.int64)
        return self._feeds
