"""A threshold is a target for a share: raising one never costs bytes, lowering one never costs accuracy.

Keys take two values that every format holds exactly, and queries one magnitude, so that the scores of all thresholds follow one
trajectory.
"""

from __future__ import annotations

import numpy as np
from caches import FORMATS, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from inferos.kv import KVCache, LayerSpec

SPEC = LayerSpec(4, 128)  # many values: a few would differ by more than NOISE from one rounding to another
HEADS = 8
STEP = 255 / 512  # 255 and 15 steps of it are exact in FP16
NOISE = 0.05  # of the error: rounding errors of one block do not add up in one direction
LEVELS = [0.0, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0]


def run(seed: int, thresholds: tuple[float, float, float], l2_format: str) -> tuple[list[int], float, np.ndarray]:
    """Bytes after each decoded token, the error of attention at the end, and what the blocks that may still fall were worth.

    A block at L2 falls no further and orders nothing; its score is one for all its tokens, which goes a way of its own. NaN there.
    """
    random = np.random.default_rng(seed)
    shape = (64 * 12, SPEC.kv_heads, SPEC.head_dim)
    key_rows = np.where(random.random(shape) < random.random(shape[:1])[:, None, None], np.float32(STEP), np.float32(0))
    value_rows = rows(seed, shape[0], SPEC)[1]
    signs = random.choice([-1.0, 1.0], (1, HEADS, SPEC.head_dim)).astype(np.float32)
    sizes = []
    with KVCache([SPEC], kv="auto", thresholds=thresholds, l2_format=l2_format, recent_window=16) as cache:
        at = 0
        for tokens in [64 * 7 + 20] + [1] * 64 * 4:
            cache.begin(tokens)
            cache.append(0, key_rows[at : at + tokens], value_rows[at : at + tokens])
            at += tokens
            cache.attend(0, np.repeat(signs, tokens, axis=0))
            cache.commit()
            sizes.append(cache.stats().total_bytes)
        q = random.standard_normal((16, HEADS, SPEC.head_dim), dtype=np.float32)
        out = np.concatenate([cache.attend(0, one[None]) for one in q])
        k, v = key_rows[:at].astype(np.float64), value_rows[:at].astype(np.float64)
        wanted = np.zeros(out.shape)
        for head in range(HEADS):
            weights = np.exp(q[:, head].astype(np.float64) @ k[:, head // 2].T / np.sqrt(SPEC.head_dim))
            wanted[:, head] = weights @ v[:, head // 2] / weights.sum(1, keepdims=True)
        scores = np.stack([cache.scores(0, head) for head in range(SPEC.kv_heads)])
        starts, _ = cache.block_spans(0)
        held = np.stack([cache.formats(0, head)[starts] for head in range(SPEC.kv_heads)])
        assert held.max() <= FORMATS[l2_format]
        scores[held == FORMATS[l2_format]] = np.nan
    return sizes, float(np.sqrt(((out - wanted) ** 2).mean())), scores


@given(
    seed=st.integers(0, 1000),
    given_levels=st.lists(st.sampled_from(LEVELS), min_size=3, max_size=3),
    which=st.integers(0, 1),
    raised=st.sampled_from(LEVELS),
    l2_format=st.sampled_from(["k8v4", "int4"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_raising_a_threshold_saves_bytes_and_lowering_one_saves_accuracy(seed, given_levels, which, raised, l2_format):
    low = sorted(given_levels, reverse=True)
    high = list(low)
    high[which] = max(low[which], raised)
    high[0] = max(high[0], high[1])
    low_sizes, low_error, low_scores = run(seed, (low[0], low[1], low[2]), l2_format)
    high_sizes, high_error, high_scores = run(seed, (high[0], high[1], high[2]), l2_format)
    compared = ~(np.isnan(low_scores) | np.isnan(high_scores))
    np.testing.assert_allclose(low_scores[compared], high_scores[compared], rtol=5e-3)
    assert all(more >= less for more, less in zip(low_sizes, high_sizes, strict=True))
    assert low_error <= high_error * (1 + NOISE)
