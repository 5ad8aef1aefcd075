"""Speculation: the tokens are those of plain decoding, in fewer steps; where it does not pay it rests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import END, FakeSequence, FakeSession, byte_folder, ids_of, reciting
from hypothesis import given
from hypothesis import strategies as st

from inferos.errors import BudgetError, ConfigError
from inferos.runtime.model import Model, load
from inferos.runtime.speculation import LONGEST_PAUSE, MOST, TRIAL, PromptLookup, SpeculationGate

CYCLE = [5, 9, 7, 3, 8]


def looping(ids: list[int]) -> int:
    """A text that goes round in circles."""
    return CYCLE[len(ids) % len(CYCLE)]


def runs(session: FakeSession) -> list[int]:
    """Tokens of every run, of all sequences."""
    return [run for sequence in session.sequences for run in sequence.runs]


def tokens_of(script: Any, prompt: list[int], speculate: bool, **options: Any) -> tuple[list[Any], FakeSession]:
    session = FakeSession(script, vocab_size=16, margin=options.pop("margin", 20.0))
    session.others = np.random.default_rng(3).standard_normal(16).astype(np.float32)
    generation = Model(session).generate(prompt, speculate=speculate, **options)
    return [*generation, generation.finish_reason], session


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    plain, slow = tokens_of(looping, CYCLE * 2, False, max_tokens=100)
    fast_tokens, fast = tokens_of(looping, CYCLE * 2, True, max_tokens=100)
    assert fast_tokens == plain
    assert len(runs(slow)) == 100
    assert len(runs(fast)) < 25


@given(
    st.integers(2, 5),
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1.0, 1.3]),
    st.lists(st.integers(0, 4), min_size=4, max_size=30),
)
def test_tokens_are_those_of_plain_decoding(
    order: int, seed: int, count: int, temperature: float, penalty: float, prompt: list[int]
) -> None:
    """Greedy and sampled: the draws of a seed are the same ones, whatever was guessed."""

    def script(ids: list[int]) -> int:
        return sum(ids[-order:]) % 5

    sampling = {"temperature": temperature, "seed": seed, "repetition_penalty": penalty, "margin": 3.0}
    plain, _ = tokens_of(script, prompt, False, max_tokens=count, **sampling)
    guessed, session = tokens_of(script, prompt, True, max_tokens=count, **sampling)
    assert guessed == plain
    assert max(runs(session)[1:], default=0) <= MOST + 1


@pytest.mark.parametrize("stop_after", range(1, 30))
def test_stopping_anywhere_leaves_all_tokens_but_the_newest_in_the_cache(stop_after: int) -> None:
    session = FakeSession(looping, vocab_size=16)
    model = Model(session)
    conversation: list[FakeSequence] = session.sequences
    generation = model.generate(CYCLE * 2, speculate=True)
    given_out = [next(generation).id for _ in range(stop_after)]
    held: list[int] = []
    model.observer = _Observer(held)
    generation.close()
    assert CYCLE * 2 + held == [*CYCLE * 2, *given_out][:-1]
    assert conversation[0].ids == [*CYCLE * 2, *given_out][:-1]


class _Observer:
    def __init__(self, held: list[int]) -> None:
        self.held = held

    def finished(self, prompt: Any, tokens: Any) -> None:
        self.held.extend(tokens)


def test_an_end_inside_a_draft_ends_the_text(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    answer = "abcabcabcabc"
    session = FakeSession(reciting(ids_of(folder, answer + END), len(ids_of(folder, "go"))))
    model = Model(session, folder=folder, eos_ids=ids_of(folder, END))
    generation = model.generate("go", speculate=True)
    assert "".join(token.text for token in generation) == answer
    assert generation.finish_reason == "eos"
    assert session.sequences[0].ids == ids_of(folder, "go" + answer)


def test_a_stop_text_inside_a_draft_cuts_the_text(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    answer = "one two one two one two one two!"
    session = FakeSession(reciting(ids_of(folder, answer + END), len(ids_of(folder, "go"))))
    model = Model(session, folder=folder, eos_ids=ids_of(folder, END))
    plain = model.generate("go", stop="two!")
    wanted = "".join(token.text for token in plain), plain.finish_reason
    guessed = model.generate("go", stop="two!", speculate=True)
    assert ("".join(token.text for token in guessed), guessed.finish_reason) == wanted
    assert session.sequences[1].ids == session.sequences[0].ids


def test_a_draft_never_reaches_beyond_the_context() -> None:
    session = FakeSession(looping, vocab_size=16, context_length=40)
    generation = Model(session).generate(CYCLE * 2, max_tokens=100, speculate=True)
    count = len(list(generation))
    assert (generation.finish_reason, count, session.sequences[0].length) == ("context", 31, 40)


class Tight(FakeSession):
    """Has room for one token at a time behind the prompt."""

    def before_feed(self, ids: Any) -> None:
        if len(ids) > 1 and self.sequences[0].ids:
            raise BudgetError("no room for so many")


def test_where_the_budget_has_no_room_for_a_draft_decoding_goes_on_without() -> None:
    session = Tight(looping, vocab_size=16)
    plain, _ = tokens_of(looping, CYCLE * 2, False, max_tokens=50)
    assert [token.id for token in Model(session).generate(CYCLE * 2, max_tokens=50, speculate=True)] == [
        token.id for token in plain[:-1]
    ]
    assert set(session.sequences[0].runs[1:]) == {1}


def test_accept_rate_is_that_of_the_last_fifty_drafts() -> None:
    gate = SpeculationGate(0.0, PromptLookup())
    assert gate.accept_rate is None
    for _ in range(30):
        gate.checked(4, 0)
    assert gate.accept_rate == 0.0
    for _ in range(49):
        gate.checked(8, 8)
    assert gate.accept_rate == pytest.approx(8 * 49 / (8 * 49 + 4))
    gate.checked(8, 8)
    assert gate.accept_rate == 1.0


def test_a_generation_reports_its_accept_rate() -> None:
    session = FakeSession(looping, vocab_size=16)
    generation = Model(session).generate(CYCLE * 2, max_tokens=60, speculate=True)
    assert generation.accept_rate is None
    assert len(list(generation)) == 60
    assert generation.accept_rate == 1.0
    assert Model(session).generate(CYCLE).accept_rate is None


class Always:
    """Has a guess whatever comes."""

    def push(self, ids: Any) -> None: ...

    def draft(self, most: int) -> list[int]:
        return [0] * most


def pauses(gate: SpeculationGate, accepted: int) -> Iterator[int]:
    """Tokens without a draft between the trials that it takes in vain."""
    while True:
        quiet = 0
        while not (draft := gate.draft(8)):
            quiet += 1
        yield quiet
        for _ in range(TRIAL):
            gate.checked(len(draft), accepted)


def test_below_the_wanted_rate_it_rests_and_tries_again_ever_later() -> None:
    quiet = pauses(SpeculationGate(0.5, Always()), accepted=1)
    found = [next(quiet) for _ in range(10)]
    assert found == [0, 64, 128, 256, 512, 1024, 2048, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_trial_that_succeeds_sets_the_pause_back() -> None:
    gate = SpeculationGate(0.5, Always())
    quiet = pauses(gate, accepted=0)
    assert [next(quiet) for _ in range(3)] == [0, 64, 128]
    for _ in range(TRIAL):
        gate.checked(4, 4)
    assert gate.active
    for _ in range(2 * TRIAL):
        gate.checked(4, 0)
    assert not gate.active
    assert sum(1 for _ in iter(lambda: gate.draft(8), [0] * 4)) == 64


def test_a_step_of_one_token_comes_at_least_every_64_tokens() -> None:
    """Reviews of the cache follow such steps."""
    _, session = tokens_of(looping, CYCLE * 2, True, max_tokens=900)
    since = 0
    for run in runs(session)[1:]:
        since = 0 if run == 1 else since + run
        assert since <= 64 + MOST


def test_lookup_finds_what_followed_last_time_and_goes_on_in_circles() -> None:
    lookup = PromptLookup()
    assert lookup.draft(4) == []
    lookup.push([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.draft(2) == [4, 5]
    assert lookup.draft(8) == [4, 5, 6, 1, 2, 3, 4, 5]
    lookup.push([9, 1, 2, 3])
    assert lookup.draft(3) == [9, 1, 2]
    lookup.push([7])
    assert lookup.draft(3) == []


@pytest.mark.parametrize("kv", ["f16", "int8", "k8v4", "int4", "auto", "off"])
def test_the_reference_model_writes_the_same_text_in_fewer_steps(kv: str) -> None:
    with load("reference", kv=kv, threads=1) as model:
        prompt = np.tile(np.arange(20, 50), 6)
        plain = [token.id for token in model.generate(prompt, 200, ignore_eos=True)]
        generation = model.generate(prompt, 200, ignore_eos=True, speculate=True)
        assert [token.id for token in generation] == plain
        assert generation.accept_rate is not None


def test_a_model_without_logits_of_every_token_refuses() -> None:
    class Layout:
        last_logits_only = True

    session: Any = FakeSession()
    session.layout = Layout()
    with pytest.raises(ConfigError, match="speculate"):
        Model(session).generate([1, 2, 3], speculate=True)
