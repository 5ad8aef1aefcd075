"""A queue of requests before a batch: who joins when.

**Firing.** Requests wait for company, so that they are prefilled and decoded together. As soon as the batch has room,
those that wait join it at once if one of them is of class high, if they fill the room, if the one that came first has
waited `max_wait` seconds, or if the queue is being drained; a leftover that never fills a batch thus joins after
`max_wait`. Rows that decode are never interrupted: with a full batch even high waits till a row leaves.

**Order.** They join in the order of arrival + `aging` seconds for each class below high. So high is before medium and
medium before low, but a request is overtaken only by those that arrive within one or two `aging` periods after it:
nobody starves.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, Protocol, Self, TypeVar, Unpack

from inferos.errors import ClosedError, ConfigError, QueueFullError
from inferos.runtime.batch import MAX_ROWS, BatchDecoder, Row, RowSource
from inferos.runtime.generate import Generation
from inferos.runtime.prefixes import PrefixCaches
from inferos.runtime.prompts import DEFAULT_MAX_TOKENS, GenerateOptions, Prompt
from inferos.runtime.stop_texts import Token

if TYPE_CHECKING:
    from inferos.runtime.model import Model

__all__ = ["Clock", "Line", "Priority", "RequestQueue"]

T = TypeVar("T")

Priority = Literal["high", "medium", "low"]
CLASSES: tuple[Priority, ...] = ("high", "medium", "low")

MAX_WAIT = 0.1  # seconds
MAX_WAITING = 64  # requests
AGING = 1.0  # seconds


class Clock(Protocol):
    """Time, and waiting for it."""

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait till the condition, whose lock is held, is notified, or `seconds` are over; None is for ever."""


class _SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        condition.wait(seconds)


class Line(Generic[T]):
    """Requests that wait, in the order in which they join. Knows no time but what it is told, and no thread.

    Parameters
    ----------
    max_wait, aging : float
        Seconds.
    max_waiting : int
        Requests.
    """

    def __init__(self, *, max_wait: float = MAX_WAIT, max_waiting: int = MAX_WAITING, aging: float = AGING) -> None:
        self._max_wait = max_wait
        self._max_waiting = max_waiting
        self._aging = aging
        self._heap: list[tuple[float, int, float, Priority, T]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, row: T, priority: Priority, now: float) -> None:
        """Let a request wait.

        Raises
        ------
        QueueFullError
            If as many wait as may.
        """
        if len(self._heap) >= self._max_waiting:
            raise QueueFullError(f"submit: {len(self._heap)} requests wait already, the limit is {self._max_waiting}")
        due = now + CLASSES.index(priority) * self._aging
        heapq.heappush(self._heap, (due, next(self._numbers), now, priority, row))

    def seconds_to_fire(self, room: int, now: float) -> float | None:
        """0 if those that wait may join now; seconds until they may; None if time alone does not help."""
        if not self._heap or room <= 0:
            return None
        if len(self._heap) >= room or any(priority == "high" for _, _, _, priority, _ in self._heap):
            return 0.0
        return max(min(came for _, _, came, _, _ in self._heap) + self._max_wait - now, 0.0)

    def pop(self, room: int) -> list[T]:
        """Those that join, as many as there is room."""
        return [heapq.heappop(self._heap)[-1] for _ in range(min(room, len(self._heap)))]

    def discard(self, gone: Callable[[T], bool]) -> list[T]:
        """Take out the requests that are gone; they are returned."""
        taken = [entry[-1] for entry in self._heap if gone(entry[-1])]
        if taken:
            self._heap = [entry for entry in self._heap if not gone(entry[-1])]
            heapq.heapify(self._heap)
        return taken


