"""Requests of HTTP clients, continued together by the queue's worker thread; the event loop only waits for tokens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from inferos.agent.problems import Problem
from inferos.errors import ClosedError, QueueFullError
from inferos.runtime.batch import MAX_ROWS
from inferos.runtime.generate import Generation
from inferos.runtime.metrics import MetricsCalculator, RequestTimes
from inferos.runtime.model import Model
from inferos.runtime.prefixes import PrefixCaches
from inferos.runtime.prompts import Prompt
from inferos.runtime.queue import MAX_WAITING, Priority, RequestQueue
from inferos.runtime.stop_texts import Token

__all__ = ["Answer", "InferenceService", "Statistics"]

# Company is waited for shortly: a person waits for the first token.
_MAX_WAIT = 0.005  # seconds
_CLASSES = {"high", "medium", "low"}


@dataclass(frozen=True, slots=True)
class Statistics:
    """The newest request that ended, and sums over all; None where unknown.

    Attributes
    ----------
    time_to_first_token : float or None
        Seconds, waiting in the queue included.
    tokens_per_second : float or None
        Of decoding.
    """

    time_to_first_token: float | None = None
    tokens_per_second: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cache_tokens: int | None = None
    input_tokens_total: int = 0
    output_tokens_total: int = 0
    cache_tokens_total: int = 0
    requests_total: int = 0


class Answer:
    """A request under way, as the event loop sees it.

    Attributes
    ----------
    created : seconds since 1970
    start_time, first_token_time : seconds of `time.monotonic`
        When it came, and when its first token was given out.
    """

    def __init__(self) -> None:
        self.created = int(time.time())
        self.start_time = time.monotonic()
        self.first_token_time: float | None = None
        self._loop = asyncio.get_running_loop()
        self._something = asyncio.Event()
        self._told = False
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        """Its figures."""
        if self._generation is None:
            raise ClosedError("Answer: it has not begun")
        return self._generation

    def wake(self) -> None:
        """There may be something new. Called by the worker thread."""
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def begun(self, generation: Generation) -> None:
        """The request is in the queue."""
        self._generation = generation

    def cancel(self) -> None:
        """Nobody wants the rest. Returns at once."""
        generation = self._generation
        if generation is not None and not generation.done:
            self._loop.run_in_executor(None, generation.close)  # may wait for the queue's lock

    async def tokens(self, ping_seconds: float) -> AsyncIterator[list[Token]]:
        """Tokens as they come; an empty list whenever none came for so long.

        Raises
        ------
        InferosError
            What ended the request, if something failed.
        """
        generation = self.generation
        while True:
            done = generation.done
            tokens = generation.ready()
            if tokens:
                if self.first_token_time is None:
                    self.first_token_time = time.monotonic()
                yield tokens
                continue
            if done:
                break
            self._something.clear()
            try:
                await asyncio.wait_for(self._something.wait(), ping_seconds)
            except TimeoutError:
                yield []
        if generation.error is not None:
            raise generation.error

    def _wake(self) -> None:
        self._told = False
        self._something.set()


@dataclass(slots=True)
class _Serving:
    """A model with its queue."""

    model: Model
    queue: RequestQueue
    prefixes: PrefixCaches
    metrics: MetricsCalculator | None


@dataclass(slots=True)
class InferenceService:
    """One model for all HTTP clients.

    Parameters
    ----------
    name : str
        By which clients know the model.
    max_rows : int
        Requests decoded together.
    max_waiting : int
        Requests that may wait; further ones are told to come again.
    default_tokens : int or None
        Tokens of an answer whose request does not say; None is what the context holds.
    created : seconds since 1970, for the list of models
    """

    name: str
    max_rows: int = MAX_ROWS
    max_waiting: int = MAX_WAITING
    default_tokens: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _serving: _Serving | None = None
    _statistics: Statistics = field(default_factory=Statistics)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def start(self, model: Model, metrics: MetricsCalculator | None = None) -> None:
        """Serve a model that is loaded; `metrics` is given every request that ended."""
        prefixes = PrefixCaches(version=lambda: model.policies.current.version)
        queue = RequestQueue(
            model, max_rows=self.max_rows, max_wait=_MAX_WAIT, max_waiting=self.max_waiting, prefixes=prefixes
        )
        self._serving = _Serving(model, queue, prefixes, metrics)

    def close(self) -> None:
        """Cancel what waits and runs, and free the caches. The model is left open."""
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.queue.close()
            serving.prefixes.close()

    @property
    def model(self) -> Model:
        """The model. Raises Problem 503 before it is loaded."""
        return self._ready().model

    @property
    def loaded(self) -> bool:
        """Whether there is a model."""
        return self._serving is not None

    @property
    def statistics(self) -> Statistics:
        """Figures of the requests that ended."""
        return self._statistics

    @property
    def prefix_hit_rate(self) -> float | None:
        """Prompt tokens found in kept caches over all prompt tokens; None before the first request ended."""
        total = self._statistics
        return total.cache_tokens_total / total.input_tokens_total if total.input_tokens_total else None

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return 0 if self._serving is None else self._serving.queue.waiting

    @property
    def running(self) -> int:
        """Requests that are being continued."""
        return 0 if self._serving is None else self._serving.queue.rows

    def forget(self) -> None:
        """Free the caches of chats that are not being continued."""
        if self._serving is not None:
            while self._serving.prefixes.release():
                pass

    def check_name(self, name: str | None) -> None:
        """Refuse another model's name with a Problem 404."""
        if name is not None and name != self.name:
            raise Problem(404, "Model not found", f"this server has one model, {self.name}")

    async def submit(self, prompt: Prompt, max_tokens: int | None, *, priority: str | None, **options: Any) -> Answer:
        """Queue a prompt.

        Raises
        ------
        Problem
            503 with Retry-After before the model is loaded.
        InferosError
            As `RequestQueue.submit`.
        """
        serving = self._ready()
        chosen = _class(priority)
        if serving.queue.waiting >= self.max_waiting:  # before the work of tokenising
            raise QueueFullError(f"submit: {self.max_waiting} requests wait already")
        answer = Answer()
        most = max_tokens if max_tokens is not None else self.default_tokens or serving.model.context_length

        def begin() -> Generation:
            return serving.queue.submit(prompt, most, priority=chosen, wake=answer.wake, **options)

        answer.begun(await asyncio.to_thread(begin))
        return answer

    def ended(self, answer: Answer) -> None:
        """Count a request that is over."""
        generation = answer.generation
        metrics = None if self._serving is None else self._serving.metrics
        if metrics is not None and generation.error is None:
            metrics.record(
                RequestTimes(answer.start_time, time.monotonic(), generation.tokens, answer.first_token_time)
            )
        with self._counting:
            before = self._statistics
            self._statistics = Statistics(
                generation.first_token_seconds,
                generation.tokens_per_second,
                generation.prompt_tokens,
                generation.tokens,
                generation.prompt_tokens,
                generation.cached_tokens,
                before.input_tokens_total + generation.prompt_tokens,
                before.output_tokens_total + generation.tokens,
                before.cache_tokens_total + generation.cached_tokens,
                before.requests_total + 1,
            )

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise Problem(503, "Not ready", "the model is being loaded", [(b"retry-after", b"1")])
        return self._serving


def _class(priority: str | None) -> Priority:
    if priority is None:
        return "medium"
    if priority not in _CLASSES:
        raise Problem(400, "Invalid request", "priority: wanted high, medium or low")
    return priority  # type: ignore[return-value]
