"""Microbenchmarks of attention's kernels and of importance, in cache: each instruction set beside numpy.

    pytest benchmarks/kernels --benchmark-group-by=group

One kv head of 128 channels with a group of 4 query heads. What a whole cache in memory does: `inferos bench decode`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from inferos import _core, kernels

HEAD_DIM, GROUP, TOKENS, BLOCKS, ROWS = 128, 4, 64, 16, 128
FORMATS = ("f16", "int8", "k8v4", "int4")
ATTEND = {kernel.isa: kernel for kernel in _core.kernels.attend_runnable()}
IMPLS = [*ATTEND, "numpy"]
SCALE = float(HEAD_DIM**-0.5)
EVERYTHING = (0, 2**31 - 1)
pytestmark = pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=False)

Float32 = npt.NDArray[np.float32]


def random(*shape: int) -> Float32:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def state(rows: int) -> tuple[Float32, Float32, Float32]:
    """o, m and l of rows that have seen nothing."""
    return np.zeros((rows, HEAD_DIM), np.float32), np.full(rows, -np.inf, np.float32), np.zeros(rows, np.float32)


def numpy_attend(q: Float32, k: Float32, v: Float32) -> Float32:
    """Attention of the rows of q over FP32 keys and values."""
    logits = q @ k.T * np.float32(SCALE)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights @ v / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kv", FORMATS)
def bench_decode(benchmark: BenchmarkFixture, kv: str, impl: str) -> None:
    """One query token, 1024 tokens; numpy's are FP32."""
    benchmark.group = f"decode {kv}"
    q, k, v = random(GROUP, HEAD_DIM), random(BLOCKS, TOKENS, HEAD_DIM), random(BLOCKS, TOKENS, HEAD_DIM)
    if impl == "numpy":
        benchmark(numpy_attend, q, k.reshape(-1, HEAD_DIM), v.reshape(-1, HEAD_DIM))
        return
    blocks = [(kernels.pack_block(kv, k[i], v[i]), i * TOKENS, 0, TOKENS, TOKENS) for i in range(BLOCKS)]  # type: ignore[arg-type]
    benchmark(ATTEND[impl].decode, q, FORMATS.index(kv), blocks, EVERYTHING, SCALE, 0.0, *state(GROUP))


@pytest.mark.parametrize("impl", IMPLS)
def bench_prefill(benchmark: BenchmarkFixture, impl: str) -> None:
    """128 query rows over one block that was expanded before."""
    benchmark.group = "prefill tile"
    q, k, v = random(ROWS, HEAD_DIM), random(TOKENS, HEAD_DIM), random(TOKENS, HEAD_DIM)
    if impl == "numpy":
        benchmark(numpy_attend, q, k, v)
        return
    block = (kernels.pack_block("int8", k, v), 0, 0, TOKENS, TOKENS)
    tiles = ATTEND[impl].expand(FORMATS.index("int8"), block, HEAD_DIM)
    visible = np.tile(np.int32(EVERYTHING), (ROWS, 1))
    benchmark(ATTEND[impl].prefill, q, *tiles, 0, 0, TOKENS, visible, SCALE, 0.0, *state(ROWS))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kv", FORMATS)
def bench_expand(benchmark: BenchmarkFixture, kv: str, impl: str) -> None:
    """One block as f32 tiles; numpy widens as many fp16 values."""
    benchmark.group = f"expand {kv}"
    k, v = random(TOKENS, HEAD_DIM), random(TOKENS, HEAD_DIM)
    if impl == "numpy":
        benchmark(np.stack([k, v]).astype(np.float16).astype, np.float32)
        return
    block = (kernels.pack_block(kv, k, v), 0, 0, TOKENS, TOKENS)  # type: ignore[arg-type]
    benchmark(ATTEND[impl].expand, FORMATS.index(kv), block, HEAD_DIM)


@pytest.mark.parametrize("impl", IMPLS)
def bench_mass(benchmark: BenchmarkFixture, impl: str) -> None:
    """The probability that each token of a block received from a group."""
    benchmark.group = "mass"
    logits = random(GROUP, TOKENS)
    top, weight = logits.max(axis=1), np.ones(GROUP, np.float32)
    if impl == "numpy":
        benchmark(lambda: weight @ np.exp(logits - top[:, None]))
    else:
        benchmark(ATTEND[impl].mass, logits, top, weight)


@pytest.mark.parametrize("impl", IMPLS)
def bench_importance_fold(benchmark: BenchmarkFixture, impl: str) -> None:
    """A sample of the mass goes into a block's averages."""
    benchmark.group = "importance: fold"
    average, mass = np.zeros(TOKENS, np.float16), np.abs(random(TOKENS))
    if impl == "numpy":
        benchmark(lambda: (average * np.float32(0.97) + mass * np.float32(0.03)).astype(np.float16))
    else:
        benchmark(_core.kernels.importance_fold, average, mass, 0.97, 0.03, impl)


@pytest.mark.parametrize("impl", IMPLS)
def bench_importance_score(benchmark: BenchmarkFixture, impl: str) -> None:
    """What a block is worth: its eight heaviest tokens."""
    benchmark.group = "importance: score"
    average, norm = np.abs(random(2, TOKENS)).astype(np.float16)
    if impl == "numpy":
        benchmark(lambda: np.partition(average.astype(np.float32) * norm, -8)[-8:].sum(dtype=np.float64))
    else:
        benchmark(_core.kernels.importance_heaviest, average, norm, impl)
