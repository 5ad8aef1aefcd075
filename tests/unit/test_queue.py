"""The request queue: who joins when, on a clock of the test's own."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FailingSession, FakeSession
from hypothesis import given
from hypothesis import strategies as st

from inferos.errors import ClosedError, ConfigError, ContextError, ProviderLost, QueueFullError
from inferos.runtime.model import Model
from inferos.runtime.queue import Line, Priority, RequestQueue


class FakeClock:
    """Moves when it is told to. `parked` is set while somebody waits for it."""

    def __init__(self) -> None:
        self.time = 0.0
        self.parked = threading.Event()
        self._conditions: set[threading.Condition] = set()

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        self._conditions.add(condition)
        self.parked.set()
        condition.wait(30)
        self.parked.clear()

    def advance(self, seconds: float) -> None:
        for condition in self._conditions:
            with condition:
                self.time += seconds
                self.parked.clear()
                condition.notify_all()


class Gate(FakeSession):
    """Every step waits until `open`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.Event()
        self.open = threading.Event()

    def before_feed(self, ids: Any) -> None:
        self.inside.set()
        self.open.wait(30)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def queue(session: FakeSession, clock: FakeClock) -> Iterator[RequestQueue]:
    with RequestQueue(Model(session), max_rows=3, clock=clock) as opened:
        yield opened


def ids(generation: Any) -> list[int]:
    return [token.id for token in generation]


def begun(session: FakeSession) -> list[bool]:
    """Which sequences were fed."""
    return [bool(sequence.runs) for sequence in session.sequences]


# ---- when they join ----


def test_a_request_waits_for_company_and_joins_after_the_longest_wait(
    queue: RequestQueue, session: FakeSession, clock: FakeClock
) -> None:
    one = queue.submit([1, 2], 3)
    assert clock.parked.wait(30)
    clock.advance(0.06)
    two = queue.submit([10, 11], 3, priority="low")
    assert clock.parked.wait(30)
    assert (begun(session), queue.waiting, queue.rows) == ([False, False], 2, 0)
    clock.advance(0.04)
    assert (ids(one), ids(two)) == ([3, 4, 5], [12, 13, 14])
    assert session.steps == [2, 2]


def test_a_full_batch_joins_at_once(queue: RequestQueue, session: FakeSession) -> None:
    rows = [queue.submit([start, start + 1], 3) for start in (1, 10, 20)]
    assert [ids(row) for row in rows] == [[3, 4, 5], [12, 13, 14], [22, 23, 24]]
    assert session.steps == [3, 3]


def test_a_request_of_class_high_joins_at_once_and_takes_the_others_along(
    queue: RequestQueue, session: FakeSession, clock: FakeClock
) -> None:
    low = queue.submit([1, 2], 3, priority="low")
    assert clock.parked.wait(30)
    high = queue.submit([10, 11], 3, priority="high")
    assert (ids(high), ids(low)) == ([12, 13, 14], [3, 4, 5])


def test_a_leftover_joins_when_its_time_has_come(queue: RequestQueue, session: FakeSession, clock: FakeClock) -> None:
    rows = [queue.submit([start, start + 1], 3) for start in (1, 10, 20, 30)]
    for row in rows[:3]:
        ids(row)
    assert clock.parked.wait(30)
    assert (queue.waiting, rows[3].tokens) == (1, 0)
    clock.advance(0.1)
    assert ids(rows[3]) == [32, 33, 34]


def test_a_request_joins_rows_that_decode_already(clock: FakeClock) -> None:
    gate = Gate()
    with RequestQueue(Model(gate), max_rows=3, clock=clock) as queue:
        first = queue.submit([1, 2], 4, priority="high")
        assert gate.inside.wait(30)
        second = queue.submit([10, 11], 3, priority="high")
        gate.open.set()
        assert (ids(first), ids(second)) == ([3, 4, 5, 6], [12, 13, 14])
        assert gate.steps == [2, 2]


def test_draining_lets_everything_finish_without_waiting_for_company(queue: RequestQueue) -> None:
    rows = [queue.submit([start, start + 1], 3) for start in range(0, 70, 10)]
    queue.drain()
    assert (queue.waiting, queue.rows) == (0, 0)
    assert [row.finish_reason for row in rows] == ["length"] * 7
    assert ids(rows[6]) == [62, 63, 64]


def test_draining_an_empty_queue_returns_at_once(queue: RequestQueue) -> None:
    queue.drain()


