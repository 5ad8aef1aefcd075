"""QualityScheduler: what is due when, over daylight saving and clocks that jump, and what becomes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from inferos.errors import ConfigError, ModelError
from inferos.quality.scheduler import Alert, QualityScheduler

BERLIN = ZoneInfo("Europe/Berlin")
MODEL = object()


class Clock:
    """A local time that the test sets."""

    def __init__(self, *at: int, zone: ZoneInfo = BERLIN) -> None:
        self.now = datetime(*at, tzinfo=zone).astimezone(UTC)  # type: ignore[misc]

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **by: float) -> None:
        self.now += timedelta(**by)

    def to(self, *at: int, zone: ZoneInfo = BERLIN) -> None:
        self.now = datetime(*at, tzinfo=zone).astimezone(UTC)  # type: ignore[misc]


class Measurement:
    """Gives what it is told to, and remembers what it was asked for."""

    dataset = "a book"

    def __init__(self, delta_ppl: float = 0.1, error: Exception | None = None) -> None:
        self.delta_ppl = delta_ppl
        self.error = error
        self.asked: list[str] = []
        self.work: Callable[[Callable[[int], None]], None] = lambda progress: progress(1)

    def measure(self, model: object, *, light: bool = False, progress: Callable[[int], None]) -> Any:
        assert model is MODEL
        self.asked.append("light" if light else "full")
        self.work(progress)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(delta_ppl=self.delta_ppl, baseline_ppl=10.0, current_ppl=10.0 + self.delta_ppl)


def scheduler_at(clock: Clock, measurement: Measurement | None = None, **options: Any) -> QualityScheduler[object]:
    return QualityScheduler(measurement or Measurement(), MODEL, zone=BERLIN, clock=clock, **options)


def runs_until(scheduler: QualityScheduler[object], clock: Clock, *end: int, minutes: float = 30) -> list[str]:
    """Local times and kinds of what ran while the clock went on to `end`."""
    found = []
    last = datetime(*end, tzinfo=BERLIN)  # type: ignore[misc]
    while clock.now <= last:
        evaluation = scheduler.run_due()
        if evaluation is not None:
            found.append(f"{evaluation.at.astimezone(BERLIN):%d %H:%M} {evaluation.kind}")
        clock.forward(minutes=minutes)
    return found


def test_a_day_has_one_full_evaluation_at_six_and_a_light_one_every_four_hours() -> None:
    clock = Clock(2026, 5, 10, 21, 0)
    assert runs_until(scheduler_at(clock), clock, 2026, 5, 12, 7, 0) == [
        "11 01:00 light", "11 05:00 light", "11 06:00 full", "11 10:00 light", "11 14:00 light", "11 18:00 light",
        "11 22:00 light", "12 02:00 light", "12 06:00 full",
    ]  # fmt: skip


@pytest.mark.parametrize(("month", "day"), [(3, 29), (10, 25)])  # 23 and 25 hours long in 2026
def test_a_day_that_changes_the_clock_has_one_full_evaluation_at_six_local_time(month: int, day: int) -> None:
    clock = Clock(2026, month, day - 1, 12, 0)
    ran = runs_until(scheduler_at(clock), clock, 2026, month, day + 1, 12, 0, minutes=15)
    assert [run for run in ran if "full" in run] == [f"{day} 06:00 full", f"{day + 1} 06:00 full"]


def test_nothing_is_due_at_the_start_and_due_changes_nothing() -> None:
    clock = Clock(2026, 5, 10, 7, 0)
    scheduler = scheduler_at(clock)
    assert scheduler.due() is None
    later = clock.now + timedelta(hours=23)
    assert [scheduler.due(later), scheduler.due(later), scheduler.due()] == ["full", "full", None]
    assert scheduler.due(clock.now + timedelta(hours=4)) == "light"


def test_a_clock_that_jumps_over_days_gives_one_full_evaluation() -> None:
    clock = Clock(2026, 5, 10, 7, 0)
    scheduler = scheduler_at(clock)
    clock.to(2026, 5, 14, 13, 0)
    assert runs_until(scheduler, clock, 2026, 5, 14, 18, 0) == ["14 13:00 full", "14 17:00 light"]


def test_a_clock_set_back_over_six_does_not_evaluate_twice() -> None:
    clock = Clock(2026, 5, 10, 5, 0)
    scheduler = scheduler_at(clock)
    clock.to(2026, 5, 10, 6, 1)
    assert scheduler.run_due() is not None
    clock.to(2026, 5, 10, 5, 30)
    ran = runs_until(scheduler, clock, 2026, 5, 11, 6, 0)
    assert [run for run in ran if "full" in run] == ["11 06:00 full"]
    assert ran[0] == "10 09:30 light"  # four hours after the time it was set back to


def test_a_clock_that_was_years_ahead_does_not_silence_the_scheduler() -> None:
    clock = Clock(2039, 1, 1, 0, 0)
    scheduler = scheduler_at(clock)
    clock.to(2026, 5, 10, 12, 0)
    ran = runs_until(scheduler, clock, 2026, 5, 11, 6, 0)
    assert ran[0] == "10 16:00 light"
    assert ran[-1] == "11 06:00 full"


def test_the_metrics_group_is_null_until_it_was_measured() -> None:
    clock = Clock(2026, 5, 10, 12, 0)
    scheduler = scheduler_at(clock, Measurement(0.2))
    assert scheduler.full_evaluation == {
        "last_run": None, "next_scheduled": "2026-05-11T04:00:00Z", "dataset": "a book", "baseline_ppl": None,
        "current_ppl": None, "delta_ppl": None, "status": "never_run",
    }  # fmt: skip
    clock.to(2026, 5, 11, 6, 5)
    assert scheduler.full_evaluation["next_scheduled"] == "2026-05-11T04:05:00Z"  # due now
    scheduler.run_due()
    assert scheduler.full_evaluation == {
        "last_run": "2026-05-11T04:05:00Z", "next_scheduled": "2026-05-12T04:00:00Z", "dataset": "a book",
        "baseline_ppl": 10.0, "current_ppl": 10.2, "delta_ppl": 0.2, "status": "within_threshold",
    }  # fmt: skip


def test_an_evaluation_over_the_bound_alerts_with_a_reason_and_an_action() -> None:
    alerts: list[Alert] = []

    def broken(_alert: Alert) -> None:
        raise RuntimeError("no network")

    measurement = Measurement(0.6)
    scheduler = scheduler_at(Clock(2026, 5, 10, 12, 0), measurement, on_alert=[broken, alerts.append])
    evaluation = scheduler.run_full_evaluation()
    assert evaluation is not None
    assert evaluation.status == "over_threshold"
    assert [(alert.reason, alert.evaluation) for alert in alerts] == [
        ("delta PPL 0.6 is over 0.5 (10 uncompressed, 10.6 compressed)", evaluation)
    ]
    assert "quality_optimized" in alerts[0].action
    measurement.delta_ppl = 0.5
    scheduler.run_light_evaluation()
    assert len(alerts) == 1


def test_a_failed_evaluation_alerts_and_waits_for_its_next_turn() -> None:
    alerts: list[Alert] = []
    clock = Clock(2026, 5, 10, 12, 0)
    measurement = Measurement(error=ModelError("the text is gone"))
    scheduler = scheduler_at(clock, measurement, on_alert=[alerts.append])
    clock.to(2026, 5, 11, 6, 0)
    evaluation = scheduler.run_due()
    assert evaluation is not None
    assert (evaluation.status, evaluation.error, evaluation.report) == ("failed", "the text is gone", None)
    assert alerts[0].reason == "the full evaluation failed: the text is gone"
    assert scheduler.full_evaluation["delta_ppl"] is None
    assert scheduler.run_due() is None
    measurement.error = None
    clock.forward(hours=4)
    assert scheduler.run_due() is not None
    assert measurement.asked == ["full", "light"]


def test_every_measured_delta_ppl_is_observed_and_the_history_is_bounded() -> None:
    seen: list[float] = []
    scheduler = scheduler_at(Clock(2026, 5, 10, 12, 0), observe=seen.append, history=3)
    for _ in range(5):
        scheduler.run_light_evaluation()
    assert seen == [0.1] * 5
    assert len(scheduler.history) == 3


def test_while_one_evaluation_runs_no_other_begins() -> None:
    measurement = Measurement()
    scheduler = scheduler_at(Clock(2026, 5, 10, 12, 0), measurement)
    inner: list[object] = []
    measurement.work = lambda _progress: inner.append(scheduler.run_full_evaluation())
    assert scheduler.run_full_evaluation() is not None
    assert inner == [None]


def test_the_thread_does_what_is_due_and_closing_cancels_it() -> None:
    clock = Clock(2026, 5, 10, 12, 0)
    measurement = Measurement()
    began = threading.Event()

    def endless(progress: Callable[[int], None]) -> None:
        began.set()
        while True:
            progress(1)

    measurement.work = endless
    scheduler = scheduler_at(clock, measurement)
    clock.forward(days=1)
    before = threading.active_count()
    scheduler.start()
    assert scheduler._background is not None
    scheduler._background.wake()  # the next minute, now
    assert began.wait(30)
    scheduler.close()
    scheduler.close()
    assert threading.active_count() == before
    assert [evaluation.status for evaluation in scheduler.history] == ["cancelled"]
    assert scheduler.run_full_evaluation() is None


def test_the_systems_zone_is_used_where_none_is_given() -> None:
    clock = Clock(2026, 5, 10, 12, 0)
    scheduler = QualityScheduler(Measurement(), MODEL, clock=clock)
    upcoming = datetime.fromisoformat(scheduler.full_evaluation["next_scheduled"]).astimezone()
    assert (upcoming.hour, upcoming.minute) == (6, 0)


def test_what_makes_no_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="history: 0"):
        scheduler_at(Clock(2026, 5, 10, 12, 0), history=0)
    with pytest.raises(ConfigError, match="max_delta_ppl: -1"):
        scheduler_at(Clock(2026, 5, 10, 12, 0), max_delta_ppl=-1)
    with pytest.raises(ConfigError, match="has no time zone"):
        QualityScheduler(Measurement(), MODEL, clock=lambda: datetime(2026, 5, 10))
