"""What `KVQuantizationEngine` holds: chunks, their pieces as the kernels pack them, and the heads they belong to."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.errors import SequenceError, ShapeError
from inferos.kv import kernels
from inferos.kv.kernels import BlockFormat
from inferos.kv.tiers import QuantizationLevel

__all__ = ["Chunk", "Head", "Piece", "cut"]

_BLOCK_TOKENS = 64
Float32 = npt.NDArray[np.float32]

# L3 is held as L2 is. K8V4, not INT4: keys stay safe at INT8 where nobody has measured that INT4 is enough.
_FORMATS: dict[QuantizationLevel, BlockFormat] = {
    QuantizationLevel.L0: "f16",
    QuantizationLevel.L1: "int8",
    QuantizationLevel.L2: "k8v4",
    QuantizationLevel.L3: "k8v4",
}


@dataclass(slots=True, eq=False)
class Piece:
    """Up to 64 tokens, packed or as plain FP16."""

    start: int
    stop: int
    data: npt.NDArray[Any]  # (2, tokens, head_dim) float16, or the block's bytes
    format: BlockFormat = "f16"
    level: QuantizationLevel = QuantizationLevel.L0  # that it was last packed for, whether or not that saved anything

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start

    def is_free(self, sinks: int, window_start: int) -> bool:
        """Whether it holds neither a sink nor a token of the recent window."""
        return self.start >= sinks and self.stop <= window_start

    def values(self, head_dim: int) -> Float32:
        """K and V (2, tokens, head_dim)."""
        if self.format == "f16":
            return kernels.to_f32(self.data)
        return np.stack(kernels.unpack_block(self.format, self.data, head_dim, self.tokens))

    def pack(self, level: QuantizationLevel, head_dim: int) -> None:
        """Repack for a level, unless that saves no byte: a block has room for 64 tokens, however few it holds."""
        if _FORMATS[level] != self.format:
            packed = kernels.pack_block(_FORMATS[level], *self.values(head_dim))
            if packed.nbytes < self.data.nbytes:
                self.format, self.data = _FORMATS[level], packed
        self.level = level


@dataclass(slots=True, eq=False)
class Chunk:
    """A stored chunk. `importance` is comparable among chunks with the same `measured_by`."""

    id: str
    layer: int
    head: int
    start: int
    stop: int
    head_dim: int
    dtype: np.dtype[Any]
    importance: float
    measured_by: str
    memory_pressure: float
    quality_budget: float
    pieces: list[Piece]
    level: QuantizationLevel = field(default=QuantizationLevel.L0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(piece.data.nbytes for piece in self.pieces)

    @property
    def fp16_bytes(self) -> int:
        """Bytes the same values take in FP16."""
        return 2 * 2 * (self.stop - self.start) * self.head_dim

    def is_free(self, sinks: int, window_start: int) -> bool:
        """Whether it has a piece with neither a sink nor a token of the recent window."""
        return any(piece.is_free(sinks, window_start) for piece in self.pieces)

    def settle(self, sinks: int, window_start: int) -> None:
        """Pack what may be packed and is not as narrow as the level says."""
        for piece in self.pieces:
            if piece.level < self.level and piece.is_free(sinks, window_start):
                piece.pack(self.level, self.head_dim)

    def values(self) -> npt.NDArray[Any]:
        """K and V (2, tokens, head_dim) in the type they came in."""
        whole = np.concatenate([piece.values(self.head_dim) for piece in self.pieces], axis=1)
        return whole.astype(self.dtype, copy=False)


def cut(tensor: npt.NDArray[Any], start: int, sinks: int) -> list[Piece]:
    """FP16 pieces of a chunk (2, tokens, head_dim) at position `start`: the sinks, then blocks of 64 tokens.

    Beyond +-65504 values saturate, as in the cache.
    """
    half = tensor if tensor.dtype == np.float16 else kernels.to_f16(tensor, saturate=True)
    stop = start + half.shape[1]
    first = min(max(sinks, start), stop)
    edges = [*([start] if start < first else []), *range(first, stop, _BLOCK_TOKENS), stop]
    return [Piece(a, b, np.array(half[:, a - start : b - start], order="C")) for a, b in itertools.pairwise(edges)]


class Head:
    """The chunks of one (layer, kv head) in order of position, and the sum of all keys seen."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.chunks: list[Chunk] = []
        self.key_sum = np.zeros(head_dim)

    @property
    def stop(self) -> int:
        """One past the newest position."""
        return self.chunks[-1].stop if self.chunks else 0

    def check_room(self, start: int, stop: int, head_dim: int) -> None:
        """Refuse another head_dim (ShapeError) and positions that are held (SequenceError)."""
        if head_dim != self.head_dim:
            raise ShapeError(f"quantize_kv_chunk: head_dim {head_dim}, this head's other chunks have {self.head_dim}")
        after = bisect.bisect_left(self.chunks, start, key=lambda chunk: chunk.stop - 1)
        if after < len(self.chunks) and self.chunks[after].start < stop:
            held = self.chunks[after]
            raise SequenceError(
                f"quantize_kv_chunk: positions {start}..{stop - 1} overlap {held.start}..{held.stop - 1}, which chunk"
                f" {held.id} holds"
            )

    def add(self, chunk: Chunk, key_sum: npt.NDArray[np.float64]) -> None:
        """Take over a chunk for which `check_room` found room, and the sum of keys with its own."""
        bisect.insort(self.chunks, chunk, key=lambda held: held.start)
        self.key_sum = key_sum
