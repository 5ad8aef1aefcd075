"""Rows decoded together, over scripted sessions: who is fed when, who leaves, and what an error ends."""

from __future__ import annotations

import gc
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FailingSession, FakeSession, byte_folder, ids_of
from hypothesis import given
from hypothesis import strategies as st

from inferos.config import Policy
from inferos.errors import BudgetError, ClosedError, ConfigError, ContextError, ModelError, ProviderLost, ShapeError
from inferos.runtime.batch import Batch
from inferos.runtime.model import Model
from inferos.runtime.prompts import Prompt


def counter(**options: Any) -> tuple[Model, FakeSession]:
    session = FakeSession(**options)
    return Model(session), session


def by_row(batch: Batch) -> list[list[int]]:
    """The ids of each row, iterated together."""
    rows: list[list[int]] = [[] for _ in batch.rows]
    for number, token in batch:
        rows[number].append(token.id)
    return rows


# ---- what a list of prompts is ----


@pytest.mark.parametrize(
    "prompts", [[[1], [50, 51]], ([1], [50, 51]), [(1,), (50, 51)], [np.array([1]), np.array([50, 51])]]
)
def test_a_list_of_prompts_is_a_batch(prompts: Any) -> None:
    assert by_row(counter()[0].generate(prompts, 3)) == [[2, 3, 4], [52, 53, 54]]


def test_texts_and_messages_may_stand_in_one_list(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    prompts: list[Prompt] = ["ab", [{"role": "user", "content": "hi"}], [7]]
    batch = Model(FakeSession(), folder=folder).generate(prompts, 1)
    list(batch)
    assert [row.prompt_tokens for row in batch.rows] == [2, len("u:hi;a:"), 1]


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ([[1], [300]], ShapeError),
        ([[1], 5], ShapeError),
        ([[1], []], ConfigError),
        ([[1], list(range(300)) * 4], ContextError),
    ],
)
def test_one_wrong_prompt_refuses_the_list_and_frees_the_others(prompts: Any, error: type[Exception]) -> None:
    model, session = counter()
    with pytest.raises(error):
        model.generate(prompts)
    assert [sequence.closed for sequence in session.sequences] == [True]
    assert session.sequences[0].runs == []


# ---- decoding together ----


def test_prompts_are_fed_row_by_row_and_then_tokens_together() -> None:
    model, session = counter()
    batch = model.generate([[1, 2, 3], [10, 11], [20, 21, 22, 23]], 4)
    assert by_row(batch) == [[4, 5, 6, 7], [12, 13, 14, 15], [24, 25, 26, 27]]
    assert [sequence.runs for sequence in session.sequences] == [[3, 1, 1, 1], [2, 1, 1, 1], [4, 1, 1, 1]]
    assert session.steps == [3, 3, 3]


def test_tokens_come_in_the_order_of_the_steps() -> None:
    batch = counter()[0].generate([[1, 2], [10, 11]], 3)
    assert [(number, token.id) for number, token in batch] == [(0, 3), (1, 12), (0, 4), (1, 13), (0, 5), (1, 14)]


def test_a_row_iterated_singly_takes_the_others_along() -> None:
    model, session = counter()
    one, two = model.generate([[1, 2], [10, 11]], 3).rows
    assert [token.id for token in two] == [12, 13, 14]
    assert session.steps == [2, 2]
    assert [token.id for token in one] == [3, 4, 5]
    assert session.steps == [2, 2]


def test_a_row_that_ends_leaves_and_frees_its_cache() -> None:
    model, session = counter()
    batch = model.batch()
    short, long = batch.add([1, 2], 2), batch.add([10, 11], 5)
    rows = iter(batch)
    for _ in range(4):
        next(rows)
    next(rows)
    assert (short.finish_reason, short.done, session.sequences[0].closed) == ("length", True, True)
    assert not session.sequences[1].closed
    list(rows)
    assert session.steps == [2]
    assert (long.tokens, session.sequences[1].closed) == (5, True)


def test_a_row_may_join_while_others_decode() -> None:
    model, session = counter()
    batch = model.batch()
    first = batch.add([1, 2], 6)
    assert [next(first).id, next(first).id] == [3, 4]
    second = batch.add([10, 11], 3)
    assert [token.id for token in second] == [12, 13, 14]
    assert [token.id for token in first] == [5, 6, 7, 8]
    assert session.steps == [2, 2]


