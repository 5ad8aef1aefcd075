"""Small caches with known contents, for the tests of the sequence cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from inferos.kv import Arena, KVCache, LayerSpec

Float32 = npt.NDArray[np.float32]

FORMATS = {"f16": 0, "int8": 1, "k8v4": 2, "int4": 3}
NOT_HELD = 255


def rows(seed: int, tokens: int, spec: LayerSpec) -> tuple[Float32, Float32]:
    """K and V (tokens, kv_heads, head_dim), N(0, 1) and exact in fp16."""
    random = np.random.default_rng(seed)
    k, v = random.standard_normal((2, tokens, spec.kv_heads, spec.head_dim), dtype=np.float32)
    return k.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)


def feed(cache: KVCache, tokens: int, seed: int = 0, *, commit: bool = True) -> list[tuple[Float32, Float32]]:
    """One step of `tokens` random tokens; what was written, per layer."""
    cache.begin(tokens)
    written = []
    for layer, spec in enumerate(cache.layers):
        k, v = rows(seed * 1000 + layer, tokens, spec)
        cache.append(layer, k, v)
        written.append((k, v))
    if commit:
        cache.commit()
    return written


def block_bytes(kv: str, head_dim: int, tokens: int = 64) -> int:
    """Bytes of one block, counted from the format's description and not from the code: 64 tokens, K and V."""
    if kv == "f16":
        return tokens * head_dim * 2 * 2
    codes = {"int8": 2.0, "k8v4": 1.5, "int4": 1.0}[kv] * 64 * head_dim
    k_scales = 2 * 2 * head_dim
    v_scales = 64 * 2 * (1 if kv == "int8" else 2)
    return int(codes) + k_scales + v_scales


def used(arena: Arena) -> int:
    """Live bytes, as the allocator counts them."""
    return arena.stats().used_bytes


def assert_within_half_a_step(kv: str, got: Float32, wanted: Float32) -> None:
    """K and V (tokens, 2, head_dim) as a format must give them back; scales and minima are rounded to fp16.

    K: half a step of the channel's range, per value. V in INT8: the same of the token's peak. V in INT4 lives
    rotated, where a token's values lie within its norm: the norm of its error is at most half a step per channel.
    """
    error = np.abs(got.astype(np.float64) - wanted)
    k_steps, v_steps = {"f16": (np.inf, np.inf), "int8": (255, 127), "k8v4": (255, 15), "int4": (15, 15)}[kv]
    slack, tiny = 1 + 2**-8, 1e-6
    k_range = np.ptp(wanted[:, 0], axis=0) + 2**-10 * np.abs(wanted[:, 0]).max(0)
    assert (error[:, 0] <= k_range / k_steps / 2 * slack + tiny).all()
    if kv in ("f16", "int8"):
        assert (error[:, 1] <= np.abs(wanted[:, 1]).max(1, keepdims=True) / v_steps / 2 * slack + tiny).all()
        return
    norm = np.linalg.norm(wanted[:, 1], axis=1)
    step = 2 * norm / v_steps * slack
    assert (np.linalg.norm(error[:, 1], axis=1) <= np.sqrt(wanted.shape[2]) * step / 2 + tiny).all()


def content(cache: KVCache, layer: int, head: int, start: int, stop: int) -> np.ndarray:
    """K and V (tokens, 2, head_dim) as they come back."""
    return np.stack([np.stack(cache.read(layer, head, p)[:2]) for p in range(start, stop)])


def snapshot(cache: KVCache) -> tuple:
    """Everything about a cache that a refused call must not change."""
    held = tuple(
        (cache.formats(layer, head).tobytes(), content(cache, layer, head, cache.kept_from, cache.length).tobytes())
        for layer, spec in enumerate(cache.layers)
        for head in range(spec.kv_heads)
        if cache.length
    )
    return cache.length, cache.pending, cache.stats(), used(cache.arena), held
