"""`auto`: importance follows measured attention, and decides what is packed narrower."""

from __future__ import annotations

import math

import numpy as np
import pytest
from caches import FORMATS, rows, used

from inferos import errors
from inferos.kv import Arena, KVCache, LayerSpec

SPEC = LayerSpec(2, 32)
HEADS = 4
GAMMA = 0.9
PROMPT = 4 + 64 * 12


def step(cache: KVCache, tokens: int, seed: int, heavy: int | None = None, *, die: bool = False) -> list[np.ndarray]:
    """One step of every layer, attention included; every query looks for the key written at position `heavy`."""
    random = np.random.default_rng([seed, tokens])
    start = cache.length
    cache.begin(tokens)
    masses = []
    for layer, spec in enumerate(cache.layers):
        k, v = rows(seed * 1000 + layer, tokens, spec)
        if heavy is not None and start <= heavy < start + tokens:
            k[heavy - start] = 1.5
        cache.append(layer, k, v)
        q = random.standard_normal((tokens, HEADS, spec.head_dim), dtype=np.float32) * 0.2
        if heavy is not None:
            q += 0.5
        masses.append(cache.attend(layer, q, mass=True)[1])
        if die:
            cache.rollback()
            return masses
    cache.commit()
    return masses


def levels(cache: KVCache, layer: int = 0, head: int = 0) -> np.ndarray:
    """Format of each whole block behind the sinks."""
    return cache.formats(layer, head)[4::64]


def decode(cache: KVCache, tokens: int, heavy: int | None = None) -> None:
    for _ in range(tokens):
        step(cache, 1, cache.length, heavy)


def test_scores_are_the_decayed_mean_mass_of_the_heaviest_tokens_times_their_value_norm():
    with KVCache([SPEC], kv="auto", gamma=GAMMA) as cache:
        k, v = rows(0, 200, SPEC)
        cache.begin(200)
        cache.append(0, k, v)
        q = np.random.default_rng(1).standard_normal((200, HEADS, 32), dtype=np.float32)
        samples = [(200, cache.attend(0, q, mass=True)[1])]
        cache.commit()
        for _ in range(30):
            mass = step(cache, 1, cache.length)[0]
            if cache.length % 8 == 0:  # every 8th token is sampled
                samples.append((cache.length, mass))
        for head in range(2):
            measured = cache.scores(0, head)
            assert np.isnan(measured[3:]).all()  # not finished at any sample
            for block in range(3):
                average, weight, last = np.zeros(64), 0.0, 0
                for length, mass in samples:
                    keep, last = GAMMA ** (length - last), length
                    average = average * keep + mass[head, 4 + 64 * block :][:64] * (1 - keep)
                    weight = weight * keep + 1 - keep
                worth = average / weight * np.linalg.norm(v[4 + 64 * block :][:64, head], axis=1)
                assert measured[block] == pytest.approx(np.sort(worth)[-8:].mean(), rel=5e-3)


@pytest.mark.parametrize(
    ("l1", "l2"), [(1.0, 0.7), (1.0, 0.25), (0.6, 0.3), (1.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.0, 0.0)]
)
@pytest.mark.parametrize("l2_format", ["k8v4", "int4"])
def test_shares_hold_per_head(l1, l2, l2_format):
    with KVCache([SPEC] * 2, kv="auto", thresholds=(l1, l2, 0.0), l2_format=l2_format) as cache:
        step(cache, PROMPT, 0)
        decode(cache, 64 * 3 + 10)
        unpinned = (cache.length - 64 - 4) // 64
        # Two reviews make a verdict: the blocks that left the window since then are not part of it yet.
        settled = unpinned - 3
        for layer in range(2):
            for head in range(2):
                held = levels(cache, layer, head)[:settled]
                narrow = FORMATS[l2_format]
                above_l1 = int((held == FORMATS["f16"]).sum())
                above_l2 = int((held < narrow).sum())
                assert above_l1 <= math.ceil((1 - l1) * unpinned)
                assert above_l2 <= math.ceil((1 - l2) * unpinned)
                # Upper bounds for demotion too: nothing is packed further than they ask for.
                assert len(held) - above_l2 <= math.floor(l2 * unpinned + 1e-9)
                assert set(held) <= {0, 1, narrow}
                if l1 == 1.0:
                    assert above_l1 == 0
                if l2 == 0.0:
                    assert (held < narrow).all()


