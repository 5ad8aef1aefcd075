"""An engine that throws or hangs in any step is left, and the stream is the undisturbed one to the bit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import PassingEngine
from models import Tiny, tiny_folder, token_ids
from test_step_faults import CutModel

from inferos.errors import BudgetError, ClosedError, ModelError, ProviderError
from inferos.kv import Arena
from inferos.runtime._compressed import CompressedSession
from inferos.runtime._ort import ORT_ERRORS
from inferos.runtime._runner import Runner, open_runner
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.failover import FallbackReason, RobustFallbackManager
from inferos.runtime.failover.steps import StepFailover
from inferos.runtime.failover.workers import StepTimeoutError, Waitable, Workers, deadline
from inferos.runtime.layout import read_layout
from inferos.runtime.model import Model
from inferos.runtime.protocols import Engine
from inferos.runtime.routes import Routes

TINY = Tiny(layers=4)
CHUNK = 4
STEPS = 64
PROMPT = token_ids(STEPS * CHUNK, TINY.vocab)  # as many chunks as steps
PLACES = range(1, STEPS + 1)
WHEN = ("before the first layer", "between two layers", "after the last layer")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FaultyEngine(PassingEngine):
    """Runs as the real one, but for run number `fault`, which throws or hangs.

    A run that hangs is let go by the test, ignores `terminate`, and then goes on under the handle it was given.
    """

    def __init__(self, real: Engine, name: str, fault: int, how: str, when: str, cut: CutModel) -> None:
        super().__init__(real)
        self.name = name
        self.left = fault
        self.how = how
        self.when = when
        self.cut = cut
        self.runs: list[tuple[int, ...]] = []
        self.hangs = threading.Event()
        self.let_go = threading.Event()
        self.late = threading.Event()
        self.late_error: BaseException | None = None
        self.options: Any = None

    def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
        self.runs.append(feeds["input_ids"].shape)
        self.left -= 1
        if self.left != 0:
            return super().run(feeds, run_options=run_options)
        if self.when == WHEN[0]:
            self._fail(run_options)
            return self._late(lambda: self.real.run(feeds))
        if self.when == WHEN[1]:
            rest = self._first_layers(feeds)
            self._fail(run_options)
            return self._late(lambda: self.cut.second.run(None, rest))
        logits = self.real.run(feeds)
        self._fail(run_options)
        return self._late(lambda: logits)

    def _first_layers(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        used = {name: np.asarray(feeds[name], kind) for name, kind in self.types.items() if name in feeds}
        used = {value.name: used[value.name] for value in self.cut.first.get_inputs()}
        (middle,) = self.cut.first.run(None, used)
        del used["input_ids"]
        return used | {self.cut.middle: middle}

    def _fail(self, options: Any) -> None:
        if self.how == "throws":
            raise ProviderError("the fake failed")
        self.options = options
        self.hangs.set()
        assert self.let_go.wait(60)

    def _late(self, work: Any) -> Any:
        try:
            return work()
        except ORT_ERRORS as error:
            self.late_error = error
            raise
        finally:
            self.late.set()


class Bench:
    """One model, several ONNX Runtime sessions of it."""

    def __init__(self, folder: Path) -> None:
        self.layout = read_layout(tiny_folder(folder, TINY))
        self.cut = CutModel(folder, 1)
        self.runners: list[Runner] = [open_runner(self.layout, threads=1) for _ in range(3)]
        self.clock = Clock()

    def session(self, kv: str, routes: Routes, *, budget_bytes: int = 0, wait: Any = None) -> CompressedSession:
        return CompressedSession(
            self.layout,
            rules=CacheRules(kv, recent_window=16),
            arena=Arena(budget_bytes),
            threads=1,
            prefill_chunk=CHUNK,
            routes=routes,
            failover=StepFailover(RobustFallbackManager(clock=self.clock, notify=lambda _: None), wait),
        )

    def undisturbed(self, kv: str) -> CompressedSession:
        return self.session(kv, Routes(self.runners[:1]))

    def faulty(self, fault: int, how: str, when: str, times: int) -> list[FaultyEngine]:
        """Three engines, the first `times` of which fail in their run number `fault`; later ones in their first."""
        faults = [fault if place == 0 else 1 if place < times else 0 for place in range(3)]
        return [
            FaultyEngine(runner, f"engine {place}", faults[place], how, when, self.cut)
            for place, runner in enumerate(self.runners)
        ]

    def healthy(self) -> list[PassingEngine]:
        return [PassingEngine(runner) for runner in self.runners]  # all of one name, for routes that fail in one role


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("failover"))


def wait_for(engines: Sequence[FaultyEngine]) -> Any:
    """Waits for the end of a run, or for one of the engines to hang: no time is measured."""
    seen: set[int] = set()

    def wait(done: Waitable) -> bool:
        while not done.acquire(timeout=0.002):
            for engine in engines:
                if engine.hangs.is_set() and id(engine) not in seen:
                    seen.add(id(engine))
                    return False
        return True

    return wait


@contextlib.contextmanager
def let_go_after(engines: Sequence[FaultyEngine]) -> Iterator[None]:
    """Nothing hangs beyond a test, not even one that fails."""
    try:
        yield
    finally:
        for engine in engines:
            engine.let_go.set()


def stream(session: CompressedSession, role: str, *, after_token: Any = lambda _count: None) -> list[tuple[int, float]]:
    """A sampled text of `STEPS` steps of a role: a token that was fed or drawn twice would change all that follow."""
    chunk, tokens = (CHUNK, 9) if role == "prefill" else (len(PROMPT), STEPS + 1)
    session.prefill_chunk = chunk
    model = Model(session, prefill_chunk=chunk)
    found = []
    for token in model.generate(PROMPT, tokens, temperature=0.9, seed=7, ignore_eos=True):
        found.append((token.id, token.logprob))
        after_token(len(found))
    return found


def check_fault(bench: Bench, kv: str, role: str, how: str, when: str, k: int, times: int, wanted: Any) -> None:
    engines = bench.faulty(k, how, when, times)
    others = bench.healthy()
    routes = Routes(engines, others[:1]) if role == "prefill" else Routes(others[:1], engines)
    session = bench.session(kv, routes, wait=wait_for(engines) if how == "hangs" else None)

    def late(count: int) -> None:
        # Those that hang go on at another token each: at once, or some steps later.
        for place, engine in enumerate(engines):
            if engine.hangs.is_set() and count > (0 if role == "prefill" else k) + 3 * place:
                engine.let_go.set()

    with let_go_after(engines):
        assert stream(session, role, after_token=late) == wanted, f"{kv}, {role}, {how} {when}, run {k}"
    # Every chunk or token once, and the failed one once more for each engine that failed it.
    shape = (1, CHUNK if role == "prefill" else 1)
    assert [len(engine.runs) for engine in engines] == expected_runs(k, times)
    assert all(set(engine.runs) <= {shape} for engine in engines)
    manager = session.failover.manager
    reason = FallbackReason.DEVICE_ERROR if how == "throws" else FallbackReason.TIMEOUT
    assert [(f.left, f.taken, f.reason) for f in manager.failovers] == [
        (f"engine {place}", f"engine {times}", reason) for place in range(times)
    ]
    if how == "hangs":
        check_late_runs(engines[:times], when)


def expected_runs(k: int, times: int) -> list[int]:
    """Runs of the three engines, the failed ones included, of `STEPS` steps."""
    rest = STEPS - k + 1
    return [k, rest, 0] if times == 1 else [k, 1, rest]


def check_late_runs(engines: Sequence[FaultyEngine], when: str) -> None:
    for engine in engines:
        assert engine.options.terminate is True
        assert engine.late.wait(60)
        if when == WHEN[2]:  # it had nothing left to write
            assert engine.late_error is None
        else:
            assert "handle" in str(engine.late_error)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("how", ["throws", "hangs"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_fault_in_any_step_leaves_the_stream_as_it_is(
    bench: Bench, role: str, how: str, times: int, when: str
) -> None:
    for kv in ("int8", "auto") if when == WHEN[1] else ("int8",):
        wanted = stream(bench.undisturbed(kv), role)
        for k in PLACES:
            check_fault(bench, kv, role, how, when, k, times, wanted)


@pytest.mark.parametrize("when", [WHEN[0], WHEN[2]])  # CutModel holds one row
@pytest.mark.parametrize("how", ["throws", "hangs"])
def test_rows_of_a_batch_fail_over_together(bench: Bench, how: str, when: str) -> None:
    engines = bench.faulty(3, how, when, 2)
    session = bench.session("int8", Routes(bench.runners[:1], engines), wait=wait_for(engines))
    plain = bench.undisturbed("int8")
    rows, alone = [session.sequence() for _ in range(3)], [plain.sequence() for _ in range(3)]
    with let_go_after(engines):
        for place, (row, single) in enumerate(zip(rows, alone, strict=True)):
            row.feed(PROMPT[: 80 * place + 7])
            single.feed(PROMPT[: 80 * place + 7])
        for step in range(70):
            ids = PROMPT[[step, step + 1, step + 2]]
            np.testing.assert_array_equal(session.step(rows, ids), plain.step(alone, ids), err_msg=f"step {step}")
            if step == 4:
                for engine in engines:
                    engine.let_go.set()
    assert [row.length for row in rows] == [77, 157, 237]
    assert session.failover.manager.failover_count == 2


def hung(bench: Bench) -> tuple[CompressedSession, list[FaultyEngine]]:
    """A session whose first engine hangs in a run of a token, and has been left for it."""
    engines = bench.faulty(1, "hangs", WHEN[0], 1)
    session = bench.session("int8", Routes(bench.runners[:1], engines[:2]), wait=wait_for(engines))
    session.sequence().feed(PROMPT[:1])
    return session, engines


def test_an_engine_that_hangs_is_not_used_before_it_is_back_and_its_time_has_come(bench: Bench) -> None:
    bench.clock.now = 0.0
    session, engines = hung(bench)
    with let_go_after(engines):
        sequence = session.sequence()

        def runs_after(seconds: float) -> int:
            bench.clock.now = seconds
            sequence.feed(PROMPT[:1])
            return len(engines[0].runs)

        assert runs_after(2.9) == 1
        assert runs_after(1000.0) == 1  # its time has come, but the run is not back
        engines[0].let_go.set()
        assert engines[0].late.wait(60)
        while len(engines[0].runs) == 1:  # the worker has a few instructions to go
            runs_after(1000.0)
    assert [state.reason for state in session.failover.manager.health.states(engines)] == [None] * 3


@pytest.mark.parametrize(("device", "seconds"), [("npu", 300.0), ("dml", 300.0), ("cpu", 5.0)])
def test_an_engine_is_tried_again_when_its_device_is_due(bench: Bench, device: str, seconds: float) -> None:
    bench.clock.now = 0.0
    engines = bench.faulty(1, "throws", WHEN[0], 1)
    engines[0].device = device
    session = bench.session("int8", Routes(bench.runners[:1], engines))
    sequence = session.sequence()
    for now in (0.0, seconds - 0.1, seconds, seconds):
        bench.clock.now = now
        sequence.feed(PROMPT[:1])
    assert [len(engine.runs) for engine in engines] == [3, 2, 0]
    assert session.failover.manager.failover_count == 1


def test_a_step_that_no_engine_does_fails_and_none_is_blamed(bench: Bench) -> None:
    engines = bench.faulty(1, "throws", WHEN[2], 3)
    session = bench.session("int8", Routes(bench.runners[:1], engines))
    plain = bench.undisturbed("int8").sequence()
    sequence = session.sequence()
    for each in (sequence, plain):
        each.feed(PROMPT[:100])
    with pytest.raises(ProviderError, match="the fake failed"):
        sequence.feed(PROMPT[:1])
    assert sequence.length == 100
    manager = session.failover.manager
    assert manager.failovers == ()
    assert {state.reason for state in manager.health.states(engines)} == {None}
    np.testing.assert_array_equal(sequence.feed(PROMPT[:1]), plain.feed(PROMPT[:1]))
    assert [len(engine.runs) for engine in engines] == [2, 1, 1]


class Unopened(dict[str, Any]):
    """Input types that are not known before the engine is opened, which fails."""

    def __contains__(self, _name: object) -> bool:
        raise ModelError("the device refuses the model")


def test_an_engine_that_does_not_open_is_left_like_one_that_fails(bench: Bench) -> None:
    unopened, last = bench.faulty(0, "throws", WHEN[0], 0)[1:]
    engines = bench.faulty(2, "throws", WHEN[0], 1)[:1]
    unopened.types = Unopened()
    session = bench.session("int8", Routes(bench.runners[:1], [*engines, unopened, last]))
    sequence = session.sequence()
    for _ in range(3):
        sequence.feed(PROMPT[:1])
    assert [len(engine.runs) for engine in (*engines, unopened, last)] == [2, 0, 2]
    assert [failover.left for failover in session.failover.manager.failovers] == ["engine 0", "engine 1"]


def test_a_device_that_fails_in_one_role_is_left_in_the_other(bench: Bench) -> None:
    decode = bench.faulty(1, "throws", WHEN[0], 1)[:2]
    prefill = bench.faulty(0, "throws", WHEN[0], 0)[:2]  # other objects of the same names
    sequence = bench.session("int8", Routes(prefill, decode)).sequence()
    sequence.feed(PROMPT[:CHUNK])
    sequence.feed(PROMPT[:1])
    sequence.feed(PROMPT[:CHUNK])
    assert [len(engine.runs) for engine in prefill] == [1, 1]


def test_an_engine_that_waits_is_better_than_none(bench: Bench) -> None:
    engines = bench.faulty(1, "throws", WHEN[0], 1)[:2]
    session = bench.session("int8", Routes(bench.runners[:1], engines))
    sequence = session.sequence()
    sequence.feed(PROMPT[:1])
    engines[1].left = 1  # the one that took over throws next; the first one is not due yet
    sequence.feed(PROMPT[:1])
    assert [len(engine.runs) for engine in engines] == [2, 2]
    assert sequence.length == 2


def test_an_error_of_the_cache_is_no_reason_to_fail_over(bench: Bench) -> None:
    engines = bench.faulty(0, "throws", WHEN[0], 0)
    session = bench.session("int8", Routes(engines), budget_bytes=128 << 10)
    sequence = session.sequence()
    with pytest.raises(BudgetError):
        while True:
            sequence.feed(PROMPT[:CHUNK])
    assert [len(engine.runs) > 0 for engine in engines] == [True, False, False]


def test_a_sequence_that_is_closed_while_an_engine_hangs_ends_there(bench: Bench) -> None:
    engines = bench.faulty(1, "hangs", WHEN[0], 1)
    waits = wait_for(engines)

    def wait(done: Waitable) -> bool:
        back = waits(done)
        sequence.close()
        return back

    session = bench.session("int8", Routes(bench.runners[:1], engines), wait=wait)
    sequence = session.sequence()
    with let_go_after(engines), pytest.raises(ClosedError):
        sequence.feed(PROMPT[:1])
    assert session.failover.manager.health.states(engines)[0].reason is FallbackReason.TIMEOUT


def test_waiting_that_is_interrupted_leaves_the_sequence_usable(bench: Bench) -> None:
    engines = bench.faulty(1, "hangs", WHEN[1], 1)
    interrupted = False

    def wait(done: Waitable) -> bool:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            assert engines[0].hangs.wait(60)
            raise KeyboardInterrupt
        return done.acquire()

    session = bench.session("int8", Routes(bench.runners[:1], engines), wait=wait)
    plain, sequence = bench.undisturbed("int8").sequence(), session.sequence()
    for each in (sequence, plain):
        each.feed(PROMPT[:100])
    with let_go_after(engines):
        with pytest.raises(KeyboardInterrupt):
            sequence.feed(PROMPT[:1])
        assert engines[0].options.terminate is True
        engines[0].let_go.set()  # before the next step: nothing may be left of it
        assert engines[0].late.wait(60)
        assert "handle" in str(engines[0].late_error)
        np.testing.assert_array_equal(sequence.feed(PROMPT[:1]), plain.feed(PROMPT[:1]))


def test_steps_run_on_the_callers_thread_unless_they_have_a_deadline(bench: Bench) -> None:
    class Threads(PassingEngine):
        def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
            seen.append((threading.current_thread(), run_options))
            return super().run(feeds, run_options=run_options)

    seen: list[Any] = []
    engines: list[Engine] = [Threads(runner) for runner in bench.runners[:2]]
    waits = wait_for([])
    for routes, wait in ((Routes(engines), None), (Routes(engines[:1]), waits), (Routes(engines), waits)):
        sequence = bench.session("int8", routes, wait=wait).sequence()
        for _ in range(3):
            sequence.feed(PROMPT[:1])
    here = (threading.current_thread(), None)
    assert seen[:6] == [here] * 6
    workers = {thread for thread, _ in seen[6:]}
    assert len(workers) == 1  # one that stays
    assert threading.current_thread() not in workers


class EveryHour(Clock):
    """Any engine is due again with the next look."""

    def __call__(self) -> float:
        self.now += 3600
        return self.now


@pytest.mark.parametrize("kv", ["int8", "auto"])
def test_runs_that_are_given_up_while_they_really_run_change_nothing(bench: Bench, kv: str) -> None:
    # No fake hangs here: the runs left behind write, or try to, while the same step runs elsewhere.
    patience = random.Random(3)
    engines = bench.faulty(0, "throws", WHEN[0], 0)
    seconds = (0.0, 1e-4, 3e-4, 6e-4, 1.0)
    session = bench.session(kv, Routes(engines), wait=lambda done: done.acquire(timeout=patience.choice(seconds)))
    session.failover.manager = RobustFallbackManager(clock=EveryHour(), notify=lambda _: None)
    plain, sequence = bench.undisturbed(kv).sequence(), session.sequence()
    ids = token_ids(800, TINY.vocab, seed=5)
    place = 0
    while place < len(ids):
        count = patience.choice((1, 1, 1, CHUNK))
        step = ids[place : place + count]
        place += count
        np.testing.assert_array_equal(sequence.feed(step), plain.feed(step), err_msg=f"at token {place}")
    assert session.failover.manager.failover_count > 20


def test_threads_fail_over_side_by_side(bench: Bench) -> None:
    class Shaky(PassingEngine):
        def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
            logits = super().run(feeds, run_options=run_options)
            if next(draws) % 4 == 0:
                raise ProviderError("the fake failed")
            return logits

    draws = itertools.count()
    engines: list[PassingEngine] = [Shaky(runner) for runner in bench.runners[:2]] + bench.healthy()[2:]
    for number, engine in enumerate(engines):
        engine.name = f"engine {number}"
    session = bench.session("int8", Routes(engines), wait=wait_for([]))
    session.failover.manager = RobustFallbackManager(clock=EveryHour(), notify=lambda _: None)
    wanted = {seed: fed_alone(bench.undisturbed("int8"), seed) for seed in range(4)}
    got: dict[int, Any] = {}

    def work(seed: int) -> None:
        got[seed] = fed_alone(session, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, logits in wanted.items():
        np.testing.assert_array_equal(got[seed], logits)
    assert session.failover.manager.failover_count > 50


def fed_alone(session: CompressedSession, seed: int) -> Any:
    """Logits of 150 steps of a sequence of its own."""
    sequence = session.sequence()
    return np.stack([sequence.feed(token[None]) for token in token_ids(150, TINY.vocab, seed=seed)])


def test_workers_keep_their_results_apart() -> None:
    workers = Workers()
    got: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        calls = [functools.partial(tuple, (number, count)) for count in range(300)]
        got[number] = [workers.run(call, deadline(60), lambda: None) for call in calls]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {number: [(number, count) for count in range(300)] for number in range(4)}
    with pytest.raises(ZeroDivisionError):
        workers.run(lambda: 1 / 0, deadline(60), lambda: None)


def test_a_worker_that_is_given_up_ends_with_its_call() -> None:
    others, workers = set(threading.enumerate()), Workers()
    forsaken: list[bool] = []
    late: list[StepTimeoutError] = []
    for _ in range(200):  # given up before, while and after the call is made
        try:
            workers.run(lambda: None, lambda done: done.acquire(timeout=0), lambda: forsaken.append(True))
        except StepTimeoutError as error:
            late.append(error.with_traceback(None))
    assert len(forsaken) == len(late) > 0
    del workers
    end = time.monotonic() + 60
    while set(threading.enumerate()) - others and time.monotonic() < end:
        time.sleep(0.001)
    assert set(threading.enumerate()) <= others
    assert all(error.returned() for error in late)
