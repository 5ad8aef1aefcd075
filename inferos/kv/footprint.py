"""What a cache of a given shape will take, counted without making one."""

from __future__ import annotations

import bisect
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from inferos.errors import ConfigError
from inferos.kv import kernels
from inferos.kv.cache import KV_FORMATS, KVCache, LayerSpec
from inferos.kv.kernels import BlockFormat
from inferos.kv.tiers import check_thresholds, settled_shares

__all__ = ["CachePlan", "Footprint"]

_BLOCK_TOKENS = 64
# Tokens that a sliding window keeps for a rewind: kRewindReserve of csrc/kv/sequence_cache.hpp.
_REWIND_RESERVE = 16
# Blocks of a head that share a record of scores, beside each block's own until it is at L2: csrc/kv/importance.hpp.
_SCORE_PAGE = 32
_FORMATS: dict[str, BlockFormat] = {"f16": "f16", "int8": "int8", "k8v4": "k8v4", "int4": "int4"}
# csrc/core/arena.cpp: a slab is at most a 16th of what is held, within 64 KiB..2 MiB, and under a budget a 128th of that.
_SMALLEST_SLAB, _LARGEST_SLAB, _SLAB_SHARE, _BUDGET_SLABS = 64 << 10, 2 << 20, 16, 128
_GROWING_SLABS = 96  # smaller than the largest, until 32 MiB are held: 32 of the smallest, 16 of every other size
_PAGE, _LAST_PAGE = 4096, 32  # under a budget at most a 32nd of a slab is its last page's unused end

