"""The attention drivers over a whole cache: mixed tiers, windows, sinks, prefill and decode, attention mass."""

from __future__ import annotations

import attend_cases as cases
import numpy as np
import pytest
from numpy.typing import NDArray

from inferos.kv import KVCache, LayerSpec

FORMATS = ("f16", "int8", "k8v4", "int4")
# Only arithmetic is left, because the oracle reads the cache's own tokens back: decode rounds q and p.
DECODE_BOUND = {"f16": 1e-6, "int8": 0.01, "k8v4": 0.01, "int4": 0.02}
PREFILL_BOUND = 2e-6

Floats = NDArray[np.float32]


def draw(cache: KVCache, tokens: int, rng: np.random.Generator) -> Floats:
    (layer,) = cache.layers
    rows: Floats = rng.standard_normal((2, tokens, layer.kv_heads, layer.head_dim)).astype(np.float32)
    return rows


def fill(cache: KVCache, tokens: int, rng: np.random.Generator, chunk: int = 150) -> None:
    while cache.length < tokens:
        k, v = draw(cache, min(chunk, tokens - cache.length), rng)
        cache.begin(len(k))
        cache.append(0, k, v)
        cache.commit()


def held_during_step(cache: KVCache, rows: Floats) -> Floats:
    """Keys and values (2, kv_heads, length, head_dim) that a step which appends `rows` attends to.

    A fork goes through the same step, which packs what is due, and gives back what it holds; the new tokens are FP16.
    """
    with cache.fork() as twin:
        twin.begin(rows.shape[1])
        twin.append(0, *rows)
        twin.rollback()
        return np.concatenate([held(twin), rows.astype(np.float16).astype(np.float32).transpose(0, 2, 1, 3)], axis=2)


def held(cache: KVCache) -> Floats:
    """Committed keys and values (2, kv_heads, length, head_dim); zeros for positions that the cache forgot."""
    (layer,) = cache.layers
    rows = np.zeros((2, layer.kv_heads, cache.length, layer.head_dim), np.float32)
    for head in range(layer.kv_heads):
        for position in range(cache.kept_from, cache.length):
            rows[:, head, position] = cache.read(0, head, position)[:2]
    return rows


def span(layer: LayerSpec, position: int) -> slice:
    """What a query at `position` sees."""
    return slice(0 if layer.local_window < 0 else max(0, position - layer.local_window), position + 1)


def expected(layer: LayerSpec, rows: Floats, q: Floats, softcap: float = 0.0) -> NDArray[np.float64]:
    """Causal attention of the newest len(q) positions of `rows` in float64."""
    tokens, heads, _ = q.shape
    group = heads // layer.kv_heads
    out = np.empty(q.shape)
    for head, (k, v) in enumerate(rows.swapaxes(0, 1)):
        own = slice(head * group, (head + 1) * group)
        for i in range(tokens):
            seen = span(layer, len(k) - tokens + i)
            out[i, own] = cases.exact(q[i, own], k[seen], v[seen], softcap=softcap)
    return out


def relative(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("window", [-1, 0, 70, 300])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 80), (8, 1, 128)])
def test_one_token_attends_to_all_tiers(heads: int, kv_heads: int, head_dim: int, kv: str, window: int) -> None:
    rng = np.random.default_rng([heads, head_dim, window + 1])
    layer = LayerSpec(kv_heads, head_dim, window)
    with KVCache([layer], kv=kv, recent_window=20) as cache:
        for length in (1, 17, 64, 400, 470):
            fill(cache, length, rng)
            q = rng.standard_normal((1, heads, head_dim)).astype(np.float32)
            want = expected(layer, held(cache), q)
            assert relative(cache.attend(0, q), want) <= DECODE_BOUND[kv], f"length {length}"


@pytest.mark.parametrize("window", [-1, 0, 70])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 16), (6, 2, 80), (20, 1, 128)])
def test_many_tokens_attend_causally(heads: int, kv_heads: int, head_dim: int, kv: str, window: int) -> None:
    rng = np.random.default_rng([heads, head_dim, window + 1, 7])
    layer = LayerSpec(kv_heads, head_dim, window)
    with KVCache([layer], kv=kv, recent_window=20) as cache:
        for tokens in (130, 2, 67):  # no context, then some: a tile and a bit, a pair, one more tile
            rows = draw(cache, tokens, rng)
            seen = held_during_step(cache, rows)
            cache.begin(tokens)
            cache.append(0, *rows)
            q = rng.standard_normal((tokens, heads, head_dim)).astype(np.float32)
            got = cache.attend(0, q)
            cache.commit()
            assert relative(got, expected(layer, seen, q)) <= PREFILL_BOUND, f"{tokens} of {cache.length}"


