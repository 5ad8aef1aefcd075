"""What is timed: attention of a few new tokens over a cache of many, at one shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.bench.timing import COLD_BYTES, Contender, copies_for
from inferos.errors import ConfigError

__all__ = ["Entrant", "MOST_COPIES", "Offer", "Problem", "Shape", "SharedData"]

MOST_COPIES = 1024  # toys need no more to be toys
_ALIGNMENT = 64  # bytes
_SHAPE = re.compile(r"(\d{1,4})/(\d{1,4})/(\d{1,4})")

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """Query heads, kv heads and the channels of one head."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `HEADS/KV_HEADS/HEAD_DIM`. Raises ConfigError where that is no shape we compute."""
        found = _SHAPE.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"--shape: {text!r} is not HEADS/KV_HEADS/HEAD_DIM, such as 32/8/128")
        heads, kv_heads, head_dim = (int(part) for part in found.groups())
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            raise ConfigError(f"--shape: {text}: {heads} heads are no multiple of {kv_heads} kv heads")
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ConfigError(f"--shape: {text}: head_dim {head_dim} is not a multiple of 16 within 16..256")
        return cls(heads, kv_heads, head_dim)

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One point of a benchmark.

    Parameters
    ----------
    shape : Shape
    past : int
        Tokens in the cache before the call.
    tokens : int
        New tokens of the call; their K and V are part of what it attends to.
    batch : int
        Sequences that are computed together.
    threads : int
    """

    shape: Shape
    past: int
    tokens: int = 1
    batch: int = 1
    threads: int = 1

    @property
    def context(self) -> int:
        """Tokens that the newest token sees, itself included."""
        return self.past + self.tokens

    @property
    def elements(self) -> int:
        """K values of all sequences after the call; as many V values."""
        return self.batch * self.shape.kv_heads * self.context * self.shape.head_dim

    def copies(self, bytes_of_one: int) -> int:
        """How many copies of the cache make every call read from memory."""
        return min(MOST_COPIES, copies_for(bytes_of_one, COLD_BYTES))

    def query(self, dtype: npt.DTypeLike = np.float32) -> Array:
        """Random queries (batch, tokens, heads, head_dim)."""
        return self._normal(1, self.shape.heads).astype(dtype)

    def new_kv(self, dtype: npt.DTypeLike = np.float32) -> tuple[Array, Array]:
        """Random keys and values of the new tokens, (batch, tokens, kv_heads, head_dim) each."""
        return self._normal(2, self.shape.kv_heads).astype(dtype), self._normal(3, self.shape.kv_heads).astype(dtype)

    def _normal(self, seed: int, heads: int) -> npt.NDArray[np.float32]:
        size = (self.batch, self.tokens, heads, self.shape.head_dim)
        return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Entrant:
    """One implementation, ready to be timed.

    Parameters
    ----------
    contender : Contender
    bytes : int
        What a call reads at least.
    """

    contender: Contender
    bytes: int


@dataclass(frozen=True, slots=True)
class Offer:
    """One way of one implementation to solve a problem; nothing is allocated before `build`.

    Parameters
    ----------
    impl : str
    kv : str
        The cache's format, in the implementation's words.
    way : str
        What tells it from other ways to the same, or empty.
    build : callable
        May raise whatever the implementation raises: then this way is reported as failed.
    """

    impl: str
    kv: str
    way: str
    build: Callable[[], Entrant]

    @property
    def name(self) -> str:
        """For a person."""
        return " ".join(part for part in (self.impl, self.kv, self.way) if part)


class SharedData:
    """Caches of peers that take plain arrays, (batch, kv_heads, context, head_dim), shared where they have one format.

    One allocation per format: numpy asks for huge pages for large ones, as our own arena does.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.kv = cache(self._kv)

    def _kv(self, kind: str) -> list[tuple[Array, Array]]:
        """Copies of K and V as f32, f16, bf16 (bits in uint16), s8 or u4 (two to a byte)."""
        problem, shape = self.problem, self.problem.shape
        width = shape.head_dim // 2 if kind == "u4" else shape.head_dim
        rows = (problem.batch, shape.kv_heads, problem.context, width)
        base = _random(kind, rows)
        step = -(-base.nbytes // _ALIGNMENT) * _ALIGNMENT
        copies = problem.copies(2 * base.nbytes)
        memory = np.empty(2 * copies * step + _ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % _ALIGNMENT
        arrays = []
        for i in range(2 * copies):
            start = first + i * step
            array = memory[start : start + base.nbytes].view(base.dtype).reshape(rows)
            array[...] = base
            arrays.append(array)
        return list(zip(arrays[::2], arrays[1::2], strict=True))


def _random(kind: str, rows: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(0)
    if kind == "s8":
        return rng.integers(-60, 60, rows, np.int8)
    if kind == "u4":
        return rng.integers(0, 256, rows, np.uint8)
    normal = rng.standard_normal(rows, dtype=np.float32)
    if kind == "f16":
        return normal.astype(np.float16)
    if kind == "bf16":
        return (normal.view(np.uint32) >> 16).astype(np.uint16)
    return normal