def test_a_heavy_hitter_keeps_its_level():
    heavy = 4 + 64 * 2 + 17
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.9, 0.0)) as cache:
        step(cache, PROMPT, 0, heavy)
        decode(cache, 64 * 5, heavy)
        for head in range(2):
            held = levels(cache, 0, head)
            assert held[2] == FORMATS["int8"]
            assert cache.scores(0, head)[2] == np.nanmax(cache.scores(0, head))
            assert (held[:12] == FORMATS["k8v4"]).sum() >= 10  # a tenth of the blocks may stay


def test_levels_never_go_back():
    with KVCache([SPEC], kv="auto", thresholds=(0.6, 0.3, 0.0), l2_format="int4") as cache:
        step(cache, PROMPT, 0)
        before = levels(cache)
        for count in range(64 * 6):
            step(cache, 1, count, 4 + 64 * (count // 64))  # what is heavy changes all the time
            after = levels(cache)
            assert (after[: len(before)] >= before).all()
            before = after


def test_prefill_packs_no_block_below_int8():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 1.0, 0.0)) as cache:
        for seed in range(8):
            step(cache, 200, seed)
        assert set(cache.formats(0, 0)) == {FORMATS["f16"], FORMATS["int8"]}
    with KVCache([SPEC], kv="auto", thresholds=(0.5, 0.5, 0.0)) as cache:
        for seed in range(8):
            step(cache, 200, seed)
        assert set(cache.formats(0, 0)) == {FORMATS["f16"]}


def test_one_review_is_no_verdict():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.9, 0.0)) as cache:
        step(cache, PROMPT, 0)
        decode(cache, 3)  # the first review is due after the first decoded token
        assert FORMATS["k8v4"] not in levels(cache)
        decode(cache, 64)
        assert FORMATS["k8v4"] in levels(cache)


@pytest.mark.parametrize("attention", [True, False])
def test_where_no_block_may_stay_above_l2_nothing_waits(attention):
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 1.0, 0.4), l2_format="int4") as cache:

        def feed(tokens: int) -> None:
            if attention:
                step(cache, tokens, cache.length)
                return
            cache.begin(tokens)
            cache.append(0, *rows(cache.length, tokens, SPEC))
            cache.commit()

        feed(300)  # 200 of them leave the window in the next piece of the prompt
        feed(PROMPT - 300)
        assert set(cache.formats(0, 0)) == {FORMATS["f16"], FORMATS["int8"]}
        for _ in range(150):
            feed(1)
            due = (cache.length - 1 - 64 - 4) // 64  # a step packs what had left the window before it
            if cache.length > PROMPT + 1:  # the first decoded token's review has spoken
                assert (levels(cache)[:due] == FORMATS["int4"]).all()


def test_a_block_at_l2_has_one_score_which_follows_its_mass():
    with KVCache([SPEC], kv="auto", gamma=GAMMA, thresholds=(1.0, 0.0, 0.0)) as cache:
        step(cache, PROMPT, 0)
        decode(cache, 9)
        scores, bytes_before = cache.scores(0, 1), cache.stats().score_bytes
        statistics = cache.token_statistics(0, 1)
        assert cache.demote(0, 1, 3, "k8v4")
        assert cache.stats().score_bytes == bytes_before - 256
        np.testing.assert_allclose(cache.scores(0, 1), scores, rtol=1e-6)
        block = slice(4 + 64 * 3, 4 + 64 * 4)
        mass = statistics.mass[block].sum()
        for _ in range(24):
            own = step(cache, 1, cache.length)[0][1, block].sum()
            if cache.length % 8 == 0:  # every 8th token is sampled
                mass = mass * GAMMA**8 + own * (1 - GAMMA**8)
        found = cache.token_statistics(0, 1)
        assert found.mass[block].sum() == pytest.approx(mass, rel=1e-3)
        assert cache.scores(0, 1)[3] == pytest.approx(scores[3] * mass / statistics.mass[block].sum(), rel=1e-3)


def test_without_measured_attention_nothing_is_demoted_further():
    with KVCache([SPEC], kv="auto") as cache:
        for tokens in [PROMPT] + [1] * 200:
            cache.begin(tokens)
            cache.append(0, *rows(cache.length, tokens, SPEC))
            cache.commit()
        assert set(cache.formats(0, 0)) == {FORMATS["f16"], FORMATS["int8"]}
        assert np.isnan(cache.scores(0, 0)).all()