@pytest.mark.parametrize("kv", FORMATS)
def test_prefill_and_decode_agree(kv: str) -> None:
    rng = np.random.default_rng(5)
    with KVCache([LayerSpec(2, 64)], kv=kv, recent_window=64) as cache:
        fill(cache, 700, rng)
        q = rng.standard_normal((2, 8, 64)).astype(np.float32)
        both = cache.attend(0, q)[1]
        assert relative(cache.attend(0, q[1:])[0], both) <= DECODE_BOUND[kv]


@pytest.mark.parametrize("tokens", [1, 3])
def test_softcap_and_scale_reach_every_tier(tokens: int) -> None:
    rng = np.random.default_rng(6)
    for kv in FORMATS:
        with KVCache([LayerSpec(2, 64)], kv=kv, recent_window=64) as cache:
            fill(cache, 300, rng)
            q = 3 * rng.standard_normal((tokens, 4, 64)).astype(np.float32)
            want = expected(cache.layers[0], held(cache), q, softcap=2.0)
            assert relative(cache.attend(0, q, softcap=2.0), want) <= DECODE_BOUND[kv]
            scaled = cache.attend(0, np.ascontiguousarray(q / 2), scale=2 / 8, softcap=2.0)
            assert relative(scaled, want) <= DECODE_BOUND[kv]


@pytest.mark.parametrize("tokens", [1, 5, 90])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("window", [-1, 100])
def test_mass_is_the_mean_probability(kv: str, window: int, tokens: int) -> None:
    rng = np.random.default_rng([tokens, window + 1])
    layer = LayerSpec(2, 48, window)
    with KVCache([layer], kv=kv, recent_window=30) as cache:
        fill(cache, 2500 if tokens == 1 else 400, rng)  # the longer one is cut into spans
        rows = draw(cache, tokens, rng)
        keys = held_during_step(cache, rows)[0].astype(np.float64)
        cache.begin(tokens)
        cache.append(0, *rows)
        q = rng.standard_normal((tokens, 6, 48)).astype(np.float32)
        mass = cache.attend(0, q, mass=True)[1]
    assert mass.shape == keys.shape[:2]
    want = np.zeros(mass.shape)
    sampled = range(tokens - 1, max(tokens - 65, -1), -4)  # every 4th of the last 64
    for head, k in enumerate(keys):
        for i in sampled:
            seen = span(layer, len(k) - tokens + i)
            s = q[i, 3 * head : 3 * head + 3] @ k[seen].T / np.sqrt(48)
            p = np.exp(s - s.max(axis=1, keepdims=True))
            want[head, seen] += (p / p.sum(axis=1, keepdims=True)).mean(axis=0) / len(sampled)
    np.testing.assert_allclose(mass.sum(axis=1), 1, atol=1e-4)
    assert relative(mass, want) <= max(DECODE_BOUND[kv], 2**-11)  # probabilities are handed on in fp16
    assert not mass[want == 0].any()


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_query_that_is_not_finite_gives_nan_for_its_head_alone(tokens: int) -> None:
    rng = np.random.default_rng(8)
    with KVCache([LayerSpec(1, 16)], kv="int8", recent_window=16) as cache:
        fill(cache, 200, rng)
        q = rng.standard_normal((tokens, 3, 16)).astype(np.float32)
        clean = cache.attend(0, q)
        q[0, 1, 5] = np.nan
        out = cache.attend(0, q)
        assert np.isnan(out[0, 1]).all()
        out[0, 1] = clean[0, 1]
        cases.assert_same_bits(out, clean, "the other heads")


def test_half_precision_queries_give_half_precision_results() -> None:
    rng = np.random.default_rng(9)
    with KVCache([LayerSpec(2, 64)], kv="f16") as cache:
        fill(cache, 100, rng)
        q = rng.standard_normal((1, 4, 64)).astype(np.float16)
        out = cache.attend(0, q)
        assert out.dtype == np.float16
        assert relative(out.astype(np.float32), expected(cache.layers[0], held(cache), q.astype(np.float32))) <= 1e-3