def test_rows_beyond_the_room_wait_till_one_leaves() -> None:
    model, session = counter()
    batch = model.batch(max_rows=2)
    for start in (1, 50, 100):
        batch.add([start, start + 1], 3)
    assert by_row(batch) == [[3, 4, 5], [52, 53, 54], [102, 103, 104]]
    assert session.steps == [2, 2]


def test_a_long_prompt_holds_the_others_up_for_one_chunk_a_step() -> None:
    session = FakeSession()
    batch = Model(session, prefill_chunk=10).batch()
    first = batch.add([1, 2], 8)
    next(first)
    batch.add(np.arange(35), 2)
    order = [(number, token.id) for number, token in batch]
    assert session.sequences[1].runs == [10, 10, 10, 5, 1]
    assert [number for number, _ in order] == [0, 0, 0, 0, 1, 0, 1, 0, 0]


def test_short_prompts_share_the_chunk_of_a_step() -> None:
    session = FakeSession()
    batch = Model(session, prefill_chunk=10).generate([[1] * 5, [2] * 5, [3] * 5], 1)
    assert next(iter(batch))[0] == 0
    assert [len(sequence.runs) for sequence in session.sequences] == [1, 1, 0]


@pytest.mark.parametrize("max_rows", [0, -1, True, 1.5])
def test_a_batch_needs_room(max_rows: Any) -> None:
    with pytest.raises(ConfigError, match="max_rows"):
        counter()[0].batch(max_rows)


# ---- each row its own ----


def test_each_row_has_its_own_seed_and_is_as_it_would_be_alone() -> None:
    model, _ = counter(margin=0.0)
    batch = model.generate([[1], [1], [1]], 12, temperature=1.0, seed=7)
    rows = by_row(batch)
    assert [row.seed for row in batch.rows] == [7, 8, 9]
    assert rows[0] != rows[1] != rows[2]
    for row, ids in zip(batch.rows, rows, strict=True):
        assert ids == [t.id for t in model.generate([1], 12, temperature=1.0, seed=row.seed)]


def test_rows_end_by_their_own_stops_and_limits(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    model = Model(FakeSession(), folder=folder, eos_ids=ids_of(folder, "z"))
    batch = model.batch()
    batch.add("a", 100, stop="d")
    batch.add("a", 2)
    batch.add("a", 100, stop="xyz")
    list(batch)
    assert [(row.text, row.finish_reason) for row in batch.rows] == [
        ("bc", "stop"),
        ("bc", "length"),
        ("bcdefghijklmnopqrstuvwxy", "eos"),
    ]


@given(
    prompts=st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=30), min_size=1, max_size=12),
    lengths=st.lists(st.integers(1, 20), min_size=12, max_size=12),
    max_rows=st.integers(1, 8),
    chunk=st.integers(1, 16),
    joins=st.lists(st.integers(0, 10), min_size=12, max_size=12),
)
def test_a_batch_equals_its_rows_alone(
    prompts: list[list[int]], lengths: list[int], max_rows: int, chunk: int, joins: list[int]
) -> None:
    model = Model(FakeSession(lambda ids: (7 * ids[-1] + 3 * len(ids)) % 251), prefill_chunk=chunk)
    batch = model.batch(max_rows)
    found: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        batch.add(prompt, lengths[number])
        for row, token in itertools.islice(batch, joins[number]):
            found[row].append(token.id)
    for row, token in batch:
        found[row].append(token.id)
    for number, prompt in enumerate(prompts):
        assert found[number] == [t.id for t in model.generate(prompt, lengths[number])]


def test_a_row_that_speculates_gives_the_same_in_a_batch() -> None:
    model = Model(FakeSession(lambda ids: (ids[-1] + 1) % 7))
    batch = model.batch()
    prompt = [0, 1, 2, 3, 4, 5, 6] * 4
    batch.add(prompt, 40, speculate=True)
    batch.add([50, 1, 2], 40)
    rows = by_row(batch)
    assert rows[0] == [t.id for t in model.generate(prompt, 40)]
    assert rows[1] == [t.id for t in model.generate([50, 1, 2], 40)]
    assert batch._together.decoder.decode_tokens == 2 * 39


