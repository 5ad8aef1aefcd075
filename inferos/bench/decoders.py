"""What the whole-model benchmark steps: rows of tokens with a cache each, and inferos' own kind of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from inferos.kv import Arena
from inferos.runtime._compressed import CompressedSequence, CompressedSession
from inferos.runtime.protocols import Float32, Ids

__all__ = ["Greedy", "InferosRows", "RandomKv", "Rows", "SingleRows"]

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

    def step(self, ids: Ids) -> npt.NDArray[np.generic]:
        """One token for each row: ids (rows,) -> logits (rows, vocab_size)."""
        ...

    def close(self) -> None:
        """Free the caches."""


class InferosRows:
    """Rows of a compressed session, each with a cache of its own, stepped in one run.

    Parameters
    ----------
    session : CompressedSession
    kv : str
        Format of the caches, whatever the session's own is.
    rows : int
    """

    def __init__(self, session: CompressedSession, kv: str, rows: int) -> None:
        self._session = session
        self._arena = Arena()
        self.sequences = [CompressedSequence(session, session.new_cache(kv=kv, arena=self._arena)) for _ in range(rows)]

    def fill(self, length: int, random: RandomKv) -> None:
        """Append random K and V until every row has `length` tokens."""
        for sequence in self.sequences:
            cache = sequence.cache
            while cache.length < length:
                tokens = min(_CHUNK, length - cache.length)
                cache.begin(tokens)
                for index, layer in enumerate(cache.layers):
                    k, v = random.chunk(layer.kv_heads, layer.head_dim)
                    cache.append(index, k[:tokens], v[:tokens])
                cache.commit()

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.sequences[0].length

    @property
    def kv_bytes(self) -> int:
        """Bytes of all rows' blocks."""
        return sum(sequence.kv_bytes for sequence in self.sequences)

    @property
    def held_bytes(self) -> int:
        """Bytes that the rows' arena took from the system, at most so far."""
        return self._arena.stats().reserved_high_water_bytes

    def single(self) -> SingleRows:
        """The same rows, each in a run of its own; they share the arena."""
        return SingleRows(self._session, self.sequences, self._arena)

    def step(self, ids: Ids) -> Float32:
        """One token for each row, in one run."""
        return self._session.step(self.sequences, ids)

    def close(self) -> None:
        """Free the caches."""
        for sequence in self.sequences:
            sequence.close()


class SingleRows:
    """Rows stepped one after the other, each in a run of its own: what `InferosRows` saves.

    They are forks, so packed blocks are those of the originals.
    """

    def __init__(self, session: CompressedSession, sequences: Sequence[CompressedSequence], arena: Arena) -> None:
        self._session = session
        self._arena = arena
        self._sequences = [sequence.fork() for sequence in sequences]

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
        """Bytes of the arena that the originals are in as well."""
        return self._arena.stats().reserved_high_water_bytes

    def step(self, ids: Ids) -> Float32:
        """One token for each row, in as many runs."""
        steps = [self._session.step([row], ids[i : i + 1]) for i, row in enumerate(self._sequences)]
        return np.concatenate(steps)

    def close(self) -> None:
        """Free the caches."""
        for sequence in self._sequences:
            sequence.close()


class Greedy:
    """The decode loop: every call steps the rows by the likeliest tokens of the call before."""

    def __init__(self, rows: Rows, count: int) -> None:
        self._rows = rows
        self._ids = np.zeros(count, np.int64)

    def __call__(self, _copy: int = 0) -> None:
        """One token for each row."""
        self._ids = self._rows.step(self._ids).argmax(axis=1)
