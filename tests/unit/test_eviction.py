"""Evicted blocks leave attention for good: what is left of the sequence is exact, and nothing reaches back to them."""

from __future__ import annotations

import numpy as np
import pytest
from caches import FORMATS, NOT_HELD, content, feed, rows, snapshot, used
from models import Tiny
from test_op import attention_model, open_model

from inferos import errors
from inferos.kv import Arena, KVCache, LayerSpec
from inferos.runtime.rewrite import rewrite_model

SPEC = LayerSpec(2, 32)
HEADS = 4
BOUNDS = {"f16": 2e-6, "int8": 0.01, "k8v4": 0.01, "int4": 0.02}  # decode rounds q and p over packed blocks


def filled(kv: str = "int8", tokens: int = 700, spec: LayerSpec = SPEC, **options: object) -> KVCache:
    cache = KVCache([spec], kv=kv, **options)
    feed(cache, tokens)
    feed(cache, 1, seed=1)  # packs
    return cache


def holed(kv: str, spec: LayerSpec = SPEC) -> KVCache:
    """Blocks missing at both ends, in the middle, and not the same ones in both heads."""
    cache = filled(kv, spec=spec)
    for head, index in [(0, 3), (0, 4), (0, 8), (1, 5), (1, 6), (1, 7), (1, 8)]:
        assert cache.evict(0, head, index)
    return cache