def test_fewer_rows_let_no_more_join_than_that(clock: FakeClock) -> None:
    gate = Gate()
    with RequestQueue(Model(gate), max_rows=2, clock=clock) as queue:
        rows = [queue.submit([start, start + 1], 4) for start in (1, 10)]
        assert gate.inside.wait(30)
        queue.max_rows = 1
        rows += [queue.submit([start, start + 1], 3) for start in (20, 30)]
        gate.open.set()
        queue.drain()
        assert [row.tokens for row in rows] == [4, 4, 3, 3]
        assert gate.steps == [2, 2, 2]
        with pytest.raises(ConfigError, match="max_rows"):
            queue.max_rows = 0


# ---- in which order ----


def test_high_joins_before_medium_and_medium_before_low() -> None:
    line: Line[str] = Line()
    arrivals: dict[str, Priority] = {"a": "low", "b": "medium", "c": "high", "d": "medium", "e": "high"}
    for name, priority in arrivals.items():
        line.push(name, priority, 0.0)
    assert line.pop(9) == ["c", "e", "b", "d", "a"]


def test_a_request_that_waits_rises_by_a_class_each_aging_period() -> None:
    line: Line[str] = Line(aging=1.0)
    line.push("low", "low", 0.0)
    line.push("early", "high", 1.9)
    line.push("late", "high", 2.1)
    assert line.pop(9) == ["early", "low", "late"]


PRIORITIES: tuple[Priority, ...] = ("high", "medium", "low")
ARRIVALS = st.lists(st.tuples(st.floats(0, 0.5), st.sampled_from(PRIORITIES), st.integers(0, 3)), max_size=40)


@given(arrivals=ARRIVALS, aging=st.sampled_from([0.0, 0.3, 1.0]))
def test_nobody_is_overtaken_by_what_came_long_after(arrivals: list[tuple[float, Priority, int]], aging: float) -> None:
    line, now = Line[int](aging=aging), 0.0
    came: dict[int, tuple[float, Priority]] = {}
    joined: list[int] = []
    waited_at: dict[int, list[int]] = {}
    for number, (gap, priority, room) in enumerate(arrivals):
        now += gap
        line.push(number, priority, now)
        came[number] = (now, priority)
        for name in line.pop(room):
            waited_at[name] = [other for other in came if other not in joined]
            joined.append(name)
    for name in line.pop(1000):
        waited_at[name] = [other for other in came if other not in joined]
        joined.append(name)
    assert sorted(joined) == list(came)
    for name in joined:
        at, priority = came[name]
        for other in waited_at[name]:
            other_at, other_priority = came[other]
            classes = PRIORITIES.index(other_priority) - PRIORITIES.index(priority)
            # `name` joined while `other` waited: it came first, or is of a higher class and not too late.
            assert (at, name) <= (other_at, other) or (classes > 0 and at <= other_at + classes * aging + 1e-9)


@given(
    waiting=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(PRIORITIES)), max_size=10),
    room=st.integers(0, 8),
    later=st.floats(0, 1),
)
def test_the_line_fires_by_its_rule_and_no_other(
    waiting: list[tuple[float, Priority]], room: int, later: float
) -> None:
    line, now = Line[int](max_wait=0.1), 1.0 + later
    for number, (at, priority) in enumerate(sorted(waiting)):
        line.push(number, priority, at)
    seconds = line.seconds_to_fire(room, now)
    if not waiting or room == 0:
        assert seconds is None
    elif len(waiting) >= room or any(priority == "high" for _, priority in waiting):
        assert seconds == 0
    else:
        assert seconds == max(min(at for at, _ in waiting) + 0.1 - now, 0)


# ---- cancelling ----


def test_a_request_that_is_closed_while_it_waits_never_runs(
    queue: RequestQueue, session: FakeSession, clock: FakeClock
) -> None:
    one, two = queue.submit([1, 2], 3), queue.submit([10, 11], 3)
    one.close()
    assert (one.finish_reason, one.done, session.sequences[0].closed, queue.waiting) == ("cancelled", True, True, 1)
    assert ids(one) == []
    queue.drain()
    assert (ids(two), begun(session)) == ([12, 13, 14], [False, True])


def test_a_request_that_is_closed_while_it_runs_leaves_after_the_step(clock: FakeClock) -> None:
    gate = Gate()
    with RequestQueue(Model(gate), max_rows=2, clock=clock) as queue:
        one, two = queue.submit([1, 2], 500), queue.submit([10, 11], 5)
        assert gate.inside.wait(30)
        one.close()
        assert not gate.sequences[0].closed
        gate.open.set()
        assert ids(two) == [12, 13, 14, 15, 16]
        assert (one.finish_reason, gate.sequences[0].closed) == ("cancelled", True)
        assert gate.steps == []


def test_a_request_nobody_holds_any_more_is_cancelled(queue: RequestQueue, session: FakeSession) -> None:
    queue.submit([1, 2], 3)
    gc.collect()
    assert (queue.waiting, session.sequences[0].closed) == (0, True)


