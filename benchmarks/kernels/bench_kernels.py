"""Microbenchmarks of the kernels: every instruction set this CPU runs, beside numpy.

    pytest benchmarks/kernels --benchmark-group-by=group

Compare ratios inside one run. One call through the Python face handles one
block, 64 tokens of one kv head; the call itself is part of the time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from inferos import Arena, KVCache, LayerSpec, kernels

HEAD_DIM = 128
TOKENS = 64
ROWS = np.random.default_rng(0).standard_normal((TOKENS, HEAD_DIM), dtype=np.float32)
ISAS = kernels.runnable_isas()
PARTS = ["k8", "k4", "v8", "v4"]

Float32 = npt.NDArray[np.float32]


def elements(benchmark: BenchmarkFixture, count: int) -> None:
    """Record throughput beside the time."""
    benchmark.extra_info["elements"] = count
    benchmark.extra_info["Gelem_per_s"] = count / benchmark.stats.stats.median / 1e9


def numpy_quantize(x: Float32, axis: int, steps: int) -> tuple[npt.NDArray[np.uint8], Float32, Float32]:
    """Asymmetric quantisation as one writes it in numpy: the peer of k8, k4 and v4."""
    low = x.min(axis=axis, keepdims=True)
    scale = (x.max(axis=axis, keepdims=True) - low) / steps
    return np.rint((x - low) / scale).astype(np.uint8), scale, low


@pytest.mark.parametrize("isa", [*ISAS, "numpy"])
@pytest.mark.parametrize("part", PARTS)
def bench_quantize(benchmark: BenchmarkFixture, part: str, isa: str) -> None:
    benchmark.group = f"quantize_{part}"
    if isa == "numpy":
        benchmark(numpy_quantize, ROWS, 0 if part[0] == "k" else 1, 255 if part[1] == "8" else 15)
    else:
        quantize = kernels.quantize_k if part[0] == "k" else kernels.quantize_v
        benchmark(quantize, ROWS, int(part[1]), isa=isa)
    elements(benchmark, ROWS.size)


@pytest.mark.parametrize("isa", [*ISAS, "numpy"])
@pytest.mark.parametrize("part", PARTS)
def bench_dequantize(benchmark: BenchmarkFixture, part: str, isa: str) -> None:
    benchmark.group = f"dequantize_{part}"
    if isa == "numpy":
        codes, scale, low = numpy_quantize(ROWS, 0 if part[0] == "k" else 1, 255 if part[1] == "8" else 15)
        benchmark(lambda: codes * scale + low)
    else:
        quantize = kernels.quantize_k if part[0] == "k" else kernels.quantize_v
        dequantize = kernels.dequantize_k if part[0] == "k" else kernels.dequantize_v
        benchmark(dequantize, quantize(ROWS, int(part[1])), isa=isa)
    elements(benchmark, ROWS.size)


def numpy_rotate(x: Float32) -> Float32:
    """The same transform as matrix multiplication."""
    return x @ HADAMARD


def hadamard_matrix(n: int) -> Float32:
    """Orthonormal, in Sylvester's order."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(n))


HADAMARD = hadamard_matrix(HEAD_DIM)


@pytest.mark.parametrize("isa", [*ISAS, "numpy"])
def bench_rotate(benchmark: BenchmarkFixture, isa: str) -> None:
    benchmark.group = "rotate"
    if isa == "numpy":
        benchmark(numpy_rotate, ROWS)
    else:
        benchmark(kernels.rotate, ROWS, isa=isa)
    elements(benchmark, ROWS.size)


@pytest.mark.parametrize("isa", [*ISAS, "numpy"])
def bench_to_f16(benchmark: BenchmarkFixture, isa: str) -> None:
    benchmark.group = "f32_to_f16"
    if isa == "numpy":
        benchmark(ROWS.astype, np.float16)
    else:
        benchmark(kernels.to_f16, ROWS, isa=isa)
    elements(benchmark, ROWS.size)


def numpy_attend(q: Float32, k: Float32, v: Float32) -> Float32:
    """One token's attention over FP32 keys and values, (kv_heads, tokens, head_dim), for groups of query heads."""
    logits = np.einsum("hgd,htd->hgt", q, k) * np.float32(HEAD_DIM**-0.5)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hgt,htd->hgd", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("kv", ["f16", "int8", "k8v4", "int4", "numpy"])
def bench_decode(benchmark: BenchmarkFixture, kv: str) -> None:
    """One query token, 8 kv heads with 4 query heads each, 2048 tokens; INFEROS_ISA chooses the instruction set."""
    benchmark.group = f"decode 32/8/{HEAD_DIM}, 2048 tokens, {kernels.active_isa()}"
    rng = np.random.default_rng(1)
    keys, values = rng.standard_normal((2, 2048, 8, HEAD_DIM), dtype=np.float32)
    query = rng.standard_normal((1, 32, HEAD_DIM), dtype=np.float32)
    if kv == "numpy":
        k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (keys, values))
        benchmark(numpy_attend, query.reshape(8, 4, HEAD_DIM), k, v)
    else:
        with KVCache([LayerSpec(8, HEAD_DIM)], kv=kv) as cache:
            for start in range(0, 2048, 256):
                cache.begin(256)
                cache.append(0, keys[start : start + 256], values[start : start + 256])
                cache.commit()
            benchmark(cache.attend, 0, query)
    elements(benchmark, keys.size * 2)


def bench_sequence_through_the_arena(benchmark: BenchmarkFixture) -> None:
    """Open a sequence, append 256 tokens, close it: what the arena, the window and packing cost together."""
    benchmark.group = "arena"
    arena = Arena()
    chunk = np.random.default_rng(2).standard_normal((256, 8, HEAD_DIM), dtype=np.float32)

    def fill() -> None:
        with KVCache([LayerSpec(8, HEAD_DIM)], kv="int8", arena=arena) as cache:
            cache.begin(256)
            cache.append(0, chunk, chunk)
            cache.commit()

    benchmark(fill)
    elements(benchmark, chunk.size * 2)
