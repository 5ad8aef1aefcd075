"""Shadow replay: bounded, off the serving path, and equal to what a direct comparison measures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import FailingSession, FakeSession, counting

import inferos
from inferos.errors import ConfigError, ProviderLost
from inferos.quality import QualityMonitor, evaluate
from inferos.quality.shadow import ShadowCounts, ShadowReplay
from inferos.runtime.protocols import Ids

VOCAB = 300
PROMPT = np.arange(40, dtype=np.int64)
ANSWER = list(range(40, 70))


def nll(margin: float) -> float:
    """Of the token that a fake session with this margin favours."""
    return float(np.log(np.exp(margin) + VOCAB - 1) - margin)


class Ticking(FakeSession):
    """Every feed takes a second of the test's clock."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.now = 0.0

    def before_feed(self, ids: Ids) -> None:
        self.now += 1.0


def replay_of(
    reference: FakeSession | None = None, session: FakeSession | None = None, **options: Any
) -> tuple[ShadowReplay, FakeSession, FakeSession]:
    reference, session = reference or FakeSession(margin=5.0), session or FakeSession(margin=4.0)
    return ShadowReplay(lambda: reference, lambda: session, **({"every": 1} | options)), reference, session


def test_a_reading_is_the_difference_between_the_two_caches() -> None:
    seen: list[float] = []
    shadow, reference, session = replay_of(observe=seen.append)
    shadow.finished(PROMPT, ANSWER)
    reading = shadow.run_pending()
    assert reading is not None
    assert (reading.positions, reading.context, reading.complete) == (30, 69, True)
    assert reading.delta_nll == pytest.approx(nll(4) - nll(5))
    assert reading.delta_ppl == pytest.approx(np.exp(nll(4)) - np.exp(nll(5)))
    assert reading.ppl - reading.baseline_ppl == reading.delta_ppl
    p, q = np.exp(-nll(5)), np.exp(-nll(4))
    kld = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert reading.kld_mean == pytest.approx(kld)
    assert reading.kld_max == pytest.approx(kld)
    assert reading.same_top1 == 1.0
    assert seen == [reading.delta_ppl]
    assert shadow.latest == reading
    for side in (reference, session):
        assert [sequence.runs for sequence in side.sequences] == [[40] + [1] * 29]
        assert side.sequences[0].closed


def test_nothing_is_measured_until_a_request_was_replayed() -> None:
    shadow, reference, _ = replay_of()
    assert shadow.latest is None
    assert shadow.run_pending() is None
    shadow.finished(PROMPT, ANSWER)
    assert shadow.latest is None
    assert reference.sequences == []  # `finished` runs no model


def test_every_nth_request_is_sampled() -> None:
    shadow, _, _ = replay_of(every=3)
    replayed = []
    for _ in range(9):
        shadow.finished(PROMPT, ANSWER)
        replayed.append(shadow.run_pending() is not None)
    assert replayed == [False, False, True] * 3
    assert shadow.counts == ShadowCounts(seen=9, sampled=3, replayed=3)


def test_a_probability_draws_the_same_requests_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[bool]:
        shadow, _, _ = replay_of(every=None, probability=0.3, seed=seed)
        chosen = []
        for _ in range(200):
            before = shadow.counts.sampled
            shadow.finished(PROMPT, ANSWER)
            chosen.append(shadow.counts.sampled > before)
        return chosen

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert 40 <= sum(drawn(1)) <= 80


def test_at_most_one_request_waits() -> None:
    shadow, _, _ = replay_of()
    for _ in range(3):
        shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is not None
    assert shadow.run_pending() is None
    assert shadow.counts == ShadowCounts(seen=3, sampled=3, waiting=2, replayed=1)


def test_a_long_request_is_cut_behind_its_first_tokens() -> None:
    shadow, reference, _ = replay_of(max_tokens=64)
    shadow.finished(np.arange(200, dtype=np.int64), ANSWER)
    reading = shadow.run_pending()
    assert reading is not None
    assert (reading.positions, reading.context) == (16, 63)
    assert reference.sequences[0].ids == list(range(63))


def test_a_long_prompt_is_fed_in_pieces() -> None:
    shadow, _, session = replay_of(max_tokens=900)
    shadow.finished(np.arange(800, dtype=np.int64) % 256, ANSWER)
    assert shadow.run_pending() is not None
    assert session.sequences[0].runs[:3] == [512, 288, 1]


def test_a_request_of_few_tokens_says_nothing() -> None:
    shadow, _, _ = replay_of()
    shadow.finished(PROMPT[:6], ANSWER[:10])
    assert shadow.run_pending() is None
    assert shadow.counts == ShadowCounts(seen=1, sampled=1, short=1)


def test_where_time_runs_out_what_was_scored_counts() -> None:
    reference = Ticking(margin=5.0)
    shadow, _, _ = replay_of(reference, max_seconds=20.0, clock=lambda: reference.now)
    shadow.finished(PROMPT, ANSWER)
    reading = shadow.run_pending()
    assert reading is not None
    assert (reading.positions, reading.complete, reading.seconds) == (20, False, 20.0)


