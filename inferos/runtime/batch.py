"""Several sequences through one session: rows that are decoded together, and join and leave while others go on.

One step of a `BatchDecoder` feeds one token of every row that decodes, in one run of the model, and after that pieces
of the prompts of rows that wait for their first token, one row after the other, as many as one prefill chunk holds (at
least one). So a long prompt never holds the others up for longer than a chunk takes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, Unpack

import numpy as np

from inferos.errors import ConfigError, InferosError, ProviderError
from inferos.runtime.decode_loop import DecodeLoop, Feed
from inferos.runtime.generate import Generation
from inferos.runtime.prompts import DEFAULT_MAX_TOKENS, GenerateOptions, Prompt
from inferos.runtime.protocols import DecoderSession, Float32
from inferos.runtime.run import Run
from inferos.runtime.sampler import MAX_SEED
from inferos.runtime.stop_texts import Token

if TYPE_CHECKING:
    from inferos.runtime.model import Model

__all__ = ["Batch", "BatchDecoder", "Driver", "Row", "RowSource", "Stopwatch"]

MAX_ROWS = 8


class Stopwatch:
    """A clock that runs only while work is done: seconds since it was made, pauses left out.

    Parameters
    ----------
    clock : seconds, monotonic
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._before = 0.0
        self._began: float | None = None

    def __call__(self) -> float:
        """Seconds of work so far."""
        began = self._began  # once: another thread may be working
        return self._before + (self._clock() - began if began is not None else 0.0)

    def __enter__(self) -> Self:
        self._began = self._clock()
        return self

    def __exit__(self, *_error: object) -> None:
        self._before, self._began = self(), None


class Row(Run):
    """A run in a batch.

    Attributes
    ----------
    asked : Feed or None
        What its loop waits for; None before the first step and after the end.
    out : tokens nobody has taken yet, oldest first
    wake : called when `out` has something new, and at the end; or None
    """

    def __init__(
        self, loop: DecodeLoop, on_end: Callable[[Run, BaseException | None], None], clock: Callable[[], float]
    ) -> None:
        super().__init__(loop, on_end, clock)
        self.asked: Feed | None = None
        self.out: deque[Token] = deque()
        self.wake: Callable[[], None] | None = None
        self._joined = clock()
        self._told = False

    @property
    def decodes(self) -> bool:
        """Whether it waits for one token to be fed."""
        return self.asked is not None and len(self.asked.ids) == 1 and not self.asked.all_logits

    @property
    def checks(self) -> bool:
        """Whether it waits for a draft to be fed, after which every logit counts: a run of its own."""
        return self.asked is not None and self.asked.all_logits

    def begin(self) -> None:
        """Run the loop to its first request."""
        self._go(self.steps.send, None)

    def answer(self, logits: Float32) -> None:
        """Give the loop the logits it asked for; it runs to its next request or its end."""
        self._go(self.steps.send, logits)

    def fail(self, error: Exception) -> None:
        """Tell the loop that its request failed."""
        self._go(self.steps.throw, error)

    def feed_alone(self) -> None:
        """Answer the request with a run of the model for this row only."""
        if self.asked is None:
            return
        try:
            logits = self.loop.cached.feed(self.asked)
        except Exception as error:  # noqa: BLE001 - the loop decides
            self.fail(error)
        else:
            self.answer(logits)

    def take(self) -> Token | None:
        """The oldest token that nobody took; None if there is none yet.

        Raises StopIteration where none comes any more, but what failed first, if something did.
        """
        ended = self.ended  # before looking for a token: what comes from another thread comes before the end
        token = self.pop()
        if token is not None or not ended:
            return token
        self.raise_error()
        raise StopIteration

    def pop(self) -> Token | None:
        """The oldest token that nobody took, if there is one. Of a row that was closed nobody wants any."""
        return self.out.popleft() if self.out and not self.loop.closing else None

    def raise_error(self) -> None:
        """Raise what ended it, if something failed and it was not raised before."""
        if self.error is not None and not self._told:
            self._told = True
            raise self.error

    def _go(self, resume: Callable[[Any], Token | Feed], value: Any) -> None:
        self.asked = None
        try:
            item = resume(value)
            while isinstance(item, Token):
                self.took(item, self.clock() - self._joined)
                self.out.append(item)
                item = next(self.steps)
        except StopIteration:
            self.end()
        except Exception as error:  # noqa: BLE001 - this row's alone, and kept for whoever reads it
            self.end(error)
        else:
            self.asked = item
            if self.out and self.wake is not None:
                self.wake()

    def end(self, error: BaseException | None = None) -> None:
        """As any run; who waits is told."""
        super().end(error)
        if self.wake is not None:
            self.wake()


