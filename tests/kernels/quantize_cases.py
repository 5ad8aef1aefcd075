"""Rows that break quantisers, and how the tests read codes: shared by the tests of this folder."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from inferos.kv import kernels

ISAS = kernels.runnable_isas()
PARTS: tuple[Literal["k8", "k4", "v8", "v4"], ...] = ("k8", "k4", "v8", "v4")
HEAD_DIMS = tuple(range(16, 257, 16))

Float64 = npt.NDArray[np.float64]


def quantize(part: str, x: np.ndarray, isa: str = "") -> kernels.Quantized:
    function = kernels.quantize_k if part[0] == "k" else kernels.quantize_v
    return function(x, int(part[1]), isa=isa)


def dequantize(q: kernels.Quantized, *, half: bool = False, isa: str = "") -> np.ndarray:
    function = kernels.dequantize_k if q.part[0] == "k" else kernels.dequantize_v
    return function(q, half=half, isa=isa)


def same_bits(a: kernels.Quantized, b: kernels.Quantized) -> bool:
    grids = [(a.scales, b.scales)] if a.minima is None else [(a.scales, b.scales), (a.minima, b.minima)]
    return a.codes.tobytes() == b.codes.tobytes() and all(x.tobytes() == y.tobytes() for x, y in grids)


def codes_of(q: kernels.Quantized) -> npt.NDArray[np.int64]:
    """(64, head_dim) codes, read out of the tile order of block.hpp."""
    codes = q.codes
    if q.part[1] == "4":  # item j in the low nibble of byte j, item 4 + j in the high one
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
    order = (0, 2, 1, 3) if q.part[0] == "k" else (1, 3, 0, 2)
    return codes.transpose(order).reshape(64, q.head_dim).astype(np.int64)


def grid_of(q: kernels.Quantized) -> tuple[Float64, Float64]:
    """Stored scale and minimum of every value, (tokens, head_dim)."""
    scales = q.scales.astype(np.float64)
    minima = np.zeros_like(scales) if q.minima is None else q.minima.astype(np.float64)
    if q.part[0] == "k":
        shape = (q.tokens, q.head_dim)
        return np.broadcast_to(scales, shape), np.broadcast_to(minima, shape)
    return np.repeat(scales[: q.tokens, None], q.head_dim, 1), np.repeat(minima[: q.tokens, None], q.head_dim, 1)


def cleaned(x: np.ndarray) -> Float64:
    """What a quantiser sees: NaN as 0, the rest clamped to fp16's range."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        exact = x.astype(np.float64)
    return np.clip(np.where(np.isnan(exact), 0.0, exact), -65504.0, 65504.0)


def half_step_violations(x: np.ndarray, q: kernels.Quantized) -> int:
    """Values further than half a stored step from what their code says, in float64."""
    scale, minimum = grid_of(q)
    return int((np.abs(cleaned(x) - (minimum + scale * codes_of(q)[: q.tokens])) > scale / 2).sum())


def bell(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape) * 10.0 ** rng.uniform(-8, 4)


def log_uniform(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return 10.0 ** rng.uniform(-44, 38, shape) * rng.choice([-1, 1], shape)


def constant(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.full(shape, rng.choice([0.0, -0.0, 1.0, -3.1, 1e-40, 65504.0, 1e-7]))


def offset(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.uniform(-5e4, 5e4) + rng.uniform(-1e-3, 1e-3, shape)


def ties(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(-255, 256, shape) / 2


def tiny(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-149, -22, shape)


def sprinkled(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    x = rng.standard_normal(shape)
    hit = rng.random(shape) < 0.1
    x[hit] = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1e38, -1e38, 1e-45, 65504.0, 65520.0], hit.sum())
    return x


def any_bits(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)


def tie_at_zero(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Values so close to 0, where a boundary between two codes lies, that x - minimum rounds onto it even in double."""
    x = rng.uniform(-1, 1, shape) * 1e-40
    x[0] = -127.5 / 128
    x[-1] = 127.5 / 128
    x[:, 0] = -7.5 / 16
    x[:, -1] = 7.5 / 16
    return x


SHAPES = (bell, log_uniform, constant, offset, ties, tiny, sprinkled, any_bits, tie_at_zero)


def make(shape: object, seed: int, tokens: int, head_dim: int, dtype: type) -> np.ndarray:
    """Rows of one shape; `shape` is one of SHAPES."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return np.ascontiguousarray(shape(rng, (tokens, head_dim)).astype(np.float32).astype(dtype))  # type: ignore[operator]