def test_where_time_runs_out_too_early_there_is_no_reading() -> None:
    reference = Ticking(margin=5.0)
    shadow, _, session = replay_of(reference, max_seconds=10.0, clock=lambda: reference.now)
    shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is None
    assert shadow.counts == ShadowCounts(seen=1, sampled=1, unfinished=1)
    assert session.sequences[0].closed


def test_a_failing_replay_is_counted_and_disturbs_nobody() -> None:
    shadow, reference, session = replay_of(session=FailingSession(after=5))
    shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is None
    assert shadow.counts == ShadowCounts(seen=1, sampled=1, failed=1)
    assert shadow.last_error == "the fake is gone"
    assert reference.sequences[0].closed
    assert session.sequences[0].closed
    shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is not None


def test_a_refused_reading_is_kept() -> None:
    def refuse(_delta: float) -> None:
        raise ConfigError("no policy to change")

    shadow, _, _ = replay_of(observe=refuse)
    shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is not None
    assert shadow.counts.replayed == 1
    assert shadow.last_error == "no policy to change"


def test_the_uncompressed_session_is_opened_once_and_late_the_compressed_one_each_time() -> None:
    opened: list[str] = []

    def opening(name: str) -> Callable[[], FakeSession]:
        def open_it() -> FakeSession:
            opened.append(name)
            return FakeSession()

        return open_it

    shadow = ShadowReplay(opening("reference"), opening("session"), every=1)
    shadow.finished(PROMPT, ANSWER)
    assert opened == []
    shadow.run_pending()
    shadow.finished(PROMPT, ANSWER)
    shadow.run_pending()
    assert opened == ["reference", "session", "session"]


def test_a_thread_replays_what_comes_and_ends_when_closed() -> None:
    came = threading.Event()
    shadow, _, _ = replay_of(observe=lambda _: came.set())
    before = threading.active_count()
    shadow.start()
    shadow.start()
    assert threading.active_count() == before + 1
    shadow.finished(PROMPT, ANSWER)
    assert came.wait(30)
    shadow.close()
    shadow.close()
    assert threading.active_count() == before
    shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is None


def test_closing_ends_a_replay_after_its_step() -> None:
    class Closing(FakeSession):
        def before_feed(self, ids: Ids) -> None:
            if len(self.sequences[0].runs) == 20:
                shadow.close()

    shadow, reference, _ = replay_of(reference=Closing())
    shadow.finished(PROMPT, ANSWER)
    assert shadow.run_pending() is None
    assert len(reference.sequences[0].runs) == 21
    assert reference.sequences[0].closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": None}, "exactly one"),
        ({"probability": 0.5}, "exactly one"),
        ({"every": 0}, "every: 0"),
        ({"every": None, "probability": 1.5}, "probability: 1.5"),
        ({"max_tokens": 31}, "max_tokens: 31 is not at least 32"),
        ({"max_seconds": 0}, "max_seconds: 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replay_of(**options)


def test_a_models_own_requests_give_its_monitor_a_measured_delta_ppl() -> None:
    monitor = QualityMonitor()
    with inferos.load("reference", kv="int4", threads=1) as model:
        shadow = ShadowReplay.of(model, every=1, observe=monitor.record)
        generation = model.generate("It was a long day. " * 30, 40, ignore_eos=True)
        tokens = [token.id for token in generation]
        held = model.session.arena.stats()  # type: ignore[attr-defined]
        reading = shadow.run_pending()
        assert reading is not None
        assert model.session.arena.stats() == held  # type: ignore[attr-defined]
        prompt = model.prompt_ids("It was a long day. " * 30)
        ids = np.concatenate([prompt, np.array(tokens[:-1], np.int64)])
        direct = evaluate(model.session.beside(kv="f16"), model.session, ids, prompt=len(prompt))  # type: ignore[attr-defined]
    assert reading.positions == direct.positions == 39
    assert reading.kld_mean == direct.kld_mean > 0
    assert reading.delta_ppl == pytest.approx(direct.delta_ppl)
    assert monitor.current == reading.delta_ppl


def test_a_conversations_turns_are_observed_and_failed_requests_are_not() -> None:
    class Watching:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def finished(self, prompt: Ids, tokens: list[int]) -> None:
            self.seen.append((len(prompt), len(tokens)))

    session = FailingSession(after=1000)
    model = inferos.Model(session)
    model.observer = watching = Watching()
    assert len(list(model.generate([1, 2, 3], 5))) == 5
    session.left = 2
    with pytest.raises(ProviderLost):
        list(model.generate([1, 2, 3], 5))
    assert watching.seen == [(3, 4)]  # the newest token was given out, not fed


def test_an_uncompressed_model_has_nothing_to_compare() -> None:
    model = inferos.Model(FakeSession(counting))
    with pytest.raises(ConfigError, match="nothing to compare"):
        ShadowReplay.of(model, every=1)
    assert model.observer is None