_Key = TypeVar("_Key", str, int)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one or several sequences take.

    Parameters
    ----------
    tokens, rows : int
        Of each sequence; sequences.
    blocks : Mapping[str, int]
        By format, over all layers and heads of all rows; a sink block is among f16.
    token_heads : Mapping[str, int]
        Tokens by format, summed over layers and kv heads of all rows.
    kv_bytes : int
        Blocks and scores: what `KVStats.total_bytes` says of a cache that reached `tokens` in steps of one.
    score_bytes : int
        Part of it.
    fp16_bytes : int
        The same keys and values in FP16 and nothing else; of a sliding-window layer, those a token can see.
    memory_bytes : int
        Most that the arena may hold from the system until then, a long prompt's passage included.
    """

    tokens: int
    rows: int
    blocks: Mapping[str, int]
    token_heads: Mapping[str, int]
    kv_bytes: int
    score_bytes: int
    fp16_bytes: int
    memory_bytes: int

    @property
    def share_of_fp16(self) -> float:
        """kv_bytes over fp16_bytes."""
        return self.kv_bytes / self.fp16_bytes


@dataclass(frozen=True, slots=True)
class CachePlan:
    """A cache's shape and format.

    Parameters
    ----------
    layers : tuple of LayerSpec
    kv : "f16", "int8", "k8v4", "int4" or "auto"
    recent_window, sink_tokens, thresholds, l2_format
        As of `KVCache`, `l2_format` being k8v4 or int4. `auto` is counted as it is once its reviews are done; the
        newest blocks come to that only some reviews later.
    prefill_chunk : int, default 512
        Tokens of one run of a prompt at most: they are in FP16 for a moment.

    Raises
    ------
    ConfigError
        If the format is unknown or the thresholds are out of order.
    """

    layers: tuple[LayerSpec, ...]
    kv: str = "int8"
    recent_window: int = 64
    sink_tokens: int = 4
    thresholds: tuple[float, float, float] = (1.0, 0.7, 0.3)
    l2_format: str = "k8v4"
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if self.kv not in KV_FORMATS:
            raise ConfigError(f"kv: {self.kv!r} is not one of {', '.join(KV_FORMATS)}")
        if self.l2_format not in ("k8v4", "int4"):
            raise ConfigError(f"l2_format: {self.l2_format!r} is not one of k8v4, int4: a plan needs to know which")
        check_thresholds(self.thresholds)

    def at(self, tokens: int, rows: int = 1, budget_bytes: int = 0) -> Footprint:
        """What `rows` sequences of `tokens` tokens each take, at least 1 of both; in an arena with that budget, 0 = none."""
        blocks, held, live, most = Counter[str](), Counter[str](), Counter[int](), Counter[int]()
        scores = fp16_bytes = 0
        for spec, layers in Counter(self.layers).items():
            heads = layers * spec.kv_heads * rows
            head = self._head(spec, tokens)
            blocks.update(_times(head.blocks, heads))
            held.update(_times(head.token_heads, heads))
            live.update(_times(head.live, heads))
            most.update(_times(head.most, heads))
            scores += head.scores * heads
            fp16_bytes += 2 * 2 * head.visible * spec.head_dim * heads
        return Footprint(
            tokens=tokens,
            rows=rows,
            blocks=dict(blocks),
            token_heads=dict(held),
            kv_bytes=sum(size * count for size, count in live.items()),
            score_bytes=scores * _score_bytes(),
            fp16_bytes=fp16_bytes,
            memory_bytes=_arena_bytes(most, budget_bytes),
        )

    def fits(self, budget_bytes: int, tokens: int, rows: int = 1) -> bool:
        """Whether so much stays within an arena's budget at every moment.

        One sequence of `auto` is packed narrower than its thresholds ask for where memory is short, down to `l2_format`
        everywhere. Several do so each for itself and cannot count on one another.
        """
        if self.at(tokens, rows, budget_bytes).memory_bytes <= budget_bytes:
            return True
        return self.kv == "auto" and rows == 1 and self._squeezed(tokens, budget_bytes) <= budget_bytes

    def longest(self, budget_bytes: int, most: int, rows: int = 1) -> int:
        """Most tokens, up to `most`, of which `rows` sequences fit; 0 if not even one."""
        return _last(most, lambda tokens: self.fits(budget_bytes, tokens, rows))

    def rows(self, budget_bytes: int, tokens: int, most: int = 1 << 16) -> int:
        """Most sequences of `tokens` tokens, up to `most`, that fit together."""
        return _last(most, lambda rows: self.fits(budget_bytes, tokens, rows))

    def _squeezed(self, tokens: int, budget_bytes: int) -> int:
        """Memory of a sequence of auto whose blocks are all as narrow as they may become."""
        tight = replace(self, thresholds=(1.0, 1.0, 1.0))
        most, spare = Counter[int](), 0
        for spec, layers in Counter(self.layers).items():
            heads = layers * spec.kv_heads
            head = tight._head(spec, tokens)  # noqa: SLF001 - of this class
            held = self._held(spec, -(-tokens // _BLOCK_TOKENS))
            counts = head.most.copy()
            # What has just left the window becomes INT8 first.
            counts[_block_bytes("int8", spec.head_dim)] = min(held, self._passing)
            most.update(_times(counts, heads))
            sizes = (_block_bytes(kv, spec.head_dim) for kv in ("f16", "int8"))
            spare = max(spare, *(_largest_slab(size, budget_bytes) for size in sizes))
        return _arena_bytes(most, budget_bytes) + 2 * spare  # which the cache keeps free, to demote in

    @property
    def _passing(self) -> int:
        """Most blocks that a run of a prompt has in FP16, or changes, in one kv head."""
        return (self.recent_window + self.prefill_chunk) // _BLOCK_TOKENS + 3

    def _head(self, spec: LayerSpec, tokens: int) -> _Head:
        """One kv head, laid out as csrc/kv does it."""
        slides = spec.local_window >= 0
        origin = 0 if slides else self.sink_tokens
        grid = -(-max(tokens - origin, 0) // _BLOCK_TOKENS)
        gone = (
            min(max((tokens - spec.local_window - _REWIND_RESERVE) // _BLOCK_TOKENS, 0), max(grid - 1, 0))
            if slides
            else 0
        )
        # A step packs what had left the window before it: the last one saw tokens - 1.
        due = max(max(tokens - 1 - self.recent_window - origin, 0) // _BLOCK_TOKENS - gone, 0)
        blocks = self._levels(due)
        blocks["f16"] += grid - gone - due
        most = self._most(spec, grid, due, blocks)
        sizes = {kv: _block_bytes(kv, spec.head_dim) for kv in most}
        live = Counter({sizes[kv]: count for kv, count in blocks.items()})
        peak = Counter({sizes[kv]: count for kv, count in most.items()})
        scores = 0
        if self.kv == "auto" and grid:
            pages = -(-grid // _SCORE_PAGE)
            scores = grid - gone - blocks[self.l2_format] + pages - gone // _SCORE_PAGE
            live[_score_bytes()] += scores
            held = self._held(spec, grid)
            peak[_score_bytes()] += held + min(pages, held // _SCORE_PAGE + 2)
        sinks = Counter[int]()
        if origin:
            sinks[-(-origin // 16) * 16 * spec.head_dim * 2 * 2] = 1
        packed = {kv: _BLOCK_TOKENS * count for kv, count in blocks.items() if kv != "f16"}
        plain = tokens - _BLOCK_TOKENS * gone - sum(packed.values())
        return _Head(
            blocks=blocks + Counter({"f16": sinks.total()}),
            token_heads=Counter({"f16": plain, **packed}),
            live=live + sinks,
            most=peak + sinks,
            scores=scores,
            visible=min(tokens, spec.local_window + 1) if slides else tokens,
        )

    def _levels(self, due: int) -> Counter[str]:
        """Blocks that left the window, by format."""
        if self.kv != "auto":
            return Counter({self.kv: due})
        l0, l1, l2, l3 = settled_shares(self.thresholds, due)
        return Counter({"f16": l0, "int8": l1, self.l2_format: l2 + l3})

    def _held(self, spec: LayerSpec, grid: int) -> int:
        """Most blocks of the grid that are there at once, a run of the prompt in passing."""
        if spec.local_window < 0:
            return grid
        return min(grid, (spec.local_window + _REWIND_RESERVE + self.prefill_chunk) // _BLOCK_TOKENS + 3)

    def _most(self, spec: LayerSpec, grid: int, due: int, settled: Counter[str]) -> Counter[str]:
        """Most blocks of each format at any moment until now: what reviews pack was in a wider one before."""
        held = self._held(spec, grid)
        most = Counter(settled)
        if spec.local_window >= 0:
            most = Counter(dict.fromkeys(settled, held))
        elif self.kv == "auto" and self.thresholds[0] >= 1:
            most["int8"] = due
        elif self.kv == "auto":
            most["int8"] += settled["f16"]
        stays = self.kv == "f16" or (self.kv == "auto" and self.thresholds[0] < 1)
        most["f16"] = held if stays else min(held, self._passing)
        return most


@dataclass(frozen=True, slots=True)
class _Head:
    """One kv head: blocks and tokens by format, blocks by bytes (now, and at most so far), and its scores."""

    blocks: Counter[str]
    token_heads: Counter[str]
    live: Counter[int]
    most: Counter[int]
    scores: int
    visible: int


def _times(counts: Counter[_Key], factor: int) -> dict[_Key, int]:
    return {key: count * factor for key, count in counts.items()}


@functools.cache
def _block_bytes(kv: str, head_dim: int) -> int:
    """Bytes of a block, as the codec writes it."""
    rows = np.zeros((_BLOCK_TOKENS, head_dim), np.float32)
    return kernels.pack_block(_FORMATS[kv], rows, rows).nbytes


@functools.cache
def _score_bytes() -> int:
    """Bytes of a record of scores: a cache of one block takes two."""
    with KVCache([LayerSpec(1, 16)], kv="auto", sink_tokens=0) as cache:
        cache.begin(1)
        return cache.stats().score_bytes // 2


def _arena_bytes(most: Counter[int], budget_bytes: int) -> int:
    """Most an arena holds for so many blocks of each size.

    A slab is added when all others of its size are full, so beyond the blocks there is at most one of each size, and
    what a slab's end is too short for.
    """
    sizes = {size: count for size, count in most.items() if count}
    held, before = 0, -1
    while held != before:
        before = held
        share = held // _SLAB_SHARE
        grown = min(max(1 << share.bit_length() >> 1, _SMALLEST_SLAB), _LARGEST_SLAB)
        held = _PAGE * min(_GROWING_SLABS, held // _SMALLEST_SLAB + 1)
        for size, count in sizes.items():
            largest = _largest_slab(size, budget_bytes) if budget_bytes else _LARGEST_SLAB
            slab = max(min(grown, largest), size)
            reserved = slab if slab == _LARGEST_SLAB else -(-(slab // size * size) // _PAGE) * _PAGE
            ends = reserved - slab // size * size if slab >= largest else 0  # smaller ones' are counted above
            held += size * count + ends * (count // (slab // size)) + reserved + 2 * _PAGE
        held = max(held, before)
    return held


def _largest_slab(size: int, budget_bytes: int) -> int:
    """Bytes of a slab of blocks of `size` at most, in an arena with a budget."""
    least = size
    while -least % _PAGE * _LAST_PAGE > least:
        least += size
    share = 1 << (budget_bytes // _BUDGET_SLABS).bit_length() >> 1
    return min(max(share, least), max(least, _LARGEST_SLAB))


def _last(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1..most that fits, where all below it fit as well; 0 if none does."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))
