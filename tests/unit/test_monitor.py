"""QualityMonitor: readings that were measured, and nothing else."""

from __future__ import annotations

import math

import pytest

from inferos.errors import ConfigError
from inferos.quality.monitor import QualityMonitor, allowed_delta_ppl


def test_nothing_is_known_before_the_first_reading() -> None:
    monitor = QualityMonitor()
    assert monitor.current is None
    assert monitor.mean is None
    assert not monitor.over_bound
    assert monitor.readings == ()


def test_current_is_the_newest_and_mean_that_of_the_window() -> None:
    monitor = QualityMonitor(window_size=3)
    for delta in (9.0, 0.1, 0.2, 0.3):
        monitor.record(delta)
    assert monitor.current == 0.3
    assert monitor.mean == pytest.approx(0.2)
    assert [reading.delta_ppl for reading in monitor.readings] == [0.1, 0.2, 0.3]


def test_three_readings_in_a_row_are_over_the_bound() -> None:
    monitor = QualityMonitor(0.5)
    seen = []
    for delta in (0.6, 0.6, 0.5, 0.6, 0.7, 0.8, 0.51, 0.1):
        monitor.record(delta)
        seen.append(monitor.over_bound)
    assert seen == [False, False, False, False, False, True, True, False]


def test_two_perplexities_are_a_reading() -> None:
    monitor = QualityMonitor(0.5)
    assert [monitor.check_quality(12.0, 11.0) for _ in range(3)] == [False, False, True]
    assert monitor.current == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.1"])
def test_what_is_no_number_is_refused_and_not_recorded(value: float) -> None:
    monitor = QualityMonitor()
    with pytest.raises(ConfigError, match="not a finite number"):
        monitor.record(value)
    assert monitor.current is None


@pytest.mark.parametrize(("budget", "allowed"), [(0.0, 0.4), (0.5, 0.4), (0.75, 0.2), (0.9, 0.08), (1.0, 0.0)])
def test_a_quality_budget_above_one_half_tightens_the_bound(budget: float, allowed: float) -> None:
    assert allowed_delta_ppl(0.4, budget) == pytest.approx(allowed)
    reading = QualityMonitor(0.4).record(0.3, quality_budget=budget)
    assert reading.bound == pytest.approx(allowed)
    assert reading.over == (allowed < 0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QualityMonitor(math.nan), "max_delta_ppl: nan"),
        (lambda: QualityMonitor(-1), "max_delta_ppl: -1"),
        (lambda: QualityMonitor(window_size=2), "window_size: 2 is not a whole number of at least 3"),
        (lambda: allowed_delta_ppl(0.5, 1.1), "quality_budget: 1.1 is not within 0..1"),
        (lambda: allowed_delta_ppl(0.5, math.nan), "quality_budget: nan is not within 0..1"),
    ],
)
def test_bounds_out_of_range_are_refused(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
