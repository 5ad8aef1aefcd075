"""What a cache will take, against caches that take it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from caches import feed
from hypothesis import given, settings
from hypothesis import strategies as st

from inferos.errors import ConfigError
from inferos.kv import Arena, KVCache, LayerSpec
from inferos.kv.footprint import CachePlan
from inferos.kv.tiers import settled_shares

LAYERS = (LayerSpec(2, 32), LayerSpec(1, 64), LayerSpec(2, 32, 100), LayerSpec(1, 16, 0))


def filled(plan: CachePlan, tokens: int, arena: Arena) -> KVCache:
    """A cache of the plan's shape that came to `tokens` tokens: a prompt in runs, its last tokens one by one."""
    cache = KVCache(
        plan.layers,
        kv=plan.kv,
        recent_window=plan.recent_window,
        sink_tokens=plan.sink_tokens,
        thresholds=plan.thresholds,
        l2_format=plan.l2_format,
        arena=arena,
    )
    alone = min(tokens, 3)
    while cache.length < tokens - alone:
        feed(cache, min(plan.prefill_chunk, tokens - alone - cache.length))
    for _ in range(alone):
        feed(cache, 1)
    return cache


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3),
    st.sampled_from(["f16", "int8", "k8v4", "int4"]),
    st.integers(16, 300),
    st.integers(0, 64),
    st.one_of(st.integers(1, 80), st.integers(81, 1500)),
    st.sampled_from([64, 200, 512]),
)
def test_a_fixed_format_takes_exactly_what_was_planned(
    layers: list[LayerSpec], kv: str, window: int, sinks: int, tokens: int, chunk: int
) -> None:
    plan = CachePlan(tuple(layers), kv, window, sinks, prefill_chunk=chunk)
    arena = Arena()
    with filled(plan, tokens, arena) as cache:
        planned, held = plan.at(tokens), cache.stats()
        assert planned.kv_bytes == held.total_bytes == arena.stats().used_bytes
        assert {kv: n for kv, n in planned.blocks.items() if n} == {kv: n for kv, n in held.blocks.items() if n}
        token_heads = {kv: n for kv, n in held.token_heads.items() if n}
        assert {kv: n for kv, n in planned.token_heads.items() if n} == token_heads
        assert arena.stats().reserved_high_water_bytes <= planned.memory_bytes


