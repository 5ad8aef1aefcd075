"""What the whole-model benchmark steps: rows of tokens with a cache each, and inferos' own kind of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from inferos.kv import Arena, KVCache
from inferos.runtime._compressed import CompressedSequence, CompressedSession
from inferos.runtime.protocols import Float32, Ids

__all__ = ["Greedy", "InferosRows", "RandomKv", "Rows"]

_CHUNK = 1024  # tokens of random K and V; a longer past repeats them


class RandomKv:
    """K and V that caches are filled with: standard normal, the same for every layer of one shape."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._chunks: dict[tuple[int, int], tuple[Float32, Float32]] = {}

    def chunk(self, kv_heads: int, head_dim: int) -> tuple[Float32, Float32]:
        """K and V, (tokens, kv_heads, head_dim) each."""
        key = (kv_heads, head_dim)
        if key not in self._chunks:
            k, v = self._random.standard_normal((2, _CHUNK, *key), np.float32)
            self._chunks[key] = (k, v)
        return self._chunks[key]


class Rows(Protocol):
    """Some rows of one decoder, all of one length."""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of the K and V of all rows that a step reads, their scales included."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes that the caches took from the system, at most so far."""
        ...

    def step(self, ids: Ids) -> npt.NDArray[np.floating[Any]]:
        """One token for each row: ids (rows,) -> logits (rows, vocab_size)."""
        ...

    def close(self) -> None:
        """Free the caches."""


class InferosRows:
    """Rows of a compressed session, each with a cache of its own, stepped in one run.

    Parameters
    ----------
    session : CompressedSession
    sequences : sequence of CompressedSequence
        Of this session, all in one arena.
    arena : Arena
    together : bool, default True
        False: a step is one run for each row, one after the other.
    """

    def __init__(
        self,
        session: CompressedSession,
        sequences: Sequence[CompressedSequence],
        arena: Arena,
        *,
        together: bool = True,
    ) -> None:
        self._session = session
        self._sequences = sequences
        self._arena = arena
        self._together = together

    @classmethod
    def filled(cls, session: CompressedSession, kv: str, rows: int, length: int, random: RandomKv) -> InferosRows:
        """Rows with a random past of `length` tokens in caches of format `kv`, whatever the session's own is."""
        arena = Arena()
        rules = replace(session.rules, kv=kv)
        sequences = [session.sequence_of(rules, arena) for _ in range(rows)]
        for sequence in sequences:
            _fill(sequence.cache, length, random)
        return cls(session, sequences, arena)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self._sequences[0].length

    @property
    def kv_bytes(self) -> int:
        """Bytes of all rows' blocks."""
        return sum(sequence.kv_bytes for sequence in self._sequences)

    @property
    def held_bytes(self) -> int:
        """Bytes that the arena took from the system, at most so far."""
        return self._arena.stats().reserved_high_water_bytes

    def apart(self) -> InferosRows:
        """Forks of the rows, stepped one after the other: what running them together saves."""
        forks = [sequence.fork() for sequence in self._sequences]
        return InferosRows(self._session, forks, self._arena, together=False)

    def step(self, ids: Ids) -> Float32:
        """One token for each row."""
        if self._together:
            return self._session.step(self._sequences, ids)
        steps = [self._session.step([row], ids[i : i + 1]) for i, row in enumerate(self._sequences)]
        return np.concatenate(steps)

    def close(self) -> None:
        """Free the caches."""
        for sequence in self._sequences:
            sequence.close()


def _fill(cache: KVCache, length: int, random: RandomKv) -> None:
    """Append random K and V until the cache has `length` tokens."""
    while cache.length < length:
        tokens = min(_CHUNK, length - cache.length)
        cache.begin(tokens)
        for index, layer in enumerate(cache.layers):
            k, v = random.chunk(layer.kv_heads, layer.head_dim)
            cache.append(index, k[:tokens], v[:tokens])
        cache.commit()


class Greedy:
    """The decode loop: every call steps the rows by the likeliest tokens of the call before."""

    def __init__(self, rows: Rows, count: int) -> None:
        self._rows = rows
        self._ids = np.zeros(count, np.int64)

    def __call__(self, _copy: int = 0) -> None:
        """One token for each row."""
        self._ids = self._rows.step(self._ids).argmax(axis=1)
