"""Runs of a few tokens with bound inputs and outputs: what a step of decoding needs is allocated once per shape."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.runtime._ort import input_types
from inferos.runtime._trim import FROM_INPUT
from inferos.runtime.layout import ModelLayout

__all__ = ["Bindings"]

_MOST_TOKENS = 16  # of a row; more are a prompt, whose arrays are not worth keeping
_MOST_LOGITS = 2 << 20  # of a run
_SHAPES = 4
_READY = 2  # of one shape: in a loop one is being written while the one before is still looked at
_UNUSED = 2  # references to an output nobody else holds: its `_Bound`'s, and the argument of getrefcount

Array = npt.NDArray[Any]


class Bindings:
    """Input and output arrays of one session, bound once per (rows, tokens).

    An output is written again only when nobody refers to it or to a view of it any more: who keeps the logits of a step
    keeps them, and the next step gets another array. Thread-safe.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
        As `of` takes it.
    layout : ModelLayout
    """

    def __init__(self, session: Any, layout: ModelLayout) -> None:
        output = _logits(session, layout)
        self._session = session
        self._layout = layout
        self._types = input_types(session)
        self._kind = np.float16 if output.type == "tensor(float16)" else np.float32
        self._vocab = output.shape[2]
        self._ready: dict[tuple[int, int, int], deque[_Bound]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, session: Any, layout: ModelLayout) -> Bindings | None:
        """For a session of the rewritten graph; None where the size of an array cannot be told before a run."""
        output = _logits(session, layout)
        stated = len(output.shape) == 3 and isinstance(output.shape[2], int)
        known = output.type in ("tensor(float)", "tensor(float16)")
        mask = layout.attention_mask in input_types(session)  # grows with every step
        return cls(session, layout) if stated and known and not mask else None

    def run(self, feeds: Mapping[str, Array], run_options: Any) -> Array | None:
        """Logits (rows, tokens, vocab_size), or None where a run of this shape is not for bindings."""
        rows, tokens = feeds[self._layout.input_ids].shape
        key = (rows, tokens, self._shown(feeds, tokens))
        bound = self._take(key)
        if bound is None:
            if tokens > _MOST_TOKENS or not 0 < rows * tokens * self._vocab <= _MOST_LOGITS:
                return None
            bound = self._bind(feeds, key)
        try:
            for name, array in bound.inputs:
                array[...] = feeds[name]
            self._session.run_with_iobinding(bound.binding, run_options)
            return bound.output
        finally:
            self._give_back(key, bound)

    def _shown(self, feeds: Mapping[str, Array], tokens: int) -> int:
        """Tokens of a row that get logits."""
        layout = self._layout
        if tokens == 1 or layout.last_logits_only:
            return 1
        if layout.logits_to_keep:
            return 1 if feeds[layout.logits_to_keep].item() else tokens
        return tokens - int(feeds[FROM_INPUT].item()) if FROM_INPUT in self._types else tokens

    # A deque's own methods are atomic, so no lock is needed: a binding that was taken is in no deque.

    def _take(self, key: tuple[int, int, int]) -> _Bound | None:
        ready = self._ready.get(key)
        if not ready:
            return None
        try:
            bound = ready.popleft()  # the one that was given back first: its logits are likeliest to be done with
        except IndexError:  # another thread was quicker
            return None
        if sys.getrefcount(bound.output) != _UNUSED:
            if len(ready) < _READY - 1:
                ready.append(bound)
                return None
            bound.renew(self._layout.logits)
        return bound

    def _give_back(self, key: tuple[int, int, int], bound: _Bound) -> None:
        ready = self._ready.get(key)
        if ready is None:
            with self._lock:
                if key not in self._ready and len(self._ready) == _SHAPES:
                    del self._ready[next(iter(self._ready))]
                ready = self._ready.setdefault(key, deque())
        if len(ready) < _READY:
            ready.append(bound)

    def _bind(self, feeds: Mapping[str, Array], key: tuple[int, int, int]) -> _Bound:
        arrays = [(name, np.array(feeds[name], kind)) for name, kind in self._types.items() if name in feeds]
        output = np.empty((key[0], key[2], self._vocab), self._kind)
        bound = _Bound(self._session.io_binding(), arrays, output)
        for name, array in arrays:
            bound.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        bound.renew(self._layout.logits)
        return bound


def _logits(session: Any, layout: ModelLayout) -> Any:
    return next(value for value in session.get_outputs() if value.name == layout.logits)


class _Bound:
    """The arrays of one run, and the binding that points to them."""

    __slots__ = ("binding", "inputs", "output")

    def __init__(self, binding: Any, inputs: list[tuple[str, Array]], output: Array) -> None:
        self.binding = binding
        self.inputs = inputs
        self.output = output

    def renew(self, name: str) -> None:
        """Another output; the one before belongs to whoever holds it."""
        output = self.output = np.empty_like(self.output)
        self.binding.bind_output(name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