def test_an_event_cancels_a_request_that_runs(queue: RequestQueue) -> None:
    cancel = threading.Event()
    cancel.set()
    row = queue.submit([1, 2], 500, priority="high", cancel=cancel)
    assert (ids(row), row.finish_reason) == ([], "cancelled")


@given(
    requests=st.lists(
        st.tuples(st.sampled_from(PRIORITIES), st.integers(1, 5), st.booleans(), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_cancelled_ends_and_the_rest_is_whole(requests: list[tuple[Priority, int, bool, int]]) -> None:
    session = FakeSession()
    with RequestQueue(Model(session), max_rows=2, clock=FakeClock()) as queue:
        rows = []
        for number, (priority, tokens, cancelled, taken) in enumerate(requests):
            row = queue.submit([20 * number, 20 * number + 1], tokens, priority=priority)
            rows.append(row)
            if priority == "high":
                list(itertools.islice(row, taken))
            if cancelled:
                row.close()
        queue.drain()
        for number, (row, (_, tokens, cancelled, _)) in enumerate(zip(rows, requests, strict=True)):
            assert row.done
            if not cancelled:
                assert row.finish_reason == "length"
                assert session.sequences[number].ids[2:] == [(20 * number + 2 + i) % 256 for i in range(tokens - 1)]
    assert all(sequence.closed for sequence in session.sequences)


# ---- bounds, errors, the end ----


def test_a_full_queue_refuses_and_keeps_what_it_has(session: FakeSession, clock: FakeClock) -> None:
    with RequestQueue(Model(session), max_rows=8, max_waiting=2, clock=clock) as queue:
        rows = [queue.submit([1, 2], 2), queue.submit([10, 11], 2)]
        with pytest.raises(QueueFullError, match="2 requests wait already, the limit is 2"):
            queue.submit([20, 21], 2, priority="high")
        assert session.sequences[2].closed
        queue.drain()
        assert [ids(row) for row in rows] == [[3, 4], [12, 13]]
        again = queue.submit([20, 21], 2, priority="high")
        assert ids(again) == [22, 23]


def test_a_wrong_request_is_refused_at_once(queue: RequestQueue) -> None:
    with pytest.raises(ConfigError, match="priority: 'urgent' is not one of high, medium, low"):
        queue.submit([1], priority="urgent")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_tokens"):
        queue.submit([1], 0)
    with pytest.raises(ContextError):
        queue.submit([1] * 1001)
    assert queue.waiting == 0


@pytest.mark.parametrize(
    "options",
    [{"max_wait": -1}, {"max_wait": float("nan")}, {"aging": "1"}, {"max_waiting": 0}, {"max_rows": 0}],
)
def test_a_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RequestQueue(Model(FakeSession()), **options)


def test_an_error_is_raised_where_the_tokens_are_read_and_the_queue_goes_on(clock: FakeClock) -> None:
    with RequestQueue(Model(FailingSession(after=1)), clock=clock) as queue:
        failing = queue.submit([1, 2], 5, priority="high")
        assert next(failing).id == 3
        with pytest.raises(ProviderLost):
            next(failing)
        assert ids(queue.submit([10, 11], 2, priority="high")) == [12, 13]


def test_closing_cancels_what_waits_and_what_runs(clock: FakeClock) -> None:
    gate = Gate()
    queue = RequestQueue(Model(gate), max_rows=1, clock=clock)
    runs, waits = queue.submit([1, 2], 500), queue.submit([10, 11], 5)
    assert gate.inside.wait(30)
    closing = threading.Thread(target=queue.close)
    closing.start()
    gate.open.set()
    closing.join(30)
    assert [row.finish_reason for row in (runs, waits)] == ["cancelled", "cancelled"]
    assert all(sequence.closed for sequence in gate.sequences)
    with pytest.raises(ClosedError):
        queue.submit([1])
    queue.close()


def test_closing_the_model_ends_its_requests(queue: RequestQueue, session: FakeSession) -> None:
    row = queue.submit([1, 2], 5)
    queue._model.close()
    assert (row.done, session.sequences[0].closed) == (True, True)
    with pytest.raises(ClosedError):
        queue.submit([1])


def test_many_threads_share_one_queue() -> None:
    model = Model(FakeSession())
    wanted = {start: [t.id for t in model.generate([start, start + 1], 30)] for start in range(0, 200, 10)}
    found: dict[int, list[int]] = {}
    with RequestQueue(model, max_wait=0.005) as queue:

        def ask(start: int) -> None:
            priority = PRIORITIES[start // 10 % 3]
            found[start] = ids(queue.submit([start, start + 1], 30, priority=priority))

        threads = [threading.Thread(target=ask, args=(start,)) for start in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert found == wanted
