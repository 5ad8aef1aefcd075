"""Caches of requests that ended, kept for requests that begin alike.

A chat sends its whole history with every turn. What the turn before has computed of it is taken over: of the caches
that are kept, the one that shares the longest beginning with the new prompt. Where that is at least half of what the
cache holds it is taken itself, and goes back to the common part; where it is less, as with two chats that share a
system prompt, it is forked, so that the chat it belongs to keeps it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inferos.errors import BudgetError, ConfigError, InferosError
from inferos.runtime.decode_loop import CachedTokens, Feed
from inferos.runtime.protocols import DecoderSession, Float32, TokenSequence

__all__ = ["PrefixCaches", "PrefixTokens"]

MAX_KEPT = 16  # sequences
MAX_BYTES = 1 << 30
_LEAST_FORKED = 32  # tokens; less is computed sooner than looked after


@dataclass(slots=True)
class _Kept:
    sequence: TokenSequence
    ids: list[int]
    version: int
    bytes: int


class PrefixCaches:
    """Caches of ended requests, the one used last at the end.

    Parameters
    ----------
    max_kept : int
        Sequences; 0 keeps none.
    max_bytes : int
        Bytes of KV in them.
    version : gives the number of the policy in force
        A cache that was begun under another one is not taken.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self, *, max_kept: int = MAX_KEPT, max_bytes: int = MAX_BYTES, version: Callable[[], int] = lambda: 0
    ) -> None:
        for name, value in (("max_kept", max_kept), ("max_bytes", max_bytes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name}: {value!r} is not a whole number of at least 0")
        self._max_kept = max_kept
        self._max_bytes = max_bytes
        self.version = version
        self._kept: list[_Kept] = []
        self._closed = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes of KV in the caches that are kept."""
        with self._lock:
            return sum(kept.bytes for kept in self._kept)

    def take(self, ids: Sequence[int]) -> tuple[TokenSequence, list[int]] | None:
        """A cache that begins like `ids`, with the ids it holds; now the caller's. None where none does."""
        version = self.version()
        with self._lock:
            self._drop(lambda kept: kept.version != version)
            best = max(self._kept, key=lambda kept: _common(kept.ids, ids), default=None)
            if best is None:
                return None
            common = _common(best.ids, ids)
            if 2 * common < len(best.ids):
                if common < _LEAST_FORKED:
                    return None
                try:
                    return best.sequence.fork(), list(best.ids)
                except BudgetError:
                    pass  # no room for both: the new request has it
            self._kept.remove(best)
            return best.sequence, best.ids

    def keep(self, sequence: TokenSequence, ids: list[int], version: int) -> None:
        """Take over a cache nobody uses any more; the oldest ones leave where that is too much."""
        try:
            held = sequence.kv_bytes
        except InferosError:  # closed under us
            return
        with self._lock:
            if self._closed or not ids or version != self.version() or held > self._max_bytes or not self._max_kept:
                sequence.close()
                return
            self._kept.append(_Kept(sequence, ids, version, held))
            while len(self._kept) > self._max_kept or sum(kept.bytes for kept in self._kept) > self._max_bytes:
                self._kept.pop(0).sequence.close()

    def release(self) -> bool:
        """Free the cache that was used longest ago. False if there is none."""
        with self._lock:
            if not self._kept:
                return False
            self._kept.pop(0).sequence.close()
            return True

    def close(self) -> None:
        """Free all of them; what is given later is freed at once."""
        with self._lock:
            self._closed = True
            self._drop(lambda _kept: True)

    def _drop(self, unwanted: Callable[[_Kept], bool]) -> None:
        for kept in self._kept:
            if unwanted(kept):
                kept.sequence.close()
        self._kept = [kept for kept in self._kept if not unwanted(kept)]


class PrefixTokens(CachedTokens):
    """A request's cache that begins as one that was kept, and is kept at its end."""

    def __init__(self, session: DecoderSession, prefill_chunk: int, caches: PrefixCaches) -> None:
        super().__init__(session, prefill_chunk)
        self._caches = caches
        self._version = caches.version()

    def align(self, ids: Sequence[int]) -> int:
        """Take over what fits best, then as any cache."""
        if not self.ids and (taken := self._caches.take(ids)) is not None:
            self.sequence.close()
            self.sequence, self.ids = taken
        return super().align(ids)

    def feed(self, asked: Feed) -> Float32:
        """As any cache; where the budget is used up, caches that are kept make room."""
        while True:
            try:
                return super().feed(asked)
            except BudgetError:
                if not self._caches.release():
                    raise

    def end(self, error: BaseException | None) -> None:
        """The request is over."""
        if error is None:
            self._caches.keep(self.sequence, list(self.ids), self._version)
        else:
            self.sequence.close()


def _common(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(old), len(new))
    while low < high:  # slices compare fast; a prompt has up to 100,000 ids
        middle = (low + high + 1) // 2
        if old[low:middle] == new[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
