"""MetricsCalculator and FTLMeasurement, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from inferos.errors import ConfigError
from inferos.runtime.metrics import FTLMeasurement, MetricsCalculator, RequestTimes
from inferos.runtime.stop_texts import Token


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowModel:
    """A model whose prompt takes 2 s and whose tokens take 0.5 s each."""

    def __init__(self, clock: Clock, tokens: int = 4) -> None:
        self.clock = clock
        self.tokens = tokens

    def generate(self, prompt: str, max_tokens: int) -> Iterator[Token]:
        self.clock.now += 2.0
        for number in range(min(self.tokens, max_tokens)):
            self.clock.now += 0.5
            yield Token(number, f"{number} ", -1.0)


def test_nothing_is_known_of_an_empty_window() -> None:
    metrics = MetricsCalculator(clock=Clock())
    assert metrics.calculate_throughput() == {"tokens_per_second": None, "requests_per_second": None}
    latency = metrics.calculate_latency()
    assert latency == dict.fromkeys(("mean_ms", "median_ms", "p95_ms", "p99_ms", "std_ms"))
    assert metrics.calculate_first_token_latency() == dict.fromkeys(("mean_ms", "median_ms", "p95_ms"))
    assert metrics.sample_count == 0


def test_throughput_is_totals_over_the_time_since_the_first_request_began() -> None:
    clock = Clock()
    metrics = MetricsCalculator(clock=clock)
    metrics.record(RequestTimes(90.0, 95.0, 30))
    metrics.record(RequestTimes(92.0, 100.0, 70))
    assert metrics.calculate_throughput() == {"tokens_per_second": 10.0, "requests_per_second": 0.2}


def test_requests_leave_when_they_ended_before_the_window() -> None:
    clock = Clock()
    metrics = MetricsCalculator(60, clock)
    metrics.record(RequestTimes(90.0, 100.0, 10))
    clock.now = 130.0
    metrics.record(RequestTimes(120.0, 130.0, 40))
    clock.now = 160.0
    assert metrics.sample_count == 2
    clock.now = 160.1
    assert metrics.sample_count == 1
    assert metrics.calculate_throughput()["tokens_per_second"] == pytest.approx(40 / 40.1)
    clock.now = 191.0
    assert metrics.calculate_throughput()["tokens_per_second"] is None


def test_percentiles_are_exact_over_the_window() -> None:
    clock = Clock()
    metrics = MetricsCalculator(clock=clock)
    seconds = np.random.default_rng(0).exponential(1.0, 500)
    for duration in seconds:
        metrics.record(RequestTimes(100.0 - duration, 100.0, 1, 100.0 - duration / 2))
    latency, first = metrics.calculate_latency(), metrics.calculate_first_token_latency()
    for name, percent in (("median_ms", 50), ("p95_ms", 95), ("p99_ms", 99)):
        assert latency[name] == pytest.approx(1000 * np.percentile(seconds, percent))
    assert latency["mean_ms"] == pytest.approx(1000 * seconds.mean())
    assert latency["std_ms"] == pytest.approx(1000 * seconds.std())
    assert first["p95_ms"] == pytest.approx(500 * np.percentile(seconds, 95))


def test_a_request_without_a_token_has_no_first_token() -> None:
    metrics = MetricsCalculator(clock=Clock())
    metrics.record(RequestTimes(99.0, 100.0, 0))
    assert metrics.calculate_first_token_latency()["mean_ms"] is None
    assert metrics.calculate_latency()["mean_ms"] == 1000.0


def test_the_first_token_is_stamped_when_it_is_given_out() -> None:
    clock = Clock()
    metrics = MetricsCalculator(clock=clock)
    measurement = FTLMeasurement(metrics, clock)
    result = measurement.measure_generation("words", SlowModel(clock))
    assert result == {"first_token_latency_ms": 2500.0, "total_latency_ms": 4000.0, "response": "0 1 2 3 "}
    assert measurement.latest_ms == 2500.0
    assert measurement.samples == (RequestTimes(100.0, 104.0, 4, 102.5),)
    assert metrics.calculate_first_token_latency()["median_ms"] == 2500.0


def test_a_request_begins_when_it_is_watched_and_waiting_for_a_reader_counts() -> None:
    clock = Clock()
    measurement = FTLMeasurement(clock=clock)
    tokens = measurement.watch(SlowModel(clock).generate("", 3))
    clock.now += 1.0
    assert [token.id for token in tokens] == [0, 1, 2]
    assert measurement.latest_ms == 3500.0


def test_a_request_that_is_left_or_fails_ends_there() -> None:
    clock = Clock()
    measurement = FTLMeasurement(clock=clock)
    with measurement.watch(SlowModel(clock).generate("", 4)) as tokens:
        next(tokens)

    def failing() -> Iterator[Token]:
        raise ConfigError("no")
        yield  # a generator

    with pytest.raises(ConfigError):
        list(measurement.watch(failing()))
    assert [(sample.tokens_generated, sample.first_token_time) for sample in measurement.samples] == [
        (1, 102.5),
        (0, None),
    ]
    assert measurement.latest_ms == 2500.0


def test_without_a_token_there_is_no_latency_of_one() -> None:
    clock = Clock()
    measurement = FTLMeasurement(clock=clock)
    assert measurement.latest_ms is None
    assert measurement.measure_generation("", SlowModel(clock, tokens=0))["first_token_latency_ms"] is None
    assert measurement.latest_ms is None


def test_what_no_request_can_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_seconds: 0"):
        MetricsCalculator(0)
    with pytest.raises(ConfigError, match="not in order"):
        RequestTimes(2.0, 1.0, 1)
    with pytest.raises(ConfigError, match="not in order"):
        RequestTimes(1.0, 2.0, 1, 3.0)
    with pytest.raises(ConfigError, match="-1 tokens"):
        RequestTimes(1.0, 2.0, -1)
