"""`auto` under changed rules: set_policy, scores from outside, keys that do not bear INT4, demotion errors."""

from __future__ import annotations

import numpy as np
import pytest
from caches import FORMATS, rows

from inferos import errors
from inferos.kv import KVCache, LayerSpec

SPEC = LayerSpec(2, 32)
HEADS = 4
PROMPT = 4 + 64 * 12


def step(cache: KVCache, tokens: int, *, key_scale: float = 1.0, query_scale: float = 0.2) -> None:
    """One step of every layer, attention included. `key_scale`: of four channels, as outliers have it."""
    random = np.random.default_rng([cache.length, tokens])
    cache.begin(tokens)
    for layer, spec in enumerate(cache.layers):
        k, v = rows(1000 * cache.length + layer, tokens, spec)
        k[..., [3, 7, 19, 23]] *= key_scale
        cache.append(layer, k, v)
        q = random.standard_normal((tokens, HEADS, spec.head_dim), dtype=np.float32) * np.float32(query_scale)
        cache.attend(layer, q)
    cache.commit()


def decode(cache: KVCache, tokens: int, **scales: float) -> None:
    for _ in range(tokens):
        step(cache, 1, **scales)


def count(cache: KVCache, kv: str, layer: int = 0, head: int = 0) -> int:
    """Whole blocks behind the sinks that are held in a format."""
    return int((cache.formats(layer, head)[4::64] == FORMATS[kv]).sum())


def test_thresholds_are_in_force_from_the_next_review():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.0, 0.0)) as cache:
        step(cache, PROMPT)
        decode(cache, 70)
        assert count(cache, "k8v4") == 0
        cache.set_policy(thresholds=(1.0, 0.9, 0.0))
        decode(cache, 100)  # one review has agreed
        assert count(cache, "k8v4") == 0
        decode(cache, 64)
        assert count(cache, "k8v4") >= 10
        cache.set_policy(thresholds=(1.0, 1.0, 0.0))  # leaves no choice: one is enough
        decode(cache, 65)
        assert count(cache, "k8v4") >= 14


def test_lowered_thresholds_stop_what_waits_and_bring_nothing_back():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 1.0, 0.0)) as cache:
        step(cache, PROMPT)
        decode(cache, 130)
        packed = count(cache, "k8v4")
        assert packed >= 10
        cache.set_policy(thresholds=(1.0, 0.0, 0.0))
        decode(cache, 192)
        assert count(cache, "k8v4") - packed <= 2  # the verdicts of the last review before it
        held = count(cache, "k8v4")
        decode(cache, 128)
        assert count(cache, "k8v4") == held


def test_a_layer_is_limited_and_set_free_at_run_time():
    with KVCache([SPEC] * 2, kv="auto", thresholds=(1.0, 1.0, 0.0), max_levels=["L1", "L3"]) as cache:
        step(cache, PROMPT)
        decode(cache, 130)
        assert (count(cache, "k8v4", 0), count(cache, "k8v4", 1) >= 10) == (0, True)
        cache.set_policy(max_levels=["L3", "L1"])
        before = count(cache, "k8v4", 1)
        decode(cache, 192)
        assert count(cache, "k8v4", 0) >= 10
        assert count(cache, "k8v4", 1) == before


def test_the_window_changes_with_the_next_step():
    with KVCache([SPEC], kv="auto", recent_window=256) as cache:
        step(cache, PROMPT)
        decode(cache, 1)
        wide = count(cache, "f16")
        cache.set_policy(recent_window=64)
        decode(cache, 1)
        assert count(cache, "f16") == wide - 3


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"thresholds": (0.5, 0.7, 0.1)}, errors.ConfigError),
        ({"thresholds": (1.0, 0.7)}, errors.ConfigError),
        ({"thresholds": (1.0, float("nan"), 0.0)}, errors.ConfigError),
        ({"l2_format": "int3"}, errors.ConfigError),
        ({"gamma": 1.0}, errors.ConfigError),
        ({"recent_window": 8}, errors.ConfigError),
        ({"recent_window": -8}, errors.ConfigError),
        ({"eviction": "always"}, errors.ConfigError),
        ({"overflow": "panic"}, errors.ConfigError),
        ({"max_levels": ["L4", "L3"]}, errors.ConfigError),
        ({"max_levels": ["L3"]}, errors.ShapeError),
    ],
    ids=str,
)
def test_a_refused_change_changes_nothing(change, error):
    def run(*, refused: bool) -> tuple:
        with KVCache([SPEC] * 2, kv="auto", thresholds=(0.8, 0.6, 0.0)) as cache:
            step(cache, PROMPT)
            decode(cache, 70)
            if refused:
                with pytest.raises(error):
                    cache.set_policy(**{"l2_format": "int4", "gamma": 0.5, **change})
            decode(cache, 130)
            return (
                cache.formats(0, 0).tolist(),
                cache.formats(1, 1).tolist(),
                cache.stats(),
                cache.scores(0, 0).tolist(),
            )

    assert str(run(refused=True)) == str(run(refused=False))