# ---- errors ----


class Picky(FakeSession):
    """Refuses to feed one id."""

    def __init__(self, refused: int, error: Exception, **options: Any) -> None:
        super().__init__(**options)
        self.refused = refused
        self.error = error

    def before_feed(self, ids: Any) -> None:
        if self.refused in ids.tolist():
            raise self.error


def test_a_row_that_fails_ends_alone_and_the_others_go_on() -> None:
    session = Picky(13, BudgetError("the fake is full"))
    batch = Model(session).generate([[1, 2], [10, 11], [20, 21]], 5)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    with pytest.raises(BudgetError, match="the fake is full"):
        for number, token in batch:
            found[number].append(token.id)
    assert found == {0: [3, 4, 5, 6, 7], 1: [12, 13], 2: [22, 23, 24, 25, 26]}
    assert isinstance(batch.rows[1].error, BudgetError)
    assert [row.error for row in (batch.rows[0], batch.rows[2])] == [None, None]
    assert session.steps == [3, 3, 2, 2]
    assert all(sequence.closed for sequence in session.sequences)


def test_a_rows_error_comes_after_its_tokens_and_once() -> None:
    one, two = Model(Picky(13, ClosedError("gone"))).generate([[1, 2], [10, 11]], 4).rows
    assert [token.id for token in one] == [3, 4, 5, 6]
    assert [next(two).id, next(two).id] == [12, 13]
    with pytest.raises(ClosedError):
        next(two)
    assert list(two) == []


def test_a_used_up_budget_ends_only_its_row_where_the_policy_says_stop() -> None:
    policy = Policy.from_mapping({"kv": {"overflow": "stop"}})
    batch = Model(Picky(13, BudgetError("full")), policy=policy).generate([[1, 2], [10, 11]], 4)
    assert by_row(batch) == [[3, 4, 5, 6], [12, 13]]
    assert [row.finish_reason for row in batch.rows] == ["length", "budget"]


def test_a_prompt_that_fails_ends_only_its_row() -> None:
    batch = Model(Picky(11, BudgetError("full"))).generate([[1, 2], [10, 11]], 2)
    with pytest.raises(BudgetError):
        list(batch)
    assert [row.tokens for row in batch.rows] == [2, 0]


def test_a_lost_provider_ends_every_row_of_the_step_after_one_try() -> None:
    session = FailingSession(after=2)
    batch = Model(session).generate([[1, 2], [10, 11]], 4)
    with pytest.raises(ProviderLost):
        list(batch)
    assert [type(row.error) for row in batch.rows] == [ProviderLost, ProviderLost]
    assert [row.tokens for row in batch.rows] == [1, 1]
    assert session.steps == [2]


def test_a_row_whose_logits_are_broken_ends_alone() -> None:
    class Broken(FakeSession):
        def step(self, sequences: Any, ids: Any) -> Any:
            logits = super().step(sequences, ids)
            logits[ids == 12] = np.nan
            return logits

    batch = Model(Broken()).generate([[1, 2], [10, 11]], 3)
    with pytest.raises(ModelError, match="finite"):
        list(batch)
    assert [row.tokens for row in batch.rows] == [3, 1]


def test_an_interrupt_ends_every_row() -> None:
    class Interrupted(FakeSession):
        def step(self, sequences: Any, ids: Any) -> Any:
            raise KeyboardInterrupt

    session = Interrupted()
    batch = Model(session).generate([[1, 2], [10, 11]], 3)
    with pytest.raises(KeyboardInterrupt):
        list(batch)
    assert [row.finish_reason for row in batch.rows] == ["cancelled", "cancelled"]
    assert all(sequence.closed for sequence in session.sequences)


# ---- ending early ----


def test_a_row_that_is_closed_leaves_and_the_others_go_on() -> None:
    model, session = counter()
    batch = model.generate([[1, 2], [10, 11], [20, 21]], 4)
    next(batch.rows[1])
    batch.rows[1].close()
    assert (session.sequences[1].closed, batch.rows[1].finish_reason) == (True, "cancelled")
    assert by_row(batch) == [[3, 4, 5, 6], [], [22, 23, 24, 25]]
    assert session.steps == [2, 2, 2]


