"""A generation as its consumer sees it: an iterator of tokens with the figures of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from inferos.errors import BusyError, InferosError
from inferos.runtime.decode_loop import CachedTokens, DecodeLoop, FinishReason, Limits, next_token
from inferos.runtime.protocols import Ids
from inferos.runtime.sampler import Sampler
from inferos.runtime.stop_texts import Token
from inferos.runtime.tokenizer import TextStream

__all__ = ["Generation"]


class Generation:
    """An iterator of tokens as they come, and the figures of the run.

    Closing it, leaving its ``with`` block or setting the cancel event ends it. The figures stay.

    Attributes
    ----------
    prompt_tokens : int
        Tokens of the prompt, those found in the cache included.
    tokens : int
        Tokens given out.
    first_token_seconds : float or None
        From the first request to the first token given out, time outside the iterator not counted.
    seed : int
        With it the same options give the same tokens again.
    """

    def __init__(
        self,
        cached: CachedTokens,
        prompt: Ids,
        sampler: Sampler,
        limits: Limits,
        *,
        context_length: int,
        stream: TextStream | None = None,
        on_end: Callable[[Generation, BaseException | None], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._loop = DecodeLoop(cached, prompt, sampler, limits, context_length, stream, clock)
        # The generator knows the loop but not this object: no cycle keeps an iterator that was dropped alive.
        self._steps = self._loop.steps()
        self._on_end = on_end
        self._clock = clock
        self._busy_seconds = 0.0
        self._texts: list[str] = []
        self._kv: tuple[int | None, int | None] = (None, None)
        self.prompt_tokens = len(prompt)
        self.tokens = 0
        self.first_token_seconds: float | None = None
        self.seed = sampler.seed

    @property
    def text(self) -> str:
        """The text given out so far."""
        return "".join(self._texts)

    @property
    def finish_reason(self) -> FinishReason | None:
        """eos, stop (a stop text), length (max_tokens), context (it is full), budget (the KV budget is used up, and
        the policy's overflow is stop) or cancelled; None before the end.
        """
        return self._loop.reason

    @property
    def done(self) -> bool:
        """Whether it is over, in whatever way."""
        return self._ended

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache already."""
        return self._loop.cached_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Decode steps per second of decoding, prompt and consumer not counted; None before the first step."""
        loop = self._loop
        return loop.decode_steps / loop.decode_seconds if loop.decode_seconds > 0 else None

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of KV as the allocator counts them, now or at the end; None if they could not be read."""
        return self._kv_now()[0]

    @property
    def kv_elements(self) -> int | None:
        """K and V values in them."""
        return self._kv_now()[1]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        """The next token.

        Raises
        ------
        BusyError
            If another thread is inside.
        InferosError
            What failed in the step; the generation is over then.
        """
        if not self._lock.acquire(blocking=False):
            raise BusyError("Generation: another thread is taking a token from it")
        try:
            return self._next()
        finally:
            self._lock.release()
            if self._loop.closing:
                self.close()

    def close(self) -> None:
        """End it. From another thread: it ends after the step that is running."""
        self._loop.closing = True
        if self._lock.acquire(blocking=False):
            try:
                self._steps.close()
                self._end("cancelled", None)
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left with `break` frees its cache now, not at some later collection.
        if hasattr(self, "_steps"):
            self.close()

    def _next(self) -> Token:
        began = self._clock()
        try:
            token = next_token(self._steps, self._loop.cached)
        except StopIteration:
            self._end("cancelled", None)
            raise
        except BaseException as error:
            self._end(None, error)
            raise
        self._busy_seconds += self._clock() - began
        if self.first_token_seconds is None:
            self.first_token_seconds = self._busy_seconds
        self.tokens += 1
        self._texts.append(token.text)
        return token

    def _end(self, otherwise: FinishReason | None, error: BaseException | None) -> None:
        if self._ended:
            return
        self._loop.reason = self._loop.reason or otherwise
        self._kv = self._kv_now()
        self._ended = True
        if self._on_end is not None:
            self._on_end(self, error)

    def _kv_now(self) -> tuple[int | None, int | None]:
        if self._ended:
            return self._kv
        sequence = self._loop.cached.sequence
        try:
            return sequence.kv_bytes, sequence.kv_elements
        except InferosError:  # closed under us: the figure is unknown
            return None, None