@pytest.mark.parametrize("thresholds", [(1.0, 0.7, 0.3), (1.0, 1.0, 0.4), (1.0, 0.0, 0.0), (0.7, 0.5, 0.3)])
@pytest.mark.parametrize("l2_format", ["k8v4", "int4"])
def test_auto_takes_what_was_planned_once_its_verdicts_are_carried_out(
    thresholds: tuple[float, float, float], l2_format: str
) -> None:
    plan = CachePlan(LAYERS, "auto", thresholds=thresholds, l2_format=l2_format)
    tokens, arena = 2500, Arena()
    with filled(plan, tokens, arena) as cache:
        for layer, spec in enumerate(LAYERS):
            for head in range(spec.kv_heads):
                held = cache.formats(layer, head)
                sinks = 0 if spec.local_window >= 0 else 4
                due = [b for b in range((tokens - 1 - 64 - sinks) // 64) if held[sinks + 64 * b] != 255]
                l0, l1, _, _ = settled_shares(thresholds, len(due))
                for block in due[l0 : l0 + l1]:
                    cache.demote(layer, head, block, "int8")
                for block in due[l0 + l1 :]:
                    cache.demote(layer, head, block, l2_format)
        planned, stats = plan.at(tokens), cache.stats()
        assert planned.kv_bytes == stats.total_bytes == arena.stats().used_bytes
        assert planned.score_bytes == stats.score_bytes
        assert arena.stats().reserved_high_water_bytes <= planned.memory_bytes


def test_auto_comes_within_a_hundredth_of_the_plan_by_its_own_reviews() -> None:
    layers = (LayerSpec(2, 16),) * 2
    plan, arena = CachePlan(layers, "auto"), Arena()
    random = np.random.default_rng(0)
    with KVCache(layers, kv="auto", arena=arena) as cache:
        while cache.length < 16_900:
            tokens = 512 if cache.length < 16_384 else 1
            cache.begin(tokens)
            for layer in range(2):
                rows = random.standard_normal((3, tokens, 2, 16), dtype=np.float32)
                cache.append(layer, rows[0], rows[1])
                if tokens == 1 or cache.length >= 15_872:
                    cache.attend(layer, rows[2][-1:])
            cache.commit()
        planned = plan.at(cache.length)
        assert cache.stats().total_bytes == pytest.approx(planned.kv_bytes, rel=0.01)
        assert cache.stats().score_bytes == pytest.approx(planned.score_bytes, rel=0.02)
        assert arena.stats().reserved_high_water_bytes <= planned.memory_bytes


@pytest.mark.parametrize("tokens", [70, 500, 1037, 2300])
def test_auto_takes_exactly_what_was_planned_where_its_thresholds_leave_no_choice(tokens: int) -> None:
    plan, arena = CachePlan(LAYERS, "auto", thresholds=(1.0, 1.0, 0.4), l2_format="int4"), Arena()
    with filled(plan, tokens - 3, arena) as cache:
        for _ in range(3):
            feed(cache, 1)
        planned, held = plan.at(tokens), cache.stats()
        assert planned.kv_bytes == held.total_bytes == arena.stats().used_bytes
        assert planned.score_bytes == held.score_bytes
        assert arena.stats().reserved_high_water_bytes <= planned.memory_bytes


@pytest.mark.parametrize("kv", ["f16", "int8", "auto"])
def test_rows_share_one_arena(kv: str) -> None:
    plan, arena = CachePlan(LAYERS, kv, thresholds=(1, 0, 0)), Arena()
    caches = [filled(plan, 700, arena) for _ in range(3)]
    planned = plan.at(700, rows=3)
    assert planned.kv_bytes == arena.stats().used_bytes == 3 * plan.at(700).kv_bytes
    assert arena.stats().reserved_high_water_bytes <= planned.memory_bytes
    for cache in caches:
        cache.close()


def test_a_sliding_window_is_counted_by_what_it_shows() -> None:
    spec = LayerSpec(2, 32, 100)
    plan = CachePlan((spec,), "int8")
    assert plan.at(100_000).fp16_bytes == 101 * 2 * 32 * 2 * 2
    assert plan.at(100_000).kv_bytes == plan.at(100_000 - 64 * 50).kv_bytes
    assert plan.at(50).fp16_bytes == 50 * 2 * 32 * 2 * 2


@pytest.mark.parametrize("kv", ["f16", "int8", "k8v4", "int4"])
@pytest.mark.parametrize("layers", [(LayerSpec(2, 32),) * 2, LAYERS], ids=["alike", "mixed"])
@pytest.mark.parametrize("budget", [1 << 20, 3 << 20, 7_000_000])
def test_the_longest_context_that_fits_does_and_the_rows_do(
    kv: str, layers: tuple[LayerSpec, ...], budget: int
) -> None:
    plan = CachePlan(layers, kv)
    longest = plan.longest(budget, 1 << 20)
    assert plan.at(longest, 1, budget).memory_bytes <= budget < plan.at(longest + 64, 1, budget).memory_bytes
    with filled(plan, longest, Arena(budget)) as cache:
        assert cache.length == longest
    rows, arena = plan.rows(budget, 500), Arena(budget)
    assert rows > 0
    for cache in [filled(plan, 500, arena) for _ in range(rows)]:
        cache.close()


@pytest.mark.parametrize("thresholds", [(1.0, 0.7, 0.3), (0.8, 0.3, 0.0)])
@pytest.mark.parametrize("budget", [3 << 20, 9_000_000])
def test_auto_is_squeezed_into_what_fits(thresholds: tuple[float, float, float], budget: int) -> None:
    layers = (LayerSpec(2, 32),) * 2
    plan = CachePlan(layers, "auto", thresholds=thresholds)
    longest = plan.longest(budget, 1 << 20)
    assert plan.at(longest, 1, budget).memory_bytes > budget  # not by its thresholds
    random, arena = np.random.default_rng(0), Arena(budget)
    with KVCache(layers, kv="auto", thresholds=thresholds, l2_format="k8v4", arena=arena) as cache:
        while cache.length < longest:
            tokens = min(512, longest - cache.length)
            cache.begin(tokens)
            for layer in range(2):
                rows = random.standard_normal((3, tokens, 2, 32), dtype=np.float32)
                cache.append(layer, rows[0], rows[1])
                cache.attend(layer, rows[2][-1:])
            cache.commit()
        assert arena.stats().reserved_high_water_bytes <= budget


def test_nothing_fits_a_budget_that_is_too_small() -> None:
    plan = CachePlan((LayerSpec(8, 128),) * 32)
    assert plan.longest(1 << 20, 1 << 20) == 0
    assert plan.rows(1 << 20, 100) == 0


@pytest.mark.parametrize("options", [{"kv": "int2"}, {"l2_format": "auto"}, {"thresholds": (0.5, 0.7, 0.3)}])
def test_a_wrong_plan_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CachePlan(LAYERS, **options)
