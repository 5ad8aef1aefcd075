"""Microbenchmarks around the kernels: arena allocation, importance in a long sequence, a sequence's life.

pytest benchmarks/kernels --benchmark-group-by=group
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from inferos import Arena, KVCache, LayerSpec, _core

pytestmark = pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=False)
BLOCK_BYTES = 17_024  # INT8, 128 channels
HEADS, KV_HEADS, HEAD_DIM, LONG = 32, 8, 128, 32_768


def arena_block() -> Callable[[], object]:
    arena = _core.Arena(0)
    kept = [_core.ArenaBlock(arena, BLOCK_BYTES) for _ in range(1000)]  # a slab is open
    return lambda: _core.ArenaBlock(arena, BLOCK_BYTES).release() if kept else None


@pytest.mark.parametrize(
    "allocate", [arena_block, lambda: lambda: np.empty(BLOCK_BYTES, np.uint8)], ids=["arena", "numpy"]
)
def bench_allocate_and_release(benchmark: BenchmarkFixture, allocate: Callable[[], Callable[[], object]]) -> None:
    """A block of 17 KB, the Python object included."""
    benchmark.group = "allocation"
    benchmark(allocate())


@pytest.mark.parametrize("allocate", ["arena", "numpy"])
def bench_allocate_many(benchmark: BenchmarkFixture, allocate: str) -> None:
    """1000 blocks at once, written once as a cache does, and all released: mapping and first touch included."""
    benchmark.group = "allocation of 1000"
    arena = _core.Arena(0)

    def take() -> None:
        blocks = [
            _core.ArenaBlock(arena, BLOCK_BYTES) if allocate == "arena" else np.empty(BLOCK_BYTES, np.uint8)
            for _ in range(1000)
        ]
        del blocks

    benchmark(take)


def bench_sequence_through_the_arena(benchmark: BenchmarkFixture) -> None:
    """Open a sequence, append 256 tokens, close it: what the arena, the window and packing cost together."""
    benchmark.group = "sequence"
    arena = Arena()
    chunk = np.random.default_rng(2).standard_normal((256, KV_HEADS, HEAD_DIM), dtype=np.float32)

    def fill() -> None:
        with KVCache([LayerSpec(KV_HEADS, HEAD_DIM)], kv="int8", arena=arena) as cache:
            cache.begin(256)
            cache.append(0, chunk, chunk)
            cache.commit()

    benchmark(fill)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("kv", ["int8", "k8v4", "int4", "numpy"])
def bench_append(benchmark: BenchmarkFixture, kv: str) -> None:
    """2048 tokens of one layer are written and as many packed, in memory the arena already has; CPU time of all threads.

    numpy converts the same values to float16, which is the least of it.
    """
    benchmark.group = "append 2048 tokens, 8/128, behind as many"
    tokens, arena = 2048, Arena()
    keys, values = np.random.default_rng(4).standard_normal((2, tokens, KV_HEADS, HEAD_DIM), dtype=np.float32)

    def append(cache: KVCache, start: int, count: int) -> None:
        cache.begin(count)
        cache.append(0, keys[start : start + count], values[start : start + count])
        cache.commit()

    if kv == "numpy":
        benchmark(lambda: (keys.astype(np.float16), values.astype(np.float16)))
    else:
        layers = [LayerSpec(KV_HEADS, HEAD_DIM)]
        with KVCache(layers, kv=kv, arena=arena) as cache, KVCache(layers, kv=kv, arena=arena) as other:
            for start in range(0, tokens, 64):  # by turns: every slab stays mapped when one of them is cleared
                append(cache, start, 64)
                append(other, start, 64)

            def before() -> None:
                cache.clear()
                append(cache, 0, tokens)

            benchmark.pedantic(lambda: append(cache, 0, tokens), setup=before, rounds=40)
    benchmark.extra_info["Gelem_per_s"] = keys.size * 2 / benchmark.stats.stats.min / 1e9


@pytest.mark.parametrize("kv", ["int8", "auto"])
def bench_64_tokens_at_32k(benchmark: BenchmarkFixture, kv: str) -> None:
    """64 decode steps of one layer at 32k tokens, attention included; with `auto` eight samples of mass and a review."""
    benchmark.group = "64 decode steps, 32/8/128 at 32k"
    rng = np.random.default_rng(3)
    chunk = rng.standard_normal((512, KV_HEADS, HEAD_DIM), dtype=np.float32)
    query = rng.standard_normal((1, HEADS, HEAD_DIM), dtype=np.float32)
    with KVCache([LayerSpec(KV_HEADS, HEAD_DIM)], kv=kv, thresholds=(1.0, 0.0, 0.0)) as cache:

        def steps(count: int) -> None:
            for _ in range(count):
                cache.begin(1)
                cache.append(0, chunk[:1], chunk[:1])
                cache.attend(0, query)
                cache.commit()

        for _ in range(LONG // 512):
            cache.begin(512)
            cache.append(0, chunk, chunk)
            cache.commit()
        steps(64)
        benchmark.pedantic(steps, (64,), rounds=6)
