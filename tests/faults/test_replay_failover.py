"""Where the provider owns the cache, a sequence moves on by feeding its tokens again; the stream stays the same."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Tiny, tiny_folder, token_ids

from inferos.errors import ClosedError, ConfigError, ContextError, ProviderError, RewindError, ShapeError
from inferos.runtime.failover import FallbackReason, RobustFallbackManager
from inferos.runtime.failover.replay import Place, ReplaySequence, ReplaySession
from inferos.runtime.failover.workers import Waitable
from inferos.runtime.model import Model
from inferos.runtime.protocols import Float32, Ids, TokenSequence
from inferos.runtime.session import open_session

TINY = Tiny(layers=2, context=256)
CHUNK, STEPS = 2, 64
PROMPT = token_ids(STEPS * CHUNK, TINY.vocab)


class Fault:
    """Feed number `at` of a session throws or hangs, before or after its work."""

    def __init__(self, at: int = 0, how: str = "throws", after_work: bool = False) -> None:
        self.left = at
        self.how = how
        self.after_work = after_work
        self.feeds: list[int] = []
        self.hangs = threading.Event()
        self.let_go = threading.Event()
        self.closed = 0

    def meet(self) -> None:
        if self.how == "throws":
            raise ProviderError("the fake failed")
        self.hangs.set()
        assert self.let_go.wait(60)


class FaultySequence:
    def __init__(self, real: Any, fault: Fault) -> None:
        self.real = real
        self.fault = fault

    length = property(lambda self: self.real.length)
    kv_bytes = property(lambda self: self.real.kv_bytes)
    kv_elements = property(lambda self: self.real.kv_elements)

    def feed(self, ids: Ids) -> Float32:
        return self._feed(ids, self.real.feed)

    def feed_all(self, ids: Ids) -> Float32:
        return self._feed(ids, self.real.feed_all)

    def _feed(self, ids: Ids, feed: Any) -> Float32:
        fault = self.fault
        fault.feeds.append(len(ids))
        fault.left -= 1
        fails = fault.left == 0
        if fails and not fault.after_work:
            fault.meet()
        logits: Float32 = feed(ids)
        if fails and fault.after_work:
            fault.meet()
        return logits

    def rewind(self, length: int) -> None:
        self.real.rewind(length)

    def fork(self) -> FaultySequence:
        return FaultySequence(self.real.fork(), self.fault)

    def close(self) -> None:
        self.fault.closed += 1
        self.real.close()


class FaultySession:
    kv = "off"

    def __init__(self, real: Any, fault: Fault) -> None:
        self.real = real
        self.fault = fault
        self.vocab_size: int = real.vocab_size
        self.context_length: int = real.context_length

    def sequence(self) -> FaultySequence:
        return FaultySequence(self.real.sequence(), self.fault)

    def step(self, sequences: Any, ids: Ids) -> Float32:
        raise NotImplementedError


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tiny_folder(tmp_path_factory.mktemp("replay"), TINY)
    return [open_session(folder, kv="off", threads=1) for _ in range(3)]


def opened(stock: list[Any], *faults: Fault, clock: Any = lambda: 0.0) -> ReplaySession:
    def wait(done: Waitable) -> bool:
        while not done.acquire(timeout=0.002):
            for fault in faults:
                if fault.hangs.is_set() and fault not in seen:
                    seen.append(fault)
                    return False
        return True

    seen: list[Fault] = []
    places = [
        Place(f"place {number}", ("npu", "dml", "cpu")[number], FaultySession(real, fault))
        for number, (real, fault) in enumerate(zip(stock, faults, strict=False))
    ]
    hangs = any(fault.how == "hangs" for fault in faults)
    return ReplaySession(places, RobustFallbackManager(clock=clock, notify=lambda _: None), wait if hangs else None)


def stream(session: Any) -> list[int]:
    model = Model(session, prefill_chunk=CHUNK)
    return [token.id for token in model.generate(PROMPT, STEPS + 1, ignore_eos=True)]


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("how", ["throws", "hangs"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_fault_in_any_step_leaves_the_stream_as_it_is(
    stock: list[Any], times: int, how: str, after_work: bool
) -> None:
    wanted = stream(stock[0])
    every = 1 if times == 1 and not after_work else 5
    for k in range(1, 2 * STEPS + 1, every):  # the prompt's chunks, then the tokens
        second = Fault(1, how, after_work) if times == 2 else Fault()
        faults = [Fault(k, how, after_work), second, Fault()]
        session = opened(stock, *faults)
        try:
            assert stream(session) == wanted, f"feed {k}"
        finally:
            for fault in faults:
                fault.let_go.set()
        held = CHUNK * min(k - 1, STEPS) + max(k - 1 - STEPS, 0)
        again = [held] if held else []  # what was held is fed once, in one piece, before the failed step
        rest = ([CHUNK] * STEPS + [1] * STEPS)[k - 1 :]
        if times == 1:
            assert faults[1].feeds == again + rest
        else:
            assert faults[1].feeds == (again or rest[:1])
            assert faults[2].feeds == again + rest
        reason = FallbackReason.DEVICE_ERROR if how == "throws" else FallbackReason.TIMEOUT
        assert [f.reason for f in session.manager.failovers] == [reason] * times
        # What a run that hangs still uses is not freed under it.
        assert [fault.closed for fault in faults[:times]] == [int(how == "throws")] * times


def test_a_sequence_stays_where_its_tokens_are_and_new_ones_go_to_what_is_preferred(stock: list[Any]) -> None:
    now = [0.0]
    session = opened(stock, Fault(1), Fault(), clock=lambda: now[0])
    moved = session.sequence()
    moved.feed(PROMPT[:3])
    now[0] = 299.0
    early = session.sequence()
    early.feed(PROMPT[:3])
    now[0] = 300.0
    moved.feed(PROMPT[:3])
    fresh = session.sequence()
    fresh.feed(PROMPT[:3])
    assert [row.place.name for row in (moved, early, fresh) if row.place] == ["place 1", "place 1", "place 0"]
    assert [moved.length, fresh.length] == [6, 3]


def test_a_step_that_no_place_does_keeps_the_tokens(stock: list[Any]) -> None:
    faults = [Fault(2), Fault(1), Fault(1)]
    session = opened(stock, *faults)
    plain, sequence = stock[0].sequence(), session.sequence()
    for each in (plain, sequence):
        each.feed(PROMPT[:9])
    with pytest.raises(ProviderError, match="the fake failed"):
        sequence.feed(PROMPT[:1])
    assert sequence.length == 9
    assert session.manager.failover_count == 0
    assert np.argmax(sequence.feed(PROMPT[:1])) == np.argmax(plain.feed(PROMPT[:1]))


def test_errors_of_the_caller_are_no_reason_to_move(stock: list[Any]) -> None:
    faults = [Fault(), Fault()]
    session = opened(stock, *faults)
    sequence = session.sequence()
    sequence.feed(PROMPT[:9])
    with pytest.raises(ContextError):
        sequence.feed(np.zeros(TINY.context, np.int64))
    with pytest.raises(ShapeError):
        sequence.feed(np.array([-1]))
    with pytest.raises(RewindError):
        sequence.rewind(10)
    assert sequence.length == 9
    assert faults[1].feeds == []
    sequence.close()
    sequence.close()
    with pytest.raises(ClosedError):
        sequence.feed(PROMPT[:1])


def test_rewinding_forking_and_rows_go_on_after_a_move(stock: list[Any]) -> None:
    session = opened(stock, Fault(4), Fault())
    plain = [stock[0].sequence() for _ in range(2)]
    rows: list[TokenSequence] = [session.sequence() for _ in range(2)]
    for row, single in zip(rows, plain, strict=True):
        row.feed(PROMPT[:20])
        single.feed(PROMPT[:20])
    for token in PROMPT[:5]:
        ids = np.array([token, token + 1])
        wanted = stock[0].step(plain, ids)
        np.testing.assert_allclose(session.step(rows, ids), wanted, atol=1e-5)
    copy = rows[1].fork()
    for each in (copy, plain[1]):
        each.rewind(22)
    np.testing.assert_allclose(copy.feed_all(PROMPT[30:33]), plain[1].feed_all(PROMPT[30:33]), atol=1e-5)
    assert (copy.length, rows[1].length) == (25, 25)
    assert isinstance(copy, ReplaySequence)
    assert copy.kv_bytes > 0
    assert copy.kv_elements == 25 * 2 * 2 * TINY.kv_heads * TINY.head_dim


def test_a_row_that_fails_everywhere_commits_none(stock: list[Any]) -> None:
    session = opened(stock, Fault(4))
    rows: list[TokenSequence] = [session.sequence() for _ in range(2)]
    for row in rows:
        row.feed(PROMPT[:5])
    with pytest.raises(ProviderError):
        session.step(rows, PROMPT[:2])
    assert [row.length for row in rows] == [5, 5]


def test_no_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        ReplaySession([], RobustFallbackManager())


def test_figures_are_those_of_the_preferred_and_of_the_shortest(tmp_path: Path, stock: list[Any]) -> None:
    session = opened(stock, Fault(), Fault())
    assert (session.kv, session.vocab_size, session.context_length) == ("off", TINY.vocab, TINY.context)
    assert session.sequence().kv_bytes == session.sequence().kv_elements == 0


def test_runs_that_are_given_up_while_they_really_run_change_nothing(stock: list[Any]) -> None:
    patience, now = random.Random(3), itertools.count(0, 3600)
    places = [Place(f"place {number}", "cpu", real) for number, real in enumerate(stock)]
    manager = RobustFallbackManager(clock=lambda: float(next(now)), notify=lambda _: None)
    session = ReplaySession(places, manager, lambda done: done.acquire(timeout=patience.choice((0.0, 1e-3, 1.0, 1.0))))
    plain, sequence = stock[0].sequence(), session.sequence()
    for place in range(0, 200, 2):
        ids = token_ids(200, TINY.vocab)[place : place + 2]
        np.testing.assert_allclose(sequence.feed(ids), plain.feed(ids), atol=1e-5, err_msg=f"at token {place}")
    assert session.manager.failover_count > 10
