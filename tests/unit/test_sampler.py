"""The sampler against a plain numpy oracle, and its promises one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferos.errors import ConfigError, ModelError, ShapeError
from inferos.runtime import _sampler
from inferos.runtime.protocols import Float32
from inferos.runtime.sampler import Sampler, SamplingOptions

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def uniform(seed: int, draw: int) -> float:
    return (mix((mix(seed) + (draw + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2.0**53


def oracle(logits: Float32, options: SamplingOptions, draw: int, seen: set[int]) -> int:
    """The documented algorithm with full sorts and no cleverness."""
    z = logits.astype(np.float64)
    z[~np.isfinite(z)] = -np.inf
    for i in seen:
        z[i] = z[i] / options.repetition_penalty if z[i] > 0 else z[i] * options.repetition_penalty
    if options.temperature == 0:
        return int(np.argmax(z))
    weight = np.exp((z - z.max()) / options.temperature)
    order = np.lexsort((np.arange(z.size), -weight))
    if options.top_k:
        order = order[: options.top_k]
    running = np.cumsum(weight[order])
    # One tiny tolerance: the oracle adds the same weights in another order.
    order = order[: 1 + int(np.sum(running[:-1] < options.top_p * running[-1] * (1 - 1e-12)))]
    kept = np.sort(order[(weight[order] >= options.min_p) & (weight[order] > 0)])
    walk = np.cumsum(weight[kept])
    return int(kept[np.searchsorted(walk, uniform(int(options.seed or 0), draw) * walk[-1], side="right")])


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, MASK),
)


@settings(max_examples=400, deadline=None)
@given(
    options=OPTIONS, size=st.integers(1, 3000), scale=st.sampled_from([0.01, 1.0, 8.0]), data=st.integers(0, 1 << 30)
)
def test_equals_the_numpy_oracle(options: SamplingOptions, size: int, scale: float, data: int) -> None:
    rng = np.random.default_rng(data)
    logits = (rng.standard_normal(size) * scale).astype(np.float32)
    logits[rng.random(size) < 0.05] = -np.inf
    logits[rng.integers(size)] = 0.5
    sampler = Sampler(options)
    seen = {int(i) for i in rng.integers(0, size, 5)}
    sampler.observe(np.array(sorted(seen)))
    for draw in range(4):
        found = sampler.next(logits).id
        assert found == oracle(logits, options, draw, seen), f"draw {draw}"
        sampler.accept(found)
        seen.add(found)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_large_vocabulary_equals_the_numpy_oracle(sort: bool, flat: bool) -> None:
    """Where few chunks hold all that counts, and where all of them do."""
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(40_000) * (0.001 if flat else 3)).astype(np.float32)
    logits[rng.random(logits.size) < 0.3] = np.nan
    logits[rng.integers(0, logits.size, 5000)] = 4.25  # ties across the edge
    if sort:
        logits.sort()
    for top_k, top_p, min_p, penalty in itertools.product(
        [0, 1, 50, 30_000], [0.4, 0.95, 1.0], [0, 0.1], [1, 1.2, 0.9]
    ):
        options = SamplingOptions(1.1, top_k, top_p, min_p, penalty, seed=7)
        sampler = Sampler(options)
        seen = {int(i) for i in rng.integers(0, logits.size, 200)}
        sampler.observe(np.array(sorted(seen)))
        assert sampler.next(logits).id == oracle(logits, options, 0, seen), options


def test_ties_go_to_the_lower_id() -> None:
    logits = np.array([1, 3, 3, 3, 0], np.float32)
    assert Sampler(SamplingOptions()).next(logits).id == 1
    drawn = Sampler(SamplingOptions(temperature=1.0, top_k=2, seed=5))
    assert {accept_next(drawn, logits) for _ in range(64)} == {1, 2}


def accept_next(sampler: Sampler, logits: Float32) -> int:
    token = sampler.next(logits).id
    sampler.accept(token)
    return token


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=11))
    n = 40_000
    counts = np.bincount([accept_next(sampler, logits) for _ in range(n)], minlength=4)
    p = np.exp(logits) / np.exp(logits).sum()
    # Four standard deviations of a binomial.
    assert np.all(np.abs(counts - n * p) < 4 * np.sqrt(n * p * (1 - p)))


def test_a_seed_gives_the_same_tokens_on_every_machine() -> None:
    logits = (np.arange(50) % 7).astype(np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.5, seed=42))
    # From `oracle` above, with Python's integers.
    assert [accept_next(sampler, logits) for _ in range(12)] == [32, 10, 11, 5, 48, 13, 13, 10, 40, 13, 40, 46]


def test_without_a_seed_two_samplers_differ() -> None:
    assert Sampler(SamplingOptions(temperature=1.0)).seed != Sampler(SamplingOptions(temperature=1.0)).seed


def test_nothing_advances_until_a_token_is_accepted() -> None:
    logits = np.zeros(1000, np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, repetition_penalty=2.0, seed=3))
    first = [sampler.next(logits) for _ in range(5)]
    assert len(set(first)) == 1
    sampler.accept(first[0].id)
    assert sampler.next(logits) != first[0]
    assert sampler.accepted == 1


def test_the_logits_are_left_as_they_were() -> None:
    logits = np.arange(20, dtype=np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingOptions(temperature=0.5, top_k=5, top_p=0.5, repetition_penalty=1.5))
    sampler.observe(np.arange(20))
    sampler.next(logits)
    np.testing.assert_array_equal(logits, before)


def test_read_only_and_strided_logits_are_fine() -> None:
    logits = np.arange(20, dtype=np.float32)[::-2]
    logits.setflags(write=False)
    assert Sampler(SamplingOptions()).next(logits).id == 0


def test_logprob_is_the_log_softmax_of_the_unmodified_logits() -> None:
    logits = (np.random.default_rng(1).standard_normal(500) * 6).astype(np.float32)
    sampler = Sampler(SamplingOptions(temperature=0.3, top_k=7, repetition_penalty=1.7, seed=1))
    choice = sampler.next(logits)
    z = logits.astype(np.float64)
    wanted = z[choice.id] - z.max() - math.log(np.exp(z - z.max()).sum())
    assert choice.logprob == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_never_chosen(bad: float) -> None:
    logits = np.array([bad, 1.0, bad, 2.0, bad], np.float32)
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingOptions(temperature=temperature, seed=9))
        assert {accept_next(sampler, logits) for _ in range(32)} <= {1, 3}
    assert math.isfinite(Sampler(SamplingOptions()).next(logits).logprob)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_finite_logit_is_a_typed_error(bad: float) -> None:
    with pytest.raises(ModelError, match="none of 8 logits is finite"):
        Sampler(SamplingOptions()).next(np.full(8, bad, np.float32))


@pytest.mark.parametrize(
    "logits",
    [np.zeros(4, np.float64), np.zeros((1, 4), np.float32), np.zeros(0, np.float32), np.zeros(4, np.float16)],
    ids=["float64", "two rows", "empty", "float16"],
)
def test_logits_of_another_form_are_a_shape_error(logits: Any) -> None:
    with pytest.raises(ShapeError, match=r"wanted float32 \(vocab_size,\)"):
        Sampler(SamplingOptions()).next(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", "7"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_name_and_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: .* is not an? (number|integer) within .*\.\."):
        SamplingOptions(**{name: value})


def test_the_generator_is_the_documented_one() -> None:
    for seed, draw in [(0, 0), (1, 0), (42, 7), (MASK, 1 << 40)]:
        assert _sampler.uniform(seed, draw) == uniform(seed, draw)


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = -np.concatenate([np.linspace(0, 1, 20_001), np.geomspace(1e-12, 700, 20_000)])
    found = np.array([_sampler.exp_nonpositive(float(v)) for v in x])
    wanted = np.array([math.exp(v) for v in x])
    assert np.all(np.abs(found - wanted) <= 2 * np.spacing(wanted))


def test_a_penalty_for_an_id_beyond_the_vocabulary_is_ignored() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    sampler.observe(np.array([-5, 3, 1 << 40]))
    assert sampler.next(np.array([1, 2], np.float32)).id == 1
