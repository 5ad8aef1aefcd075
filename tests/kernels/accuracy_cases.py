"""Attention output of every tier against float64, and of quantised keys with outlier channels.

Shared by tests/kernels/test_accuracy.py, which holds the bounds, and benchmarks/accuracy.py, which prints the table.
Everything is drawn from numpy's PCG64 (``numpy.random.default_rng``) with the seeds below.
"""

from __future__ import annotations

import attend_cases as cases
import numpy as np
from attend_cases import TOKENS, State
from numpy.typing import NDArray

from inferos.kv import kernels

SEED = 20_261
CONTEXT = 512  # tokens
KV_HEADS = 4  # drawn independently; an error is over all of them
HEAD_DIMS = (16, 64, 80, 96, 128, 256)
RATIOS = (1, 3, 4, 8)  # query heads per kv head
MAGNITUDES = (20, 75, 400)  # of an outlier channel, in standard deviations of the others
FREQUENCIES = ("high", "middle", "low")  # of the outlier's rotary pair
OUTLIER_SHARE = 0.1  # of the logits' energy that the outlier pair carries
ROPE_BASE = 10_000.0

Doubles = NDArray[np.float64]


def attend_packed(fmt: str, q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32]) -> Doubles:
    """Packs k and v (tokens, head_dim) and attends with q (heads, head_dim): the active ISA's kernels."""
    blocks = []
    for start in range(0, len(k), TOKENS):
        record = kernels.pack_block(fmt, k[start : start + TOKENS], v[start : start + TOKENS])
        blocks.append((record, start, 0, min(TOKENS, len(k) - start), TOKENS))
    state = cases.decode(kernels.active_isa(), fmt, q, blocks, State.empty(*q.shape))
    if fmt in ("k8v4", "int4"):
        state.o = kernels.rotate(state.o)
    return state.output()


def held_in(fmt: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Keys and values (tokens, head_dim) as the blocks of a format give them back."""
    held = []
    for start in range(0, len(x), TOKENS):
        k, v = x[start : start + TOKENS], y[start : start + TOKENS]
        held.append(kernels.unpack_block(fmt, kernels.pack_block(fmt, k, v), x.shape[1], len(k)))
    return tuple(np.concatenate([pair[i] for pair in held]) for i in (0, 1))


def flat_error(fmt: str, head_dim: int, ratio: int, *, arithmetic_only: bool = False) -> float:
    """||output - exact|| / ||exact|| with q, K and V from N(0, 1): no outliers, no peaks.

    For ``f16``, K and V are FP16 numbers to begin with, and the exact result is that of the same numbers; with
    `arithmetic_only` it is that of what the blocks hold, so that the loss of storing them is left out.
    """
    rng = np.random.default_rng([SEED, head_dim, ratio])
    error = norm = 0.0
    for _ in range(KV_HEADS):
        k, v = rng.standard_normal((2, CONTEXT, head_dim)).astype(np.float32)
        q = rng.standard_normal((ratio, head_dim)).astype(np.float32)
        if fmt == "f16":
            k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
        want = cases.exact(q, *(held_in(fmt, k, v) if arithmetic_only else (k, v)))
        error += float(np.square(attend_packed(fmt, q, k, v) - want).sum())
        norm += float(np.square(want).sum())
    return float(np.sqrt(error / norm))


def rotary_pair(frequency: str, head_dim: int) -> int:
    """The pair (i, i + head_dim / 2) that turns at ROPE_BASE ** (-2 i / head_dim) radians a token."""
    return {"high": 0, "middle": head_dim // 4, "low": head_dim // 2 - 1}[frequency]


def outlier_error(fmt: str, head_dim: int, magnitude: int, frequency: str) -> float:
    """||output - exact|| / ||exact|| where only K is quantised and one rotary pair has a large constant key.

    A key bias as Qwen2.5 has it: before RoPE the pair's two channels hold `magnitude`, so with RoPE they turn with
    the position. Queries give that pair OUTLIER_SHARE of the logits' energy, as in a model whose logits are of
    ordinary size. V and the arithmetic are exact; K is what the shipped codec gives back.
    """
    i = rotary_pair(frequency, head_dim)
    j = i + head_dim // 2
    angle = np.arange(CONTEXT) * ROPE_BASE ** (-2 * i / head_dim)
    rng = np.random.default_rng([SEED, head_dim, magnitude, FREQUENCIES.index(frequency)])
    error = norm = 0.0
    for _ in range(KV_HEADS):
        k = rng.standard_normal((CONTEXT, head_dim))
        k[:, i] += magnitude * (np.cos(angle) - np.sin(angle))
        k[:, j] += magnitude * (np.cos(angle) + np.sin(angle))
        k = k.astype(np.float32)
        v = rng.standard_normal((CONTEXT, head_dim))
        q = rng.standard_normal((8, head_dim))
        others = head_dim - 2
        q[:, [i, j]] *= np.sqrt(OUTLIER_SHARE / (1 - OUTLIER_SHARE) * others / 2) / magnitude
        held, _ = held_in(fmt, k, np.zeros_like(k))
        want = cases.exact(q, k, v)
        error += float(np.square(cases.exact(q, held, v) - want).sum())
        norm += float(np.square(want).sum())
    return float(np.sqrt(error / norm))
