"""A decode loop under way: what came of it so far, and its end."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from typing import Protocol

from inferos.errors import BusyError, InferosError
from inferos.runtime.decode_loop import DecodeLoop, FinishReason, next_token
from inferos.runtime.stop_texts import Token

__all__ = ["Alone", "Run", "TokenSource"]


class Run:
    """One loop and its figures. Whoever drives the loop says what it gave out, and when it is over.

    Parameters
    ----------
    loop : DecodeLoop
    on_end : called once, with the error that ended it if one did; the cache still lives then
    clock : seconds, monotonic; stands still while nobody works on the run

    Attributes
    ----------
    steps : what the loop gives out and asks for
    tokens : int
        Tokens given out.
    text : str
    first_token_seconds : float or None
        From the beginning of the run to its first token.
    error : BaseException or None
        What ended it.
    ended : bool
    """

    def __init__(
        self,
        loop: DecodeLoop,
        on_end: Callable[[Run, BaseException | None], None],
        clock: Callable[[], float],
    ) -> None:
        self.loop = loop
        # The generator knows the loop but not this object: no cycle keeps a run that was dropped alive.
        self.steps = loop.steps()
        self.clock = clock
        self.tokens = 0
        self.first_token_seconds: float | None = None
        self.error: BaseException | None = None
        self.ended = False
        self._on_end = on_end
        self._text = io.StringIO()
        self._kv: tuple[int | None, int | None] = (None, None)

    @property
    def text(self) -> str:
        """The text given out so far."""
        return self._text.getvalue()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None before, and after an error."""
        return self.loop.reason

    def took(self, token: Token, seconds: float) -> None:
        """A token came, `seconds` after the run began."""
        if self.first_token_seconds is None:
            self.first_token_seconds = seconds
        self.tokens += 1
        self._text.write(token.text)

    def end(self, error: BaseException | None = None) -> None:
        """It is over: by itself, cancelled, or by an error. The figures stay. Ending twice does nothing."""
        if self.ended:
            return
        with contextlib.suppress(InferosError):  # tokens drawn ahead are taken back, unless the cache is gone
            self.steps.close()
        if error is None:
            self.loop.reason = self.loop.reason or "cancelled"
        self.error = error
        self._kv = self.kv()
        self.ended = True
        self._on_end(self, error)

    def kv(self) -> tuple[int | None, int | None]:
        """Bytes and values of its cache, now or at the end; None if they could not be read."""
        if self.ended:
            return self._kv
        sequence = self.loop.cached.sequence
        try:
            return sequence.kv_bytes, sequence.kv_elements
        except InferosError:  # closed under us: the figure is unknown
            return None, None


class TokenSource(Protocol):
    """Where a `Generation` takes its tokens from."""

    run: Run

    def next(self) -> Token:
        """The next token. Raises StopIteration at the end, and what ended the run if something failed."""
        ...

    def ready(self) -> list[Token]:
        """Tokens that can be taken at once."""
        ...

    def close(self) -> None:
        """End the run, at the latest after the step that is running."""


class Alone:
    """Drives one run, in the thread that asks for a token."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._busy_seconds = 0.0

    def next(self) -> Token:
        """The next token. Raises BusyError if another thread is inside."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("Generation: another thread is taking a token from it")
        try:
            return self._next()
        finally:
            self._lock.release()
            if self.run.loop.closing:
                self.close()

    def ready(self) -> list[Token]:
        """None: a run that is driven by who takes its tokens has none in stock."""
        return []

    def close(self) -> None:
        """End it. From another thread: it ends after the step that is running."""
        self.run.loop.closing = True
        if self._lock.acquire(blocking=False):
            try:
                self.run.end()
            finally:
                self._lock.release()

    def _next(self) -> Token:
        run = self.run
        began = run.clock()
        try:
            token = next_token(run.steps, run.loop.cached)
        except StopIteration:
            run.end()
            raise
        except BaseException as error:
            run.end(error)
            raise
        self._busy_seconds += run.clock() - began
        run.took(token, self._busy_seconds)
        return token