def test_only_an_auto_cache_between_two_steps_takes_a_policy():
    with KVCache([SPEC], kv="int8") as cache, pytest.raises(errors.ConfigError, match="auto"):
        cache.set_policy(gamma=0.9)
    with KVCache([SPEC], kv="auto") as cache:
        cache.begin(1)
        with pytest.raises(errors.SequenceError):
            cache.set_policy(gamma=0.9)


def test_a_fork_has_its_own_policy():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.0, 0.0)) as first:
        step(first, PROMPT)
        first.set_policy(l2_format="int4")
        with first.fork() as second:
            second.set_policy(thresholds=(1.0, 1.0, 0.0))
            decode(first, 140)
            decode(second, 140)
            assert count(first, "int4") == 0
            assert count(second, "int4") >= 10


def test_external_scores_rank_the_blocks():
    worth = np.arange(13, dtype=np.float64) - 6  # negative ones are scores like others
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.5, 0.0), scorer="external") as cache:
        step(cache, PROMPT)
        for _ in range(200):
            if cache.review_due(0):
                scores = np.full((2, cache.grid_blocks(0)), np.nan)
                scores[0, :12], scores[1, :12] = worth[:12], -worth[:12]
                cache.set_scores(0, scores)
            step(cache, 1)
        ascending, descending = (cache.formats(0, head)[4::64][:12] == FORMATS["k8v4"] for head in range(2))
        assert ascending.tolist() == [True] * 6 + [False] * 6
        assert descending.tolist() == [False] * 6 + [True] * 6


def test_without_external_scores_nothing_is_demoted():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 0.9, 0.0), scorer="external") as cache:
        step(cache, PROMPT)
        decode(cache, 200)
        assert count(cache, "k8v4") == 0
        with pytest.raises(errors.ShapeError):
            cache.set_scores(0, np.zeros((2, 3)))
    with KVCache([SPEC], kv="auto") as cache, pytest.raises(errors.ConfigError):
        cache.set_scores(0, np.zeros((2, 0)))


def test_a_review_is_due_once_in_64_tokens_of_each_layer():
    with KVCache([SPEC] * 2, kv="auto") as cache:
        step(cache, 100)
        due = []
        for _ in range(128):
            due.append([cache.review_due(layer) for layer in range(2)])
            step(cache, 1)
        assert np.sum(due[1:], axis=0).tolist() == [2, 2]
        assert not np.all(due[1:], axis=1).any()  # not in the same step


def test_token_statistics_describe_the_tokens_that_are_held():
    with KVCache([SPEC], kv="auto") as cache:
        k, v = rows(0, PROMPT, SPEC)
        cache.begin(PROMPT)
        cache.append(0, k, v)
        mass = cache.attend(0, np.random.default_rng(0).standard_normal((PROMPT, HEADS, 32), np.float32), mass=True)[1]
        cache.commit()
        cache.evict(0, 1, 3)
        for head in range(2):
            found = cache.token_statistics(0, head)
            here = found.position
            assert here.tolist() == [p for p in range(PROMPT) if head == 0 or not 4 + 192 <= p < 4 + 256]
            measured = here[here >= 4]
            assert np.isnan(found.mass[:4]).all()
            np.testing.assert_allclose(found.mass[4:], mass[head, measured], rtol=2e-3, atol=1e-6)
            np.testing.assert_allclose(found.value_norm, np.linalg.norm(v[here, head], axis=1), rtol=1e-3)
            np.testing.assert_allclose(found.key_norm, np.linalg.norm(k[here, head], axis=1), rtol=1e-2)
            mean = k[here, head].mean(axis=0)
            cosine = k[here, head] @ mean / np.linalg.norm(mean) / np.linalg.norm(k[here, head], axis=1)
            np.testing.assert_allclose(found.key_similarity, cosine, atol=2e-2)
        starts, stops = cache.block_spans(0)
        assert (starts == 4 + 64 * np.arange(12)).all()
        assert (stops == starts + 64).all()


