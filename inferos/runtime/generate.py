"""The decode loop: prompt in, tokens out, one committed step at a time.

A token is given out as soon as it is drawn, before it is fed. So at any moment the cache holds the prompt and every
token but the newest, and stopping anywhere leaves it usable. The sampler advances after the step that fed its token
was committed: if that step fails, the same token is drawn again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from inferos.errors import BudgetError, BusyError, ConfigError, InferosError, RewindError
from inferos.runtime.protocols import DecoderSession, Float32, Ids, TokenSequence
from inferos.runtime.sampler import Sampler
from inferos.runtime.tokenizer import TextStream

__all__ = ["CachedTokens", "Cancel", "FinishReason", "Generation", "Limits", "Token", "check_stops"]

MAX_STOPS = 64
MAX_STOP_LENGTH = 256

FinishReason = Literal["eos", "stop", "length", "context", "budget", "cancelled"]


class Cancel(Protocol):
    """Anything like `threading.Event`."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes
    ----------
    id : int
    text : str
        The text that became certain with it. Empty where a character is not whole yet; the joined texts are the text.
    logprob : float
        The model's log-probability of it, in nats, before any sampling option.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a generation ends: ids, texts, a number of tokens, an event, a KV budget that is used up."""

    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    cancel: Cancel | None = None
    budget_ends: bool = False


