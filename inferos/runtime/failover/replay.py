"""Failover where the provider owns the cache: the tokens are fed again, to another session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Collection
from dataclasses import dataclass

import numpy as np

from inferos.errors import ClosedError, ConfigError, InferosError, RewindError, ShapeError
from inferos.runtime.failover.attempts import first_that_works
from inferos.runtime.failover.manager import RobustFallbackManager
from inferos.runtime.failover.workers import Wait, Workers
from inferos.runtime.protocols import DecoderSession, Float32, Ids, TokenSequence

__all__ = ["Place", "ReplaySequence", "ReplaySession"]


@dataclass(frozen=True, eq=False)
class Place:
    """A session that can take a sequence over.

    Parameters
    ----------
    name, device : str
        For people, unique; and npu, dml, cpu, ...
    session : DecoderSession
        Its failures are a `ProviderError`.
    """

    name: str
    device: str
    session: DecoderSession


class ReplaySession:
    """Several sessions of one model as one; a sequence moves on to the next where its session fails.

    Thread-safe as far as the sessions are; a sequence is used by one thread at a time.

    Parameters
    ----------
    places : sequence of Place
        The preferred first.
    manager : RobustFallbackManager
        Knows which places are well, and is told of failovers.
    wait : callable, optional
        Waits for a step's end where another place could take over; None = as long as it takes.

    Raises
    ------
    ConfigError
        If there is no place, or their vocabularies differ.
    """

    def __init__(self, places: Collection[Place], manager: RobustFallbackManager, wait: Wait | None = None) -> None:
        if not places or len({place.session.vocab_size for place in places}) != 1:
            raise ConfigError(f"ReplaySession: {len(places)} sessions; wanted at least one, all of one vocabulary")
        self.places = tuple(places)
        self.manager = manager
        self._wait = wait
        self._workers = Workers()

    @property
    def vocab_size(self) -> int:
        """Logits per token."""
        return self.places[0].session.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens that every one of them can hold."""
        return min(place.session.context_length for place in self.places)

    @property
    def kv(self) -> str:
        """Of the preferred session."""
        return self.places[0].session.kv

    def sequence(self) -> ReplaySequence:
        """A new, empty sequence."""
        return ReplaySequence(self)

    def step(self, sequences: Collection[TokenSequence], ids: Ids) -> Float32:
        """One token for each sequence, one after the other; see `DecoderSession.step`."""
        rows = [row for row in sequences if isinstance(row, ReplaySequence) and row.owner is self]
        if len(rows) != len(sequences) or len(rows) != np.size(ids) or len({id(row) for row in rows}) != len(rows):
            raise ShapeError(f"step: {np.size(ids)} ids for {len(rows)} different sequences of this session")
        done: list[ReplaySequence] = []
        logits = []
        try:
            for row, token in zip(rows, ids, strict=True):
                logits.append(row.feed(np.atleast_1d(token)))
                done.append(row)
        except BaseException:
            for row in done:
                row.rewind(row.length - 1)
            raise
        return np.stack(logits) if logits else np.zeros((0, self.vocab_size), np.float32)

    def attempt(self, call: Callable[[], Float32], forsake: Callable[[], None], *, alone: bool) -> Float32:
        """Make a call, with the deadline unless no other place is left; `forsake` as of `Workers.run`."""
        if self._wait is None or alone:
            return call()
        logits: Float32 = self._workers.run(call, self._wait, forsake)
        return logits


class ReplaySequence:
    """The ids of one conversation, and a sequence of one of the sessions that holds them."""

    def __init__(self, owner: ReplaySession) -> None:
        self.owner = owner
        self._ids: list[int] = []
        self._place: Place | None = None
        self._inner: TokenSequence | None = None
        self._closed = False

    @property
    def place(self) -> Place | None:
        """Where its tokens are; None before the first one, and after a step that no place did."""
        return self._place

    @property
    def length(self) -> int:
        """Committed tokens."""
        return len(self._ids)

    @property
    def kv_bytes(self) -> int:
        """Bytes held in the session that has its tokens."""
        return 0 if self._inner is None else self._inner.kv_bytes

    @property
    def kv_elements(self) -> int:
        """K and V values held there."""
        return 0 if self._inner is None else self._inner.kv_elements

    def feed(self, ids: Ids) -> Float32:
        """Logits (vocab_size,) after the last id. See `TokenSequence.feed`."""
        return self._run(ids, lambda inner: inner.feed(ids))

    def feed_all(self, ids: Ids) -> Float32:
        """Logits (tokens, vocab_size) after each id. See `TokenSequence.feed_all`."""
        return self._run(ids, lambda inner: inner.feed_all(ids))

    def rewind(self, length: int) -> None:
        """Forget positions >= length; see `TokenSequence.rewind`."""
        self._check()
        if not 0 <= length <= len(self._ids):
            raise RewindError(f"rewind: {length} is not within 0..{len(self._ids)}")
        if self._inner is not None:
            self._inner.rewind(length)
        del self._ids[length:]

    def fork(self) -> ReplaySequence:
        """A second sequence with the same tokens, in the same session."""
        self._check()
        other = ReplaySequence(self.owner)
        other._inner = None if self._inner is None else self._inner.fork()
        other._place, other._ids = self._place, list(self._ids)
        return other

    def close(self) -> None:
        """Free the cache."""
        self._closed = True
        self._leave(hangs=False)

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the sequence is closed")

    def _run(self, ids: Ids, feed: Callable[[TokenSequence], Float32]) -> Float32:
        """Feed where the tokens are, or else where they can be fed again."""
        self._check()
        owner = self.owner
        order = owner.manager.health.order(owner.places)
        if self._place is not None and owner.manager.health.is_well(self._place):
            order = sorted(order, key=lambda place: place is not self._place)  # moving back would cost a prefill

        def attempt(place: Place, alone: bool) -> Float32:
            try:
                return owner.attempt(self._call(place, feed), lambda: self._leave(hangs=True), alone=alone)
            except BaseException:
                if self._inner is not None and self._inner.length != len(self._ids):
                    self._leave(hangs=False)
                raise

        logits = first_that_works(owner.manager, order, attempt)
        self._ids.extend(np.asarray(ids).tolist())
        return logits

    def _call(self, place: Place, feed: Callable[[TokenSequence], Float32]) -> Callable[[], Float32]:
        """What is to be called on any thread: it uses nothing of this object that a later attempt changes."""
        if place is not self._place or self._inner is None:
            self._leave(hangs=False)
            self._place, self._inner = place, place.session.sequence()
        inner, held = self._inner, np.array(self._ids, np.int64)

        def call() -> Float32:
            if inner.length < held.size:
                inner.feed(held[inner.length :])
            return feed(inner)

        return call

    def _leave(self, *, hangs: bool) -> None:
        """Let go of the session. What a run that hangs still uses is freed when it ends, not now."""
        inner, self._inner, self._place = self._inner, None, None
        if inner is not None and not hangs:
            with contextlib.suppress(InferosError):
                inner.close()