def test_token_statistics_of_a_block_at_l2_are_those_of_the_block():
    with KVCache([SPEC], kv="auto") as cache:
        step(cache, PROMPT)
        before = cache.token_statistics(0, 0)
        cache.demote(0, 0, 3, "int4")
        after = cache.token_statistics(0, 0)
        block = slice(4 + 64 * 3, 4 + 64 * 4)
        np.testing.assert_allclose(after.mass[block], before.mass[block].mean(), rtol=1e-4)
        held = np.array([cache.read(0, 0, position)[1] for position in range(block.start, block.stop)])
        np.testing.assert_allclose(after.value_norm[block], np.linalg.norm(held, axis=1), rtol=1e-6)
        others = np.r_[: block.start, block.stop : PROMPT]
        np.testing.assert_array_equal(after.mass[others], before.mass[others])
        np.testing.assert_array_equal(after.value_norm[others], before.value_norm[others])


@pytest.mark.parametrize(
    ("key_scale", "query_scale", "wanted"), [(1.0, 0.2, "int4"), (1.0, 1.0, "int4"), (60.0, 1.0, "k8v4")]
)
def test_auto_keeps_keys_in_int8_where_real_queries_say_so(key_scale, query_scale, wanted):
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 1.0, 0.0), l2_format="auto") as cache:
        assert cache.l2_formats == ("k8v4",)  # until measured
        step(cache, PROMPT, key_scale=key_scale, query_scale=query_scale)
        assert cache.l2_formats == (wanted,)
        decode(cache, 140, key_scale=key_scale, query_scale=query_scale)
        assert count(cache, wanted) >= 10


@pytest.mark.parametrize(("pull", "wanted"), [(0.0, "k8v4"), (40.0, "int4")])
def test_keys_that_get_no_attention_may_be_moved(pull, wanted):
    random = np.random.default_rng(0)
    with KVCache([SPEC], kv="auto", l2_format="auto") as cache:
        k, v = rows(0, PROMPT, SPEC)
        k[:-64, :, [3, 7, 19, 23]] *= 20.0
        k[..., 0] = 0.0
        k[-64:, :, 0] = pull
        q = random.standard_normal((PROMPT, HEADS, SPEC.head_dim), dtype=np.float32)
        q[..., 0] = 12.0  # pulled, they look at the window alone
        cache.begin(PROMPT)
        cache.append(0, k, v)
        cache.attend(0, q)
        cache.commit()
        assert cache.l2_formats == (wanted,)


def test_a_layer_found_unsafe_stays_so():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 1.0, 0.0), l2_format="auto") as cache:
        step(cache, PROMPT)
        decode(cache, 140)
        narrow = count(cache, "int4")
        assert narrow >= 10
        step(cache, 640, key_scale=60.0, query_scale=1.0)  # the text changes
        assert cache.l2_formats == ("k8v4",)
        decode(cache, 140)
        assert count(cache, "int4") == narrow
        assert count(cache, "k8v4") >= 5
        step(cache, 640)
        assert cache.l2_formats == ("k8v4",)


def test_demotion_error_is_that_of_the_blocks_demoted():
    with KVCache([SPEC], kv="auto", thresholds=(1.0, 1.0, 0.0)) as cache:
        step(cache, PROMPT)
        decode(cache, 1)
        assert not cache.stats().demotion_error

        def values(block: int) -> np.ndarray:
            return np.array([cache.read(0, 0, 4 + 64 * block + i)[:2] for i in range(64)])

        before = values(4)
        assert cache.demote(0, 0, 4, "int4")
        error = cache.stats().demotion_error["int4"]
        wanted = ((values(4) - before) ** 2).sum((0, 2)) / (before**2).sum((0, 2))
        assert (error.blocks, error.k_nmse, error.v_nmse) == (1, pytest.approx(wanted[0]), pytest.approx(wanted[1]))
        assert cache.demote(0, 0, 5, "int4")  # not of the sample
        assert cache.stats().demotion_error == {"int4": error}