class BatchDecoder:
    """Owns the loop of a batch: rows are added, every `step` moves all of them on, rows that end leave.

    A row ends alone: its error, be it the budget, its context or its sampler, is kept in `Row.error`. A step commits
    all rows or none. Where one fails for a reason that lies in a row, its rows are fed one by one, once, and those
    that fail again leave; what fails in the model itself ends every row of the step.

    Parameters
    ----------
    session : DecoderSession
    max_rows : int
        Rows decoded together; further ones wait till a row leaves, first come first served.
    prefill_tokens : int
        Tokens of prompts fed in one step at most, unless one piece alone is longer.
    clock : seconds, monotonic

    Attributes
    ----------
    seconds : Stopwatch
        The time spent in steps: the clock of the rows.
    decode_tokens, decode_seconds : tokens of rows that decoded, and what their feeding and drawing took

    Notes
    -----
    One thread at a time.
    """

    def __init__(
        self,
        session: DecoderSession,
        *,
        max_rows: int = MAX_ROWS,
        prefill_tokens: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._session = session
        self._prefill_tokens = prefill_tokens
        self.max_rows = max_rows
        self.seconds = Stopwatch(clock)
        self.decode_tokens = 0
        self.decode_seconds = 0.0
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()

    @property
    def max_rows(self) -> int:
        """Rows decoded together. May be changed at any time; rows that are in stay till they end."""
        return self._max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ConfigError(f"max_rows: {rows!r} is not a whole number of at least 1")
        self._max_rows = rows

    @property
    def rows(self) -> int:
        """Rows that are decoded or prefilled now."""
        return len(self._rows)

    @property
    def room(self) -> int:
        """Rows that could join at once."""
        return max(self.max_rows - len(self._rows) - len(self._waiting), 0)

    @property
    def idle(self) -> bool:
        """Whether no row is left."""
        return not self._rows and not self._waiting

    def add(self, row: Row) -> None:
        """Let a row join at the next step that has room for it."""
        self._waiting.append(row)

    def step(self) -> bool:
        """Move every row on: one token fed, or a piece of its prompt. False if there was no row."""
        if self.idle:
            return False
        try:
            with self.seconds:
                self._step()
        except BaseException:  # no failed step, but Ctrl-C or the like: nobody knows who was fed
            self.stop()
            raise
        return True

    def sweep(self) -> None:
        """Let rows go that have ended or are being closed."""
        for row in (*self._rows, *self._waiting):
            if row.loop.closing:
                row.end()
        self._rows = [row for row in self._rows if not row.ended]
        if any(row.ended for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if not row.ended)

    def stop(self, error: BaseException | None = None) -> None:
        """End every row."""
        for row in (*self._rows, *self._waiting):
            row.end(error)
        self.sweep()

    def _step(self) -> None:
        self._admit()
        decoding = [row for row in self._rows if row.decodes]
        checking = [row for row in self._rows if row.checks]
        prompts = [row for row in self._rows if not row.decodes and not row.checks]
        if decoding or checking:
            loops = [row.loop for row in (*decoding, *checking)]
            began, before = self.seconds(), sum(loop.decode_tokens for loop in loops)
            self._decode(decoding)
            for row in checking:
                row.feed_alone()
            self.decode_seconds += self.seconds() - began
            self.decode_tokens += sum(loop.decode_tokens for loop in loops) - before
        self._feed_pieces(prompts)
        self.sweep()

    def _admit(self) -> None:
        self.sweep()
        while self._waiting and len(self._rows) < self.max_rows:
            row = self._waiting.popleft()
            self._rows.append(row)
            row.begin()

    def _decode(self, rows: Sequence[Row]) -> None:
        if len(rows) < 2:
            for row in rows:
                row.feed_alone()
            return
        ids = np.array([row.asked.ids[0] for row in rows if row.asked is not None], dtype=np.int64)
        try:
            logits = self._session.step([row.loop.cached.sequence for row in rows], ids)
        except ProviderError as error:
            for row in rows:
                row.fail(error)
        except InferosError:
            for row in rows:
                row.feed_alone()
        except Exception as error:  # noqa: BLE001 - every loop decides
            for row in rows:
                row.fail(error)
        else:
            for row, token, own in zip(rows, ids.tolist(), logits, strict=True):
                row.loop.cached.ids.append(token)
                row.answer(own)

    def _feed_pieces(self, rows: Sequence[Row]) -> None:
        """Prompts, of the row that came first before the others', until the tokens of a step are spent."""
        left = self._prefill_tokens
        for row in rows:
            while row.asked is not None and not row.decodes and not row.checks and left > 0:
                left -= len(row.asked.ids)
                row.feed_alone()


class Driver(Protocol):
    """Who steps the batch that a row is in."""

    def next(self, row: Row) -> Token:
        """The next token of a row. Raises StopIteration at its end, and what failed if something did."""
        ...

    def leave(self) -> None:
        """Let rows go whose loops are closing, at the latest after the step that is running."""


class RowSource:
    """A row as the source of a `Generation`."""

    def __init__(self, row: Row, driver: Driver) -> None:
        self.run: Run = row
        self._row = row
        self._driver = driver

    def next(self) -> Token:
        """The next token; the other rows of the batch move on as well, and keep theirs."""
        return self._driver.next(self._row)

    def ready(self) -> list[Token]:
        """Tokens that nobody took yet."""
        tokens = []
        while (token := self._row.pop()) is not None:
            tokens.append(token)
        return tokens

    def close(self) -> None:
        """Let the row leave, at the latest after the step that is running."""
        self._row.loop.closing = True
        self._driver.leave()


class _Together:
    """Steps a batch in the thread that wants a token; others wait till that step is done."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder
        self._lock = threading.Lock()
        self._left = False

    def add(self, row: Row) -> None:
        with self._lock:
            self.decoder.add(row)

    def next(self, row: Row) -> Token:
        try:
            with self._lock:
                while (token := row.take()) is None:
                    self.decoder.step()
                return token
        finally:
            self._let_go()

    def step(self) -> bool:
        try:
            with self._lock:
                return self.decoder.step()
        finally:
            self._let_go()

    def pop(self, row: Row) -> Token | None:
        with self._lock:
            return row.pop()

    def leave(self) -> None:
        self._left = True
        self._let_go()

    def _let_go(self) -> None:
        """End the rows that are being closed, unless a step runs: then who runs it does so afterwards."""
        while self._left and self._lock.acquire(blocking=False):
            try:
                self._left = False
                self.decoder.sweep()
            finally:
                self._lock.release()


class Batch:
    """Prompts that are continued together: made by `Model.generate` of a list of prompts, or by `Model.batch`.

    Iterating over it gives pairs (number of the row, `Token`) as they come, until every row has ended; if rows failed,
    the first one's error is raised then. A row can be iterated singly as well: the others move on with it and keep
    their tokens. Closing it, or leaving its ``with`` block, ends every row.
    """

    def __init__(self, model: Model, decoder: BatchDecoder) -> None:
        self._model = model
        self._together = _Together(decoder)
        self._rows: list[Row] = []
        self._generations: list[Generation] = []

    @property
    def rows(self) -> tuple[Generation, ...]:
        """The rows, in the order they were added; those that ended too."""
        return tuple(self._generations)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all rows per second of decoding, prompts and consumer not counted; None before the first step."""
        decoder = self._together.decoder
        return decoder.decode_tokens / decoder.decode_seconds if decoder.decode_seconds > 0 else None

    def add(
        self, prompt: Prompt, max_tokens: int = DEFAULT_MAX_TOKENS, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """One more row, with options of its own. It joins at the next step that has room for it.

        Parameters, errors : as `Model.generate` with one prompt
        """
        row = self._model._begin(Row, self._together.decoder.seconds, prompt, max_tokens, **options)  # noqa: SLF001
        generation = Generation(RowSource(row, self._together))
        try:
            self._model._track(generation)  # noqa: SLF001
        except BaseException:
            row.end()
            raise
        self._together.add(row)
        self._rows.append(row)
        self._generations.append(generation)
        return generation

    def add_all(
        self, prompts: Sequence[Prompt], max_tokens: int = DEFAULT_MAX_TOKENS, **options: Unpack[GenerateOptions]
    ) -> None:
        """Several rows with the same options, or none if one of them is refused; number i draws with seed + i."""
        first = options.get("seed")
        added = []
        try:
            for number, prompt in enumerate(prompts):
                if isinstance(first, int):
                    options["seed"] = (first + number) & MAX_SEED
                added.append(self.add(prompt, max_tokens, **options))
        except BaseException:
            for row in added:
                row.close()
            raise

    def close(self) -> None:
        """End every row. Closing twice does nothing."""
        for generation in self._generations:
            generation.close()

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        going = True
        while going:
            going = self._together.step()
            for number, row in enumerate(self._rows):
                while (token := self._together.pop(row)) is not None:
                    yield number, token
        for row in self._rows:
            row.raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