def run(arena: Arena, deaths: frozenset[int]) -> tuple:
    """A conversation of three turns; steps that begin at a length in `deaths` die behind layer 0 the first time."""
    with KVCache([SPEC] * 2, kv="auto", thresholds=(0.8, 0.6, 0.0), arena=arena) as cache:
        for turn in range(3):
            for tokens in [300 + turn, *[1] * 150]:
                if cache.length in deaths:
                    step(cache, tokens, cache.length, die=True)
                step(cache, tokens, cache.length)
            cache.rewind(cache.length - 40)
        heads = [(layer, head) for layer in range(2) for head in range(2)]
        return (
            [cache.formats(*at).tolist() for at in heads],
            [cache.scores(*at).tolist() for at in heads],
            cache.stats(),
        )


def test_levels_depend_on_the_tokens_only():
    calm = run(Arena(), frozenset())
    assert str(run(Arena(), frozenset())) == str(calm)


def test_steps_that_die_half_way_change_nothing():
    calm = run(Arena(), frozenset())
    assert str(run(Arena(), frozenset(range(0, 2000, 3)))) == str(calm)


def test_a_fork_goes_on_with_the_same_scores_and_its_own_levels():
    with KVCache([SPEC], kv="auto") as first:
        step(first, PROMPT, 0)
        decode(first, 30)
        with first.fork() as second:
            assert (first.scores(0, 0)[:11] == second.scores(0, 0)[:11]).all()
            scores, held = first.scores(0, 0), first.formats(0, 0)
            decode(second, 150)
            assert FORMATS["k8v4"] in second.formats(0, 0)
            np.testing.assert_array_equal(first.scores(0, 0), scores)
            assert (first.formats(0, 0) == held).all()
            decode(first, 150)
            assert (first.formats(0, 0) == second.formats(0, 0)).all()


def test_scores_live_in_the_arena_and_are_counted():
    arena = Arena()
    with KVCache([SPEC, LayerSpec(2, 32, 100)], kv="auto", arena=arena) as cache:
        for _ in range(500):
            step(cache, 1, cache.length)
            stats = cache.stats()
            assert stats.score_bytes == arena.stats().used_by_purpose["scores"] > 0 or cache.length <= 4
            assert stats.total_bytes == used(arena)
        cache.rewind(0)
        assert used(arena) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_are_no_numbers_do_not_stop_the_reviews(bad):
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.5, 0.0)) as cache:
        k, v = rows(0, PROMPT, SPEC)
        k[200], v[300] = bad, bad
        cache.begin(PROMPT)
        cache.append(0, k, v)
        cache.attend(0, np.ones((PROMPT, HEADS, 32), np.float32))
        cache.commit()
        decode(cache, 64 * 3)
        assert (np.isfinite(cache.scores(0, 0)) | np.isnan(cache.scores(0, 0))).all()
        assert FORMATS["k8v4"] in levels(cache)


def test_a_refused_allocation_among_demotions_changes_nothing():
    arena = Arena()
    with KVCache([SPEC] * 2, kv="auto", thresholds=(0.5, 0.2, 0.0), arena=arena) as cache:
        step(cache, PROMPT, 0)
        refused = 0
        for _ in range(64 * 3):
            before = cache.stats(), used(arena), [cache.formats(layer, 0).tolist() for layer in range(2)]
            for k in range(1, 100):
                arena._native.fail_after(k)
                try:
                    cache.begin(1)
                except errors.BudgetError:
                    refused += 1
                    assert (
                        cache.stats(),
                        used(arena),
                        [cache.formats(layer, 0).tolist() for layer in range(2)],
                    ) == before
                else:
                    break
            arena._native.fail_after(0)
            step(cache, 1, cache.length)
        assert FORMATS["k8v4"] in levels(cache)
        assert refused > 30


def test_a_layer_without_query_mass_wants_none_between_samples():
    """The sample costs an extra pass: it is asked for at every 8th token only."""
    with KVCache([SPEC], kv="auto", gamma=GAMMA) as cache:
        step(cache, PROMPT, 0)
        before = cache.scores(0, 0)
        while cache.length % 8 != 7:
            step(cache, 1, cache.length)
            if cache.length % 8:
                np.testing.assert_array_equal(cache.scores(0, 0)[:12], before[:12])
            before = cache.scores(0, 0)
        step(cache, 1, cache.length)
        assert (cache.scores(0, 0)[:12] != before[:12]).all()
