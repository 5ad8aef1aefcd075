"""Handles in memory that stays: a host may keep a pointer to one longer than anything in Python lives."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

__all__ = ["HandleCell", "new_cell"]

HandleCell = npt.NDArray[np.int64]  # (1,)

_CELLS = 512
_lock = threading.Lock()
_kept: list[npt.NDArray[np.int64]] = []
_free: list[HandleCell] = []


def new_cell(handle: int) -> HandleCell:
    """The handle as an array (1,), in eight bytes that are never used for anything else.

    Once the sequence is closed its cell is 0, which is no handle; were it given to another sequence, a host that goes
    on would write into that one.
    """
    with _lock:
        if not _free:
            cells = np.zeros(_CELLS, np.int64)
            _free.extend(cells[at : at + 1] for at in range(_CELLS))
            _kept.append(cells)
        cell = _free.pop()
    cell[0] = handle
    return cell
