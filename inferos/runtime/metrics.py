"""Speed and latency of finished requests over a moving window of time. What was not measured is None."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from inferos.errors import ConfigError
from inferos.runtime.stop_texts import Token

__all__ = ["FTLMeasurement", "GeneratingModel", "MetricsCalculator", "RequestTimes", "WatchedTokens"]

_KEPT = 1000  # first-token samples


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """A finished request. Times in seconds of one monotonic clock.

    Parameters
    ----------
    start_time, end_time : float
    tokens_generated : int
    first_token_time : float or None
        When the first token was given out; None if none was.
    """

    start_time: float
    end_time: float
    tokens_generated: int
    first_token_time: float | None = None

    def __post_init__(self) -> None:
        """Refuse times that do not follow each other."""
        first = self.end_time if self.first_token_time is None else self.first_token_time
        if not (math.isfinite(self.end_time) and self.start_time <= first <= self.end_time):
            raise ConfigError(f"RequestTimes: {self.start_time}, {first}, {self.end_time} are not in order")
        if self.tokens_generated < 0:
            raise ConfigError(f"RequestTimes: {self.tokens_generated} tokens, expected at least 0")


class MetricsCalculator:
    """Figures of the requests that ended within the last `window_seconds`. Percentiles are exact over all of them.

    Parameters
    ----------
    window_seconds : float, default 60
    clock : callable
        Seconds, monotonic; the clock of the requests.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, window_seconds: float = 60, clock: Callable[[], float] = time.monotonic) -> None:
        if not (math.isfinite(window_seconds) and window_seconds > 0):
            raise ConfigError(f"window_seconds: {window_seconds!r} is not a number above 0")
        self.window_seconds = window_seconds
        self._clock = clock
        self._requests: deque[RequestTimes] = deque()
        self._lock = threading.Lock()

    def record(self, request: RequestTimes) -> None:
        """Take a finished request."""
        with self._lock:
            self._requests.append(request)
            self._prune(self._clock())

    def calculate_throughput(self) -> dict[str, float | None]:
        """`tokens_per_second` and `requests_per_second`: totals over the time since the first of them began."""
        requests, now = self._recent()
        elapsed = now - min(request.start_time for request in requests) if requests else 0.0
        if elapsed <= 0:
            return {"tokens_per_second": None, "requests_per_second": None}
        tokens = sum(request.tokens_generated for request in requests)
        return {"tokens_per_second": tokens / elapsed, "requests_per_second": len(requests) / elapsed}

    def calculate_latency(self) -> dict[str, float | None]:
        """`mean_ms`, `median_ms`, `p95_ms`, `p99_ms` and `std_ms` of whole requests."""
        requests, _ = self._recent()
        return _spread([request.end_time - request.start_time for request in requests], (50, 95, 99), deviation=True)

    def calculate_first_token_latency(self) -> dict[str, float | None]:
        """`mean_ms`, `median_ms` and `p95_ms` from a request's start to the emission of its first token."""
        requests, _ = self._recent()
        stamped = [(request.start_time, request.first_token_time) for request in requests]
        return _spread([first - start for start, first in stamped if first is not None], (50, 95), deviation=False)

    @property
    def sample_count(self) -> int:
        """Requests in the window."""
        return len(self._recent()[0])

    def _recent(self) -> tuple[list[RequestTimes], float]:
        with self._lock:
            now = self._clock()
            self._prune(now)
            oldest = now - self.window_seconds
            return [request for request in self._requests if request.end_time >= oldest], now

    def _prune(self, now: float) -> None:
        """Let go of the old ones in front; one that was recorded late goes with those before it."""
        while self._requests and self._requests[0].end_time < now - self.window_seconds:
            self._requests.popleft()


def _spread(seconds: list[float], percents: tuple[int, ...], *, deviation: bool) -> dict[str, float | None]:
    names = {50: "median_ms", 95: "p95_ms", 99: "p99_ms"}
    if not seconds:
        return {
            "mean_ms": None,
            **dict.fromkeys((names[percent] for percent in percents), None),
            **({"std_ms": None} if deviation else {}),
        }
    values = 1000 * np.array(seconds)
    return {
        "mean_ms": float(values.mean()),
        **{names[percent]: float(np.percentile(values, percent)) for percent in percents},
        **({"std_ms": float(values.std())} if deviation else {}),
    }


class GeneratingModel(Protocol):
    """What `inferos.Model` gives."""

    def generate(self, prompt: str, max_tokens: int) -> Iterable[Token]:
        """Tokens as they come."""
        ...


class WatchedTokens:
    """Tokens passed through, the first one's time noted when it is given out. Made by `FTLMeasurement.watch`."""

    def __init__(
        self,
        tokens: Iterable[Token],
        clock: Callable[[], float],
        end: Callable[[RequestTimes], None],
        start: float | None = None,
    ) -> None:
        self._start = clock() if start is None else start
        self._tokens = iter(tokens)
        self._clock = clock
        self._end = end
        self._first: float | None = None
        self._count = 0
        self._over = False

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        """The next token."""
        try:
            token = next(self._tokens)
        except BaseException:
            self.close()
            raise
        self._count += 1
        if self._first is None:
            self._first = self._clock()
        return token

    def close(self) -> None:
        """The request is over. Closing twice does nothing."""
        if not self._over:
            self._over = True
            self._end(RequestTimes(self._start, self._clock(), self._count, self._first))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class FTLMeasurement:
    """First-token latency, from the request to the emission of its first token, as a reader sees it.

    Parameters
    ----------
    metrics : MetricsCalculator, optional
        Given every request that ends; it must have the same clock.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(self, metrics: MetricsCalculator | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._samples: deque[RequestTimes] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    @property
    def samples(self) -> tuple[RequestTimes, ...]:
        """The newest 1000 requests that ended, oldest first."""
        with self._lock:
            return tuple(self._samples)

    @property
    def latest_ms(self) -> float | None:
        """The newest first-token latency; None before the first."""
        stamped = [sample for sample in self.samples if sample.first_token_time is not None]
        return _first_token_ms(stamped[-1]) if stamped else None

    def watch(self, tokens: Iterable[Token]) -> WatchedTokens:
        """The tokens of a request that starts now, timed as they pass."""
        return WatchedTokens(tokens, self._clock, self._keep)

    def measure_generation(self, prompt: str, model: GeneratingModel, max_tokens: int = 100) -> dict[str, object]:
        """Generate and time it: `first_token_latency_ms` (None without a token), `total_latency_ms`, `response`."""
        kept: list[RequestTimes] = []

        def keep(request: RequestTimes) -> None:
            kept.append(request)
            self._keep(request)

        start = self._clock()
        watched = WatchedTokens(model.generate(prompt, max_tokens), self._clock, keep, start)
        text = "".join(token.text for token in watched)
        return {
            "first_token_latency_ms": _first_token_ms(kept[0]),
            "total_latency_ms": 1000 * (kept[0].end_time - kept[0].start_time),
            "response": text,
        }

    def _keep(self, request: RequestTimes) -> None:
        with self._lock:
            self._samples.append(request)
        if self._metrics is not None:
            self._metrics.record(request)


def _first_token_ms(request: RequestTimes) -> float | None:
    if request.first_token_time is None:
        return None
    return 1000 * (request.first_token_time - request.start_time)
