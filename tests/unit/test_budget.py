"""A budget is kept to the byte: demote first, evict under the guard, then what `overflow` says. A refused step loses nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from caches import FORMATS, NOT_HELD, block_bytes, content, feed, rows, used
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferos import errors
from inferos.kv import Arena, KVCache, LayerSpec

SPEC = LayerSpec(2, 64)
SINKS, WINDOW, GROUP = 4, 64, 2
KIB = 1 << 10


def step(cache: KVCache, tokens: int, heavy: int | None = None, *, attend: bool = True) -> None:
    """One step of random tokens; `heavy`: nearly all attention goes to that position."""
    start = cache.length
    cache.begin(tokens)
    for layer, spec in enumerate(cache.layers):
        k, v = rows(start * 100 + layer, tokens, spec)
        if heavy is not None and start <= heavy < start + tokens:
            k[heavy - start] = 2.0
        cache.append(layer, k, v)
        if attend:
            q, _ = rows(start * 100 + layer + 50, tokens, LayerSpec(spec.kv_heads * GROUP, spec.head_dim))
            cache.attend(layer, q * 0.1 + 1.0 if heavy is not None else q)
    cache.commit()


def fill(cache: KVCache, tokens: int, chunk: int = 64, heavy: int | None = None, decoded: int = 100) -> None:
    """Chunks, then decoding. Raises what the cache raises."""
    while cache.length < tokens:
        step(cache, min(chunk, tokens - decoded - cache.length) if cache.length < tokens - decoded else 1, heavy)


def heads(cache: KVCache) -> list[tuple[int, int]]:
    return [(layer, head) for layer, spec in enumerate(cache.layers) for head in range(spec.kv_heads)]


def assert_window_and_sinks(cache: KVCache) -> None:
    for at in heads(cache):
        held = cache.formats(*at)
        assert (held[max(0, len(held) - WINDOW) :] == 0).all()
        assert (held[: 0 if cache.layers[at[0]].local_window >= 0 else SINKS] == 0).all()


def uniform(kv: str, layers: int, spec: LayerSpec, tokens: int, chunk: int = 64) -> int:
    """Bytes of a uniform format with FP16 sinks, window, a chunk on its way in, and scores."""
    one = block_bytes(kv, spec.head_dim) * math.ceil((tokens - WINDOW) / 64)
    wide = block_bytes("f16", spec.head_dim) * (2 + (WINDOW + chunk) // 64) + block_bytes("f16", spec.head_dim, 16)
    return layers * spec.kv_heads * (one + wide + 256 * math.ceil(tokens / 64))


@pytest.mark.parametrize(
    ("layers", "spec", "tokens", "slack"),
    [
        (2, LayerSpec(4, 64), 4096, 1.05),
        (4, LayerSpec(2, 128), 4096, 1.05),
        (2, LayerSpec(2, 128), 8192, 1.05),
        (3, LayerSpec(2, 80), 3000, 1.1),
        (1, LayerSpec(2, 32), 3000, 1.15),
    ],
)
def test_a_budget_for_int4_evicts_nothing(layers, spec, tokens, slack):
    budget = int(uniform("int4", layers, spec, tokens) * slack)
    arena = Arena(budget)
    with KVCache([spec] * layers, kv="auto", l2_format="int4", arena=arena) as cache:
        fill(cache, tokens)
        stats = cache.stats()
        assert stats.evicted_token_heads == 0
        assert stats.evicted_mass == 0.0
        assert stats.token_heads["int4"] > 0.6 * tokens * layers * spec.kv_heads
        assert arena.stats().reserved_high_water_bytes <= budget
        for at in heads(cache):
            assert NOT_HELD not in cache.formats(*at)
        assert_window_and_sinks(cache)


def test_the_least_important_blocks_go_first_and_only_as_many_as_needed():
    arena = Arena(900 * KIB)
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.0, 0.0), l2_format="int4", arena=arena) as cache:
        scores: list[np.ndarray] = []
        for _ in range(2400):
            scores = [cache.scores(0, head) for head in range(2)]
            before = [cache.formats(0, head) for head in range(2)]
            step(cache, 1 if cache.length > 400 else 100)
            if any((cache.formats(0, head) == FORMATS["int4"]).any() for head in range(2)):
                break
        else:
            pytest.fail("the budget was never reached")
        packed = 0
        for head in range(2):
            held, score = cache.formats(0, head)[SINKS::64], scores[head]
            due = (len(before[head]) - WINDOW - SINKS) // 64
            low = held[:due] == FORMATS["int4"]
            packed += int(low.sum())
            assert low.any()
            assert low.sum() < due / 2
            assert score[:due][low].max() < score[:due][~low].min()
        assert packed < 30


def test_blocks_without_a_score_go_oldest_first():
    with KVCache([SPEC], kv="auto", l2_format="int4", arena=Arena(900 * KIB)) as cache:
        while cache.length < 3000 and not (cache.formats(0, 0) == FORMATS["int4"]).any():
            step(cache, 50, attend=False)
        for head in range(2):
            low = cache.formats(0, head)[SINKS::64] == FORMATS["int4"]
            assert low.any()
            assert low[: low.sum()].all()


def test_prefill_goes_below_int8_only_over_budget():
    for budget, expected in ((0, False), (400 * KIB, True)):
        arena = Arena(budget)
        with KVCache([SPEC], kv="auto", thresholds=(0.5, 0.3, 0.0), l2_format="int4", arena=arena) as cache:
            for _ in range(15):
                step(cache, 64)
            assert (FORMATS["int4"] in cache.formats(0, 0)) is expected
            assert_window_and_sinks(cache)


@pytest.mark.parametrize("overflow", ["error", "stop"])
@pytest.mark.parametrize("decoded", [0, 900])
def test_a_fifth_of_fp16_ends_with_the_budget_error_and_loses_nothing(overflow, decoded):
    tokens, layers = 4000, 2
    budget = int(0.2 * tokens * layers * SPEC.kv_heads * SPEC.head_dim * 4)
    arena = Arena(budget)
    with KVCache([SPEC] * layers, kv="auto", l2_format="int4", arena=arena, overflow=overflow) as cache:
        with pytest.raises(errors.BudgetError, match=f"do not fit: demoted .* guard .* overflow: {overflow}; arena: "):
            fill(cache, tokens, decoded=decoded)
        assert cache.length > 0.4 * tokens
        assert cache.pending == 0
        assert cache.stats().evicted_token_heads == 0  # no block of random text is below the guard
        for layer, head in heads(cache):
            assert np.isfinite(content(cache, layer, head, 0, cache.length)).all()
        for layer in range(layers):
            out = cache.attend(layer, np.ones((1, 4, 64), np.float32))
            assert np.isfinite(out).all()
        assert arena.stats().reserved_high_water_bytes <= budget
        length = cache.length
        cache.rewind(length - 100)  # room again
        step(cache, 50)
        assert cache.length == length - 50


def heavy_cache(arena: Arena, **options: object) -> tuple[KVCache, int]:
    """A cache whose attention goes to one old token, so that the other blocks weigh next to nothing."""
    return KVCache([SPEC] * 2, kv="auto", l2_format="int4", arena=arena, **options), 40


def test_eviction_stops_at_one_percent_of_a_heads_attention():
    arena = Arena(300 * KIB)
    cache, heavy = heavy_cache(arena, thresholds=(1.0, 1.0, 1.0))
    with cache:
        evicted = 0
        with pytest.raises(errors.BudgetError, match="the guard of 1 % of a head's attention forbids"):
            while cache.length < 100_000:
                # Attention spreads out in time: what is evicted later costs more.
                step(cache, 32, heavy if cache.length < 2000 else None)
                stats = cache.stats()
                assert stats.evicted_mass <= 0.01
                assert stats.evicted_token_heads >= evicted
                evicted = stats.evicted_token_heads
                assert_window_and_sinks(cache)
        assert evicted > 1000
        assert cache.stats().evicted_token_heads == evicted
        assert cache.formats(0, 0)[heavy] != NOT_HELD
        assert arena.stats().reserved_high_water_bytes <= 300 * KIB
        out = cache.attend(0, np.ones((1, 4, 64), np.float32))
        assert np.isfinite(out).all()


@pytest.mark.parametrize(("budget", "chunk"), [(411, 100), (434, 200), (480, 100)])
def test_evictions_that_do_not_make_room_are_taken_back(budget, chunk):
    cache, heavy = heavy_cache(Arena(budget * KIB), thresholds=(1.0, 1.0, 1.0))
    with cache:
        before: list[np.ndarray] = []
        held: list[np.ndarray] = []
        with pytest.raises(errors.BudgetError):
            while True:
                before = [cache.formats(*at) for at in heads(cache)]
                held = [everything(cache, *at) for at in heads(cache)]
                step(cache, chunk, heavy)
        for at, formats, data in zip(heads(cache), before, held, strict=True):
            now = cache.formats(*at)
            assert ((now == NOT_HELD) == (formats == NOT_HELD)).all()
            np.testing.assert_array_equal(everything(cache, *at)[now == formats], data[now == formats])


def everything(cache: KVCache, layer: int, head: int) -> np.ndarray:
    """K and V (tokens, 2, head_dim); zeros where a token was evicted."""
    data = np.zeros((cache.length, 2, cache.layers[layer].head_dim), np.float32)
    for p in np.flatnonzero(cache.formats(layer, head) != NOT_HELD):
        data[p] = np.stack(cache.read(layer, head, p)[:2])
    return data


def test_at_most_the_share_l3_is_evicted_under_the_guard():
    cache, heavy = heavy_cache(Arena(300 * KIB), thresholds=(1.0, 1.0, 0.3))
    with cache:
        with pytest.raises(errors.BudgetError):
            while cache.length < 100_000:
                step(cache, 32, heavy)
        unpinned = (cache.length - WINDOW - SINKS) // 64
        evicted = [int((cache.formats(*at)[SINKS::64] == NOT_HELD).sum()) for at in heads(cache)]
        assert max(evicted) > 0
        assert max(evicted) <= math.floor(0.3 * unpinned)


@pytest.mark.parametrize(
    "options", [{"eviction": "never"}, {"max_levels": ["L2", "L2"]}, {"thresholds": (1.0, 1.0, 0.0)}], ids=str
)
def test_eviction_happens_only_where_it_is_allowed(options):
    cache, heavy = heavy_cache(Arena(300 * KIB), **{"thresholds": (1.0, 1.0, 1.0), **options})
    with cache:
        with pytest.raises(errors.BudgetError):
            while cache.length < 100_000:
                step(cache, 32, heavy)
        assert cache.stats().evicted_token_heads == 0


def test_overflow_evict_goes_on_and_reports_what_it_cost():
    arena = Arena(500 * KIB)
    options = {"overflow": "evict", "max_levels": ["L3", "L3", "L2"]}
    with KVCache([SPEC] * 2 + [LayerSpec(1, 16)], kv="auto", l2_format="int4", arena=arena, **options) as cache:
        mass = 0.0
        while cache.length < 3000:
            step(cache, 32)
            stats = cache.stats()
            assert stats.evicted_mass >= mass
            mass = stats.evicted_mass
            assert_window_and_sinks(cache)
        assert mass > 0.01
        assert arena.stats().reserved_high_water_bytes <= 500 * KIB
        for layer, head in heads(cache):
            held = cache.formats(layer, head)
            assert (NOT_HELD in held) == (layer != 2)
        with pytest.raises(errors.RewindError):
            cache.rewind(100)


def test_overflow_evicts_the_least_important_blocks_first():
    with KVCache([SPEC], kv="auto", l2_format="int4", arena=Arena(300 * KIB), overflow="evict") as cache:
        for _ in range(100):
            scores = [cache.scores(0, head) for head in range(2)]
            due = (cache.length - WINDOW - SINKS) // 64
            step(cache, 32)
            gone = [cache.formats(0, head)[SINKS::64][: max(due, 0)] == NOT_HELD for head in range(2)]
            if any(head.any() for head in gone):
                break
        for head, (score, lost) in enumerate(zip(scores, gone, strict=True)):
            rest = cache.formats(0, head)[SINKS::64][:due] == FORMATS["int4"]  # a wider one has to become narrow first
            if lost.any():
                assert score[:due][lost].max() <= score[:due][rest].min()


@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_a_fixed_format_is_refused_at_once(kv):
    with KVCache([SPEC], kv=kv, arena=Arena(300 * KIB)) as cache:
        with pytest.raises(errors.BudgetError, match="^arena: "):
            for _ in range(1000):
                feed(cache, 32, seed=cache.length)
        assert set(cache.formats(0, 0)) <= {FORMATS["f16"], FORMATS[kv]}
        assert cache.stats().evicted_token_heads == 0


@pytest.mark.parametrize("thresholds", [(1.0, 0.6, 0.2), (0.7, 0.5, 0.3)])
def test_max_levels_say_how_far_a_layer_goes(thresholds):
    levels = ["L0", "L1", "L2", "L3"]
    narrowest = [FORMATS[name] for name in ("f16", "int8", "int4", "int4")]
    for budget in (0, 1400 * KIB):
        with KVCache(
            [SPEC] * 4, kv="auto", thresholds=thresholds, l2_format="int4", max_levels=levels, arena=Arena(budget)
        ) as cache:
            step(cache, 300)
            for _ in range(400):
                step(cache, 1)
            for at in heads(cache):
                assert cache.formats(*at).max() == narrowest[at[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eviction": "always"}, "eviction: 'always' is not one of never, pressure"),
        ({"overflow": "ignore"}, "overflow: 'ignore' is not one of error, stop, evict"),
        ({"max_levels": ["L4"]}, "max_levels: 'L4' is not one of L0, L1, L2, L3"),
        ({"thresholds": (1.0, 0.7)}, r"thresholds: \(1.0, 0.7\) is not L1, L2 and L3"),
        ({"thresholds": (1.0, 0.3, 0.7)}, "0 <= l3 <= l2"),
    ],
)
def test_a_policy_that_is_none_is_refused(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        KVCache([SPEC], kv="auto", **options)


def test_max_levels_are_one_per_layer():
    with pytest.raises(errors.ShapeError, match="1 max_levels for 2 layers"):
        KVCache([SPEC] * 2, kv="auto", max_levels=["L1"])


def test_what_forks_share_is_not_given_up_by_one_of_them():
    arena = Arena(700 * KIB)
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.0, 0.0), l2_format="int4", arena=arena) as first:
        for _ in range(12):
            step(first, 64)
        with first.fork() as second:
            shared = first.stats().shared_bytes
            packed = first.formats(0, 0) == FORMATS["int8"]
            with pytest.raises(errors.BudgetError):
                while True:
                    step(second, 1)
            assert (second.formats(0, 0)[: len(packed)][packed] == FORMATS["int8"]).all()
            assert FORMATS["int4"] in second.formats(0, 0)
            assert first.stats().shared_bytes == shared
        step(first, 64)  # room again
        assert used(arena) == first.stats().total_bytes


def trace(budget: int, options: dict[str, object]) -> list[object]:
    cache, heavy = heavy_cache(Arena(budget), **options)
    seen: list[object] = []
    with cache:
        while cache.length < 2500:
            try:
                step(cache, 64 if cache.length < 1500 else 1, heavy if cache.length % 3 else None)
            except errors.BudgetError as error:
                seen.append(str(error))
                break
        seen.append([cache.formats(*at).tobytes() for at in heads(cache)])
        seen.append([cache.scores(*at).tobytes() for at in heads(cache)])
    return seen


@pytest.mark.parametrize("overflow", ["error", "evict"])
def test_the_same_steps_give_the_same_blocks(overflow):
    options = {"overflow": overflow}
    assert trace(400 * KIB, options) == trace(400 * KIB, options)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, object]:
    levels = sorted(draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), min_size=3, max_size=3)), reverse=True)
    return {
        "thresholds": tuple(levels),
        "l2_format": draw(st.sampled_from(["k8v4", "int4"])),
        "eviction": draw(st.sampled_from(["never", "pressure"])),
        "overflow": draw(st.sampled_from(["error", "stop", "evict"])),
        "max_levels": draw(st.lists(st.sampled_from(["L0", "L1", "L2", "L3"]), min_size=2, max_size=2)),
    }


@given(
    policy=policies(),
    budget=st.integers(64 * KIB, 700 * KIB),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    local=st.sampled_from([-1, 200]),
    steps=st.lists(st.sampled_from([1, 1, 1, 1, 7, 64, 130]), min_size=20, max_size=80),
    heavy=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_budget_holds_at_every_step_and_a_refused_step_loses_no_token(
    policy, budget, head_dim, local, steps, heavy
):
    arena = Arena(budget)
    with KVCache([LayerSpec(2, head_dim), LayerSpec(1, 32, local)], kv="auto", arena=arena, **policy) as cache:
        before = [cache.formats(*at) for at in heads(cache)]
        for tokens in steps:
            try:
                step(cache, tokens, 40 if heavy else None)
            except errors.BudgetError:
                for at, held in zip(heads(cache), before, strict=True):
                    now = cache.formats(*at)
                    assert ((now == NOT_HELD) == (held == NOT_HELD)).all()
                    assert (now >= held).all()
            else:
                for at, held in zip(heads(cache), before, strict=True):
                    assert (cache.formats(*at)[: len(held)] >= held).all()
            assert arena.stats().reserved_high_water_bytes <= budget
            assert used(arena) == cache.stats().total_bytes
            before = [cache.formats(*at) for at in heads(cache)]
            assert_window_and_sinks(cache)
            if policy["overflow"] != "evict":
                assert cache.stats().evicted_mass <= 0.01
            if policy["eviction"] == "never":
                assert cache.stats().evicted_token_heads == 0


def test_what_reviews_demote_gives_its_memory_back() -> None:
    arena = Arena()
    cache = KVCache([LayerSpec(4, 64)] * 2, kv="auto", l2_format="int4", arena=arena)
    while cache.length < 6144:
        step(cache, 512)
    wide = arena.stats().reserved_bytes
    for _ in range(4 * 64):
        step(cache, 1)
        held = arena.stats()
        assert held.reserved_bytes <= 1.25 * held.used_bytes + (2 << 20)
    assert cache.stats().blocks["int4"] > cache.stats().blocks["int8"]
    assert held.reserved_bytes < 0.95 * wide