class RequestQueue:
    """Requests of many threads, continued by one worker thread, up to `max_rows` together.

    Parameters
    ----------
    model : Model
    max_rows : int
        Rows decoded together.
    max_wait : float
        Seconds a request waits for company at most, while there is room.
    max_waiting : int
        Requests that may wait; a further one is refused.
    aging : float
        Seconds that a class is worth: see the module's text.
    clock : Clock
        Of the waiting.
    prefixes : PrefixCaches, optional
        Where a request's cache goes at its end, and may begin with one that lies there.

    Notes
    -----
    Thread-safe. Leaving the ``with`` block cancels what is left; call `drain` before to let it finish.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_rows: int = MAX_ROWS,
        max_wait: float = MAX_WAIT,
        max_waiting: int = MAX_WAITING,
        aging: float = AGING,
        clock: Clock | None = None,
        prefixes: PrefixCaches | None = None,
    ) -> None:
        for name, value in (("max_wait", max_wait), ("aging", aging)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name}: {value!r} is not a number of seconds of at least 0")
        if not isinstance(max_waiting, int) or isinstance(max_waiting, bool) or max_waiting < 1:
            raise ConfigError(f"max_waiting: {max_waiting!r} is not a whole number of at least 1")
        self._model = model
        self._decoder: BatchDecoder = model._decoder(max_rows)  # noqa: SLF001 - a part of Model
        self._line = Line[Row](max_wait=max_wait, max_waiting=max_waiting, aging=aging)
        self._clock: Clock = clock or _SystemClock()
        self._prefixes = prefixes
        self._changed = threading.Condition()  # over everything above; the worker holds it but while a step runs
        self._drainers = 0
        self._closed = False
        self._stepping = False
        self._worker: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait to join."""
        with self._changed:
            return len(self._line)

    @property
    def rows(self) -> int:
        """Requests that are being continued."""
        with self._changed:
            return self._decoder.rows

    @property
    def max_rows(self) -> int:
        """Requests continued together. May be changed while it runs, such as under memory pressure; those that are in
        stay till they end.
        """
        return self._decoder.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        with self._changed:
            self._decoder.max_rows = rows
            self._changed.notify_all()

    def submit(
        self,
        prompt: Prompt,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        priority: Priority = "medium",
        wake: Callable[[], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Queue a prompt.

        Parameters
        ----------
        prompt, max_tokens, options : as `Model.generate` with one prompt
        priority : high, medium or low
        wake : callable, optional
            Called by the thread that works, whenever `Generation.ready` may have something new. Must return at once.

        Returns
        -------
        Generation
            Its iterator waits for the tokens. Closing it, or dropping it, cancels the request, whether it waits or
            runs.

        Raises
        ------
        QueueFullError
            If as many requests wait as may.
        ClosedError
            If the queue or the model is closed.
        ConfigError, ContextError, ShapeError, TemplateError
            As `Model.generate`.
        """
        if priority not in CLASSES:
            raise ConfigError(f"priority: {priority!r} is not one of {', '.join(CLASSES)}")
        model = self._model
        row = model._begin(Row, model._clock, prompt, max_tokens, prefixes=self._prefixes, **options)  # noqa: SLF001
        row.wake = wake
        generation = Generation(RowSource(row, self))
        try:
            model._track(generation)  # noqa: SLF001
            self._push(row, priority)
        except BaseException:
            row.end()
            raise
        return generation

    def drain(self) -> None:
        """Let everything that waits join without waiting for company, and return when nothing waits or runs."""
        with self._changed:
            self._drainers += 1
            self._changed.notify_all()
            try:
                while not self._closed and (self._line or not self._decoder.idle or self._stepping):
                    self._changed.wait()
            finally:
                self._drainers -= 1

    def close(self) -> None:
        """Cancel what waits and runs, and end the worker after the step that is running. Closing twice does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        with self._changed:
            self._end()

    def next(self, row: Row) -> Token:
        """For a row's `Generation`."""
        with self._changed:
            while (token := row.take()) is None:
                self._changed.wait()
            return token

    def leave(self) -> None:
        """For a row's `Generation`."""
        with self._changed:
            self._let_go()
            self._changed.notify_all()

    def _push(self, row: Row, priority: Priority) -> None:
        with self._changed:
            if self._closed:
                raise ClosedError("RequestQueue: it is closed")
            self._line.push(row, priority, self._clock.now())
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="inferos queue", daemon=True)
                self._worker.start()
            self._changed.notify_all()

    def _work(self) -> None:
        with self._changed:
            try:
                while not self._closed:
                    self._turn()
            finally:
                self._closed = True  # also where a turn fails: nobody would serve what is submitted then
                self._end()

    def _turn(self) -> None:
        """Let those join that may; then move the batch on, or wait for something to do."""
        room = self._decoder.room
        seconds = self._line.seconds_to_fire(room, self._clock.now())
        if seconds is not None and (seconds == 0 or self._drainers):
            for row in self._line.pop(room):
                self._decoder.add(row)
        elif self._decoder.idle:
            self._clock.wait(self._changed, seconds)
            return
        self._stepping = True
        self._changed.release()
        try:
            self._decoder.step()
        finally:
            self._changed.acquire()
            self._stepping = False
            self._let_go()
            self._changed.notify_all()

    def _let_go(self) -> None:
        """End the requests that are being closed; while a step runs, only those that wait."""
        for row in self._line.discard(lambda row: row.loop.closing):
            row.end()
        if not self._stepping:
            self._decoder.sweep()

    def _end(self) -> None:
        for row in self._line.discard(lambda _row: True):
            row.end()
        self._decoder.stop()
        self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
