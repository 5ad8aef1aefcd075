"""A model's memory, as the memory steps act on it."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from inferos.kv import Arena

__all__ = ["HasRows", "ModelMemory"]

_LEAST_BUDGET = 16 << 20  # bytes; the smallest pool that a policy may ask for


class HasRows(Protocol):
    """What decodes rows together."""

    @property
    def max_rows(self) -> int:
        """Rows decoded together."""
        ...

    @max_rows.setter
    def max_rows(self, rows: int) -> None: ...


class ModelMemory:
    """The caches of a session and the batches over it; a `MemoryTarget`. Thread-safe.

    A budget that shrinks gives empty pages back at once. What is held stays; caches of kv "auto" then pack it narrower
    instead of growing. A fixed format cannot, so it is capped only where it had a budget before.

    Parameters
    ----------
    session : DecoderSession
        One without an arena of ours gives nothing back.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._arena: Arena | None = getattr(session, "arena", None)
        self._budget: int | None = None  # before the first step
        self._decoders: weakref.WeakKeyDictionary[HasRows, int] = weakref.WeakKeyDictionary()  # with their own rows
        self._share = 1.0
        self._lock = threading.Lock()

    def watch(self, decoder: HasRows) -> None:
        """Let the rows of a batch shrink when memory is short."""
        with self._lock:
            self._decoders[decoder] = decoder.max_rows
            self._fit_rows()

    def used_bytes(self) -> int:
        """Bytes that the caches hold from the operating system."""
        return 0 if self._arena is None else self._arena.stats().reserved_bytes

    def scale_budget(self, factor: float) -> None:
        """Shrink the budget, never below 16 MiB or what is held and a sixteenth more."""
        if self._arena is None:
            return
        with self._lock:
            stats = self._arena.stats()
            if not stats.budget_bytes and self._session.kv != "auto":
                return
            if self._budget is None:
                self._budget = stats.budget_bytes
            before = stats.budget_bytes or stats.reserved_bytes
            # A cache that packs blocks narrower needs room for them beside the wide ones.
            held = stats.reserved_bytes + max(stats.reserved_bytes // 16, 1 << 20)
            self._arena.set_budget(max(int(before * factor), held, _LEAST_BUDGET))

    def scale_batch(self, factor: float) -> None:
        """Let fewer rows join; those that decode go on."""
        with self._lock:
            self._share *= factor
            self._fit_rows()

    def restore(self) -> None:
        """Budget and rows as they were."""
        with self._lock:
            if self._budget is not None and self._arena is not None:
                self._arena.set_budget(self._budget)
            self._budget = None
            self._share = 1.0
            self._fit_rows()

    def _fit_rows(self) -> None:
        for decoder, rows in self._decoders.items():
            decoder.max_rows = max(int(rows * self._share), 1)