class CachedTokens:
    """A sequence together with the ids it holds.

    Parameters
    ----------
    session : DecoderSession
    prefill_chunk : int
        Tokens fed at once at most; between two chunks a generation can be cancelled.
    """

    def __init__(self, session: DecoderSession, prefill_chunk: int = 512) -> None:
        self._session = session
        self._chunk = prefill_chunk
        self.sequence: TokenSequence = session.sequence()
        self.ids: list[int] = []

    def align(self, ids: Sequence[int]) -> int:
        """Keep the longest common beginning with `ids`, but leave at least the last one to feed; its length.

        Where the cache cannot go back that far, it starts anew.
        """
        common = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        if common < len(self.ids):
            try:
                self.sequence.rewind(common)
            except RewindError:
                self.sequence.close()
                self.sequence = self._session.sequence()
                common = 0
            del self.ids[common:]
        return common

    def feed(self, ids: Sequence[int]) -> Float32:
        """Logits (vocab_size,) after the last id. A failure leaves what was there."""
        logits = self.sequence.feed(np.array(ids, dtype=np.int64))
        self.ids.extend(ids)
        return logits

    def chunks(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Pieces of a prompt to feed one by one."""
        for start in range(0, len(ids), self._chunk):
            yield ids[start : start + self._chunk]


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
        self._run = _Run(cached, prompt, sampler, limits, context_length, stream, clock)
        # The generator knows the run but not this object: no cycle keeps an iterator that was dropped alive.
        self._steps = self._run.steps()
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
        return self._run.reason

    @property
    def done(self) -> bool:
        """Whether it is over, in whatever way."""
        return self._ended

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache already."""
        return self._run.cached_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Decode steps per second of decoding, prompt and consumer not counted; None before the first step."""
        run = self._run
        return run.decode_steps / run.decode_seconds if run.decode_seconds > 0 else None

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
            if self._run.closing:
                self.close()

    def close(self) -> None:
        """End it. From another thread: it ends after the step that is running."""
        self._run.closing = True
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
            token = next(self._steps)
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
        self._run.reason = self._run.reason or otherwise
        self._kv = self._kv_now()
        self._ended = True
        if self._on_end is not None:
            self._on_end(self, error)

    def _kv_now(self) -> tuple[int | None, int | None]:
        if self._ended:
            return self._kv
        sequence = self._run.cached.sequence
        try:
            return sequence.kv_bytes, sequence.kv_elements
        except InferosError:  # closed under us: the figure is unknown
            return None, None


class _Run:
    """The state of a loop: everything but its iterator."""

    def __init__(
        self,
        cached: CachedTokens,
        prompt: Ids,
        sampler: Sampler,
        limits: Limits,
        context_length: int,
        stream: TextStream | None,
        clock: Callable[[], float],
    ) -> None:
        self.cached = cached
        self._prompt: list[int] = prompt.tolist()
        self._sampler = sampler
        self._limits = limits
        self._context_length = context_length
        self._stream = stream
        self._clock = clock
        self.closing = False
        self.reason: FinishReason | None = None
        self.cached_tokens = 0
        self.decode_seconds = 0.0
        self.decode_steps = 0

    def steps(self) -> Generator[Token, None, None]:
        """The tokens."""
        stream = self._stream
        tail = _Tail(self._limits.stops)
        logits = self._prefill()
        drawn, began = 0, None
        while logits is not None:
            choice = self._sampler.next(logits)
            if began is not None:
                self.decode_seconds += self._clock() - began
                self.decode_steps += 1
            if choice.id in self._limits.eos_ids:
                self.reason = "eos"
                break
            drawn += 1
            text = stream.push(choice.id) if stream is not None else ""
            pending = stream is not None and stream.pending
            yield from tail.add(Token(choice.id, text, choice.logprob), pending)
            self.reason = self._reason_after(tail, drawn)
            if self.reason is not None:
                break
            began = self._clock()
            logits = self._feed([choice.id])
            if logits is not None:
                self._sampler.accept(choice.id)
        if self.reason != "stop":
            yield from tail.flush(stream.flush() if stream is not None else "")

    def _prefill(self) -> Float32 | None:
        """Logits after the prompt, or None if cancelled on the way or out of budget."""
        self.cached_tokens = self.cached.align(self._prompt)
        self._sampler.observe(np.array(self._prompt, dtype=np.int64))
        logits = None
        for chunk in self.cached.chunks(self._prompt[self.cached_tokens :]):
            if self._cancelled():
                self.reason = "cancelled"
                return None
            logits = self._feed(chunk)
            if logits is None:
                break
        return logits

    def _feed(self, ids: Sequence[int]) -> Float32 | None:
        """Logits after the ids, or None where the budget ends the text; the cache holds what it held."""
        try:
            return self.cached.feed(ids)
        except BudgetError:
            if not self._limits.budget_ends:
                raise
            self.reason = "budget"
            return None

    def _reason_after(self, tail: _Tail, drawn: int) -> FinishReason | None:
        if tail.stopped:
            return "stop"
        if drawn >= self._limits.max_tokens:
            return "length"
        if len(self.cached.ids) >= self._context_length:
            return "context"
        return "cancelled" if self._cancelled() else None

    def _cancelled(self) -> bool:
        cancel = self._limits.cancel
        return self.closing or (cancel is not None and cancel.is_set())


class _Tail:
    """Tokens held back because their text may be the beginning of a stop text, or is not a whole character yet."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held: list[Token] = []
        self.stopped = False

    def add(self, token: Token, pending: bool) -> list[Token]:
        """Tokens that are certain now. `pending`: the text of the newest is not complete."""
        self._held.append(token)
        text = "".join(held.text for held in self._held)
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        certain = len(text) - self._ambiguous(text)
        ready, end = 0, 0
        for held in self._held:
            end += len(held.text)
            if end > certain:
                break
            ready += 1
        if pending:
            ready = min(ready, len(self._held) - 1)
        released, self._held = self._held[:ready], self._held[ready:]
        return released

    def flush(self, rest: str) -> list[Token]:
        """What is held at the end; `rest` is the text of the newest that was still missing."""
        released, self._held = self._held, []
        if released and rest:
            released[-1] = replace(released[-1], text=released[-1].text + rest)
        return released

    def _ambiguous(self, text: str) -> int:
        """Length of the longest end of `text` that a stop text begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _cut(self, place: int) -> list[Token]:
        """The held tokens with text before `place`, the last one shortened."""
        released, start = [], 0
        for held in self._held:
            if start >= place:
                break
            released.append(replace(held, text=held.text[: place - start]))
            start += len(held.text)
        self._held = []
        return released


def check_stops(stop: str | Sequence[Any]) -> tuple[str, ...]:
    """Stop texts as a tuple.

    Raises
    ------
    ConfigError
        If one is empty, longer than 256 characters or no text, or if there are more than 64.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise ConfigError(f"stop: {text!r} is not a text of 1..{MAX_STOP_LENGTH} characters")
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"stop: {len(stops)} texts are not within 0..{MAX_STOPS}")
    return stops