def test_closing_a_batch_frees_every_cache() -> None:
    model, session = counter()
    with model.generate([[1, 2], [10, 11]]) as batch:
        next(batch.rows[0])
    assert all(sequence.closed for sequence in session.sequences)
    assert [row.finish_reason for row in batch.rows] == ["cancelled", "cancelled"]
    assert list(batch) == []


def test_a_batch_left_with_break_frees_its_caches_at_once() -> None:
    model, session = counter()
    gc.disable()
    try:
        for _ in model.generate([[1], [10, 11]]):
            break
        assert all(sequence.closed for sequence in session.sequences)
    finally:
        gc.enable()


def test_a_row_that_is_kept_goes_on_without_a_batch_that_was_dropped() -> None:
    model, session = counter()
    row = model.generate([[1, 2], [10, 11]], 3).rows[1]
    gc.collect()
    assert [token.id for token in row] == [12, 13, 14]
    assert session.sequences[0].closed


def test_closing_the_model_ends_its_batches() -> None:
    model, session = counter()
    batch = model.generate([[1, 2], [10, 11]])
    next(batch.rows[0])
    model.close()
    assert all(sequence.closed for sequence in session.sequences)
    with pytest.raises(ClosedError):
        batch.add([1])
    with pytest.raises(ClosedError):
        model.batch()


def test_a_cancel_event_ends_its_row() -> None:
    cancel = threading.Event()
    batch = counter()[0].batch()
    first, second = batch.add([1, 2], 4, cancel=cancel), batch.add([10, 11], 4)
    next(first)
    cancel.set()
    list(batch)
    assert [(row.tokens, row.finish_reason) for row in (first, second)] == [(2, "cancelled"), (4, "length")]


def test_threads_may_take_rows_of_one_batch() -> None:
    model, session = counter()
    batch = model.generate([[start, start + 1] for start in range(0, 80, 10)], 50)
    found: list[list[int]] = [[] for _ in batch.rows]

    def read(number: int) -> None:
        found[number] = [token.id for token in batch.rows[number]]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[start + 2 + i for i in range(50)] for start in range(0, 80, 10)]
    assert session.steps == [8] * 49


def test_a_row_closed_by_another_thread_leaves_after_the_running_step() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(FakeSession):
        def step(self, sequences: Any, ids: Any) -> Any:
            inside.set()
            leave.wait(10)
            return super().step(sequences, ids)

    session = Slow()
    batch = Model(session).generate([[1, 2], [10, 11]], 50)
    worker = threading.Thread(target=list, args=(batch.rows[0],))
    worker.start()
    inside.wait(10)
    batch.rows[1].close()
    assert not session.sequences[1].closed
    leave.set()
    worker.join(30)
    assert session.sequences[1].closed
    assert (batch.rows[0].tokens, batch.rows[1].finish_reason) == (50, "cancelled")


# ---- figures ----


def test_the_figures_of_a_batch_are_counted_not_guessed() -> None:
    times = iter(range(10_000))
    batch = Model(FakeSession(), clock=lambda: float(next(times))).generate([[1, 2], [10, 11]], 5)
    assert batch.tokens_per_second is None
    list(batch)
    decoder = batch._together.decoder
    assert decoder.decode_tokens == 8
    assert batch.tokens_per_second == decoder.decode_tokens / decoder.decode_seconds
    assert [(row.kv_bytes, row.kv_elements) for row in batch.rows] == [(600, 300), (600, 300)]
    first, second = (row.first_token_seconds for row in batch.rows)
    assert first is not None
    assert second is not None
    assert 0 < first < second  # its prompt was fed first


def test_an_observer_is_told_of_every_row_without_an_error() -> None:
    model = Model(Picky(13, BudgetError("full")))
    told: list[tuple[list[int], list[int]]] = []

    class Observer:
        def finished(self, prompt: Any, tokens: Any) -> None:
            told.append((prompt.tolist(), list(tokens)))

    model.observer = Observer()
    with pytest.raises(BudgetError):
        list(model.generate([[1, 2], [10, 11]], 3))
    assert told == [([1, 2], [3, 4])]
