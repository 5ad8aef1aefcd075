"""Greedy divergence, against sessions that leave the uncompressed continuation at a known token."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeSession, counting

from inferos.errors import ConfigError, ContextError, ProviderError
from inferos.quality.greedy import greedy_divergence, greedy_prompts, record_greedy

PROMPTS = [np.arange(start, start + 10, dtype=np.int64) for start in (0, 50, 100, 150)]


def leaving(at: dict[int, int]) -> FakeSession:
    """Counts on, but after a prompt that begins with `first` writes another token at place `at[first]`."""

    def script(ids: list[int]) -> int:
        wrong = len(ids) - 10 == at.get(ids[0], -1)
        return (counting(ids) + wrong) % 256

    return FakeSession(script)


def test_the_position_is_the_first_differing_token_of_each_prompt() -> None:
    recorded = record_greedy(FakeSession(), PROMPTS, 20)
    result = greedy_divergence(recorded, leaving({0: 0, 50: 7, 100: 19}))
    assert result.positions == (0, 7, 19, None)
    assert result.tokens == 20
    assert result.mean == (0 + 7 + 19 + 20) / 4
    assert result.same == 0.25
    assert result.mean_interval.low <= result.mean <= result.mean_interval.high
    assert result.same_interval.low <= result.same <= result.same_interval.high


def test_the_uncompressed_session_does_not_diverge_from_itself() -> None:
    session = FakeSession()
    recorded = record_greedy(session, PROMPTS, 12)
    assert [greedy.continuation.tolist() for greedy in recorded[:1]] == [list(range(10, 22))]
    result = greedy_divergence(recorded, session)
    assert result.positions == (None,) * 4
    assert (result.mean, result.same) == (12.0, 1.0)
    assert all(sequence.closed for sequence in session.sequences)


def test_a_prompt_is_one_call_and_every_token_after_it_a_decode_step() -> None:
    session = FakeSession()
    recorded = record_greedy(FakeSession(), PROMPTS[:1], 5)
    greedy_divergence(recorded, session)
    assert session.sequences[0].runs == [10, 1, 1, 1, 1]


def test_prompts_are_spread_over_the_texts() -> None:
    texts = [np.arange(100), np.arange(1000, 1100)]
    prompts = greedy_prompts(texts, 40, count=4)
    assert [prompt[0] for prompt in prompts] == [0, 40, 1020, 1060]
    assert all(len(prompt) == 40 for prompt in prompts)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 prompts"):
        record_greedy(FakeSession(), [], 5)
    with pytest.raises(ConfigError, match="0 recorded"):
        greedy_divergence([], FakeSession())
    with pytest.raises(ConfigError, match="no text has the 101 tokens"):
        greedy_prompts([np.arange(100)], 101)
    with pytest.raises(ContextError, match="context is 14"):
        record_greedy(FakeSession(context_length=14), PROMPTS, 5)
    broken = FakeSession()
    broken.others[:] = np.nan
    with pytest.raises(ProviderError, match="not a number at token 10"):
        record_greedy(broken, PROMPTS, 5)