def reference(cache: KVCache, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the newest len(q) tokens over what each head still holds, in float64; and each query's mass."""
    spec, total = cache.layers[0], cache.length
    out = np.zeros(q.shape)
    mass = np.zeros((len(q), spec.kv_heads, total))
    group = HEADS // spec.kv_heads
    for head in range(spec.kv_heads):
        held = np.flatnonzero(cache.formats(0, head) != NOT_HELD)
        kv = np.stack([np.stack(cache.read(0, head, p)[:2]) for p in held]).astype(np.float64)
        for i in range(len(q)):
            position = total - len(q) + i
            seen = (held <= position) & ((spec.local_window < 0) | (held >= position - spec.local_window))
            for g in range(group):
                logits = kv[seen, 0] @ q[i, head * group + g] / np.sqrt(spec.head_dim)
                p = np.exp(logits - logits.max())
                p /= p.sum()
                out[i, head * group + g] = p @ kv[seen, 1]
                mass[i, head, held[seen]] += p / group
    return out, mass


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("spec", [SPEC, LayerSpec(2, 32, 460)], ids=["all", "sliding"])
@pytest.mark.parametrize("tokens", [1, 20, 100], ids=["decode", "chunk", "prefill"])
def test_attention_is_over_the_blocks_that_are_left(kv, spec, tokens):
    with holed(kv, spec) as cache:
        feed(cache, tokens, seed=2)
        q = np.random.default_rng(3).standard_normal((tokens, HEADS, 32), dtype=np.float32)
        out, received = cache.attend(0, q, mass=True)
        wanted, mass = reference(cache, q)
        assert np.abs(out - wanted).max() < (BOUNDS[kv] if tokens == 1 else 3e-6)
        np.testing.assert_allclose(received, mass[::-1][:64:4].mean(0), rtol=2**-11, atol=BOUNDS[kv] / 10)
        for head in range(2):
            assert (received[head][cache.formats(0, head) == NOT_HELD] == 0).all()


def test_the_op_sees_what_the_cache_sees():
    tiny = Tiny(layers=1, head_dim=32, heads=4, kv_heads=2, rotary=False)
    session = open_model(rewrite_model(attention_model(tiny)))
    random = np.random.default_rng(0)
    with holed("int4") as cache:
        for tokens in (1, 30):
            q, k, v = (
                random.standard_normal((1, tokens, heads, 32)).astype(np.float16).astype(np.float32)
                for heads in (4, 2, 2)
            )
            with cache.fork() as twin:
                twin.begin(tokens)
                twin.append(0, k[0], v[0])
                wanted = twin.attend(0, q[0])
            total = cache.length + tokens
            feeds = {name: x.reshape(1, tokens, -1) for name, x in {"query": q, "key": k, "value": v}.items()}
            feeds |= {"inferos_seqlens_k": np.array([total - 1], np.int32), "inferos_handle": np.array([cache.handle])}
            feeds["inferos_total_length"] = np.int32(total)[...]
            (got,) = session.run(None, feeds)
            np.testing.assert_array_equal(got.reshape(wanted.shape), wanted)
            cache.commit()


def test_an_evicted_position_cannot_be_read_and_its_memory_is_free():
    arena = Arena()
    with filled(arena=arena) as cache:
        before, total = used(arena), cache.stats()
        assert cache.evict(0, 1, 2)
        inside = slice(4 + 128, 4 + 192)
        assert (cache.formats(0, 1)[inside] == NOT_HELD).all()
        assert (cache.formats(0, 0)[inside] == FORMATS["int8"]).all()
        with pytest.raises(errors.ShapeError, match="position 150 of layer 0, head 1 was evicted"):
            cache.read(0, 1, 150)
        cache.read(0, 0, 150)
        stats = cache.stats()
        assert stats.evicted_token_heads == 64
        assert np.isnan(stats.evicted_mass)  # a fixed format measures no attention
        assert stats.token_heads["int8"] == total.token_heads["int8"] - 64
        assert stats.total_bytes == used(arena) < before


@pytest.mark.parametrize("kv", ["f16", "int8", "auto"])
def test_a_block_is_evicted_once_and_never_from_the_window(kv):
    with filled(kv) as cache:
        assert cache.evict(0, 0, 1)
        before = snapshot_of_formats(cache)
        assert not cache.evict(0, 0, 1)
        assert not cache.demote(0, 0, 1, "int4")
        assert not cache.evict(0, 0, cache.grid_blocks(0) - 1)
        assert snapshot_of_formats(cache) == before
        with pytest.raises(errors.ShapeError, match="evict: head 0 of 2, block 99"):
            cache.evict(0, 0, 99)
        with pytest.raises(errors.ShapeError, match="evict: head 2 of 2"):
            cache.evict(0, 2, 0)
        cache.begin(1)
        with pytest.raises(errors.SequenceError, match="evict: a step"):
            cache.evict(0, 0, 2)


def snapshot_of_formats(cache: KVCache) -> list[bytes]:
    return [cache.formats(0, head).tobytes() for head in range(2)]


def test_no_rewind_reaches_behind_an_evicted_token():
    with filled() as cache:
        assert cache.rewind_floor == 0
        cache.evict(0, 1, 2)
        cache.evict(0, 0, 5)
        floor = 4 + 64 * 6
        assert cache.rewind_floor == floor
        for length in (1, 150, floor - 1):
            with pytest.raises(errors.RewindError, match=f"{floor}..701, nor 0"):
                cache.rewind(length)
        cache.rewind(floor)
        feed(cache, 300, seed=5)
        assert (cache.formats(0, 0)[4 + 320 : floor] == NOT_HELD).all()
        cache.rewind(0)
        assert (cache.rewind_floor, cache.stats().evicted_token_heads, cache.stats().evicted_mass) == (0, 0, 0.0)
        feed(cache, 300, seed=6)
        assert NOT_HELD not in cache.formats(0, 0)


def test_a_fork_lacks_what_was_evicted_and_goes_its_own_way():
    with filled() as first:
        first.evict(0, 0, 2)
        with first.fork() as second:
            assert (second.formats(0, 0) == first.formats(0, 0)).all()
            second.evict(0, 0, 3)
            assert (first.formats(0, 0)[4 + 192 : 4 + 256] == FORMATS["int8"]).all()
            assert (second.stats().evicted_token_heads, first.stats().evicted_token_heads) == (128, 64)
            feed(first, 200, seed=3)
            feed(second, 200, seed=3)
        np.testing.assert_array_equal(content(first, 0, 1, 0, 701), content(first, 0, 1, 0, 701))


@pytest.mark.parametrize("kv", ["int8", "auto"])
def test_steps_that_die_leave_evictions_as_they_are(kv):
    with filled(kv) as cache:
        cache.evict(0, 0, 2)
        cache.evict(0, 1, 0)
        feed(cache, 1, seed=9)
        before = snapshot_of_formats(cache), cache.length, cache.rewind_floor
        for tokens in (1, 70, 300):
            feed(cache, tokens, seed=7, commit=False)
            cache.rollback()
            assert (snapshot_of_formats(cache), cache.length, cache.rewind_floor) == before


def test_a_sliding_window_forgets_evicted_blocks_too():
    spec = LayerSpec(1, 16, 200)
    with filled(spec=spec, tokens=400) as cache:
        index = cache.grid_blocks(0) - 4
        assert cache.evict(0, 0, index)
        assert cache.stats().evicted_token_heads == 64
        feed(cache, 400, seed=4)
        assert cache.stats().evicted_token_heads == 0
        assert cache.rewind_floor >= cache.kept_from


def test_the_share_of_attention_that_went_is_reported_per_head():
    with KVCache([SPEC], kv="auto", gamma=0.5) as cache:
        k, v = rows(0, 600, SPEC)
        cache.begin(600)
        cache.append(0, k, v)
        _, mass = cache.attend(0, rows(1, 600, LayerSpec(HEADS, 32))[0], mass=True)
        cache.commit()
        feed(cache, 1, seed=1)
        wanted = np.zeros(2)
        for head, index in [(0, 1), (1, 2), (1, 5)]:
            start = 4 + 64 * index
            wanted[head] += mass[head, start : start + 64].sum()
            cache.evict(0, head, index)
            assert cache.stats().evicted_mass == pytest.approx(wanted.max(), rel=2e-3)


def test_without_a_budget_nothing_is_evicted():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.9, 0.9), overflow="evict") as cache:
        for tokens in [600] + [1] * 400:
            cache.begin(tokens)
            cache.append(0, *rows(cache.length, tokens, SPEC))
            cache.attend(0, np.ones((tokens, HEADS, 32), np.float32))
            cache.commit()
        assert cache.stats().evicted_token_heads == 0
        assert set(cache.formats(0, 0)) == {FORMATS["f16"], FORMATS["int8"], FORMATS["k8v4"]}
        assert snapshot(cache)[0] == 1000
