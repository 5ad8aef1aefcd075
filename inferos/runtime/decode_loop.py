"""The decode loop: prompt in, tokens out, one committed step at a time.

A token is given out as soon as it is drawn, before it is fed. So at any moment the cache holds the prompt and every
token but the newest, and stopping anywhere leaves it usable. The sampler advances after the step that fed its token
was committed: if that step fails, the same token is drawn again.

The loop runs no model. It asks for what it needs, and whoever drives it answers: one sequence at a time
(`next_token`), or many in one step (`inferos.runtime.batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from inferos.errors import BudgetError, RewindError
from inferos.runtime.protocols import DecoderSession, Float32, Ids, TokenSequence
from inferos.runtime.sampler import Choice, Sampler
from inferos.runtime.speculation import SpeculationGate
from inferos.runtime.stop_texts import StopTail, Token
from inferos.runtime.tokenizer import TextStream

__all__ = ["CachedTokens", "Cancel", "DecodeLoop", "Feed", "FinishReason", "Limits", "Steps", "next_token"]

FinishReason = Literal["eos", "stop", "length", "context", "budget", "cancelled"]


class Cancel(Protocol):
    """Anything like `threading.Event`."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a generation ends: ids, texts, a number of tokens, an event, a KV budget that is used up."""

    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    cancel: Cancel | None = None
    budget_ends: bool = False


class Feed(NamedTuple):
    """What a loop asks for: feed ids and send the logits back, or throw into the loop what failed.

    Attributes
    ----------
    ids : (tokens,)
    all_logits : bool
        Logits (tokens, vocab_size) after each id; otherwise (vocab_size,) after the last.
    """

    ids: Sequence[int]
    all_logits: bool = False


Steps = Generator[Token | Feed, Any, None]
"""What a loop gives out and asks for; it is sent the logits (float32) of a `Feed`, and None after a `Token`."""


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
        self._one = np.zeros(1, np.int64)

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

    def feed(self, asked: Feed) -> Float32:
        """The logits that a loop asks for. A failure leaves what was there."""
        if len(asked.ids) == 1:
            ids = self._one
            ids[0] = asked.ids[0]
        else:
            ids = np.array(asked.ids, dtype=np.int64)
        logits = self.sequence.feed_all(ids) if asked.all_logits else self.sequence.feed(ids)
        self.ids.extend(asked.ids)
        return logits

    def take_back(self, tokens: int) -> None:
        """Forget the newest tokens; 16 are possible at any time."""
        if tokens:
            self.sequence.rewind(len(self.ids) - tokens)
            del self.ids[-tokens:]

    def chunks(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Pieces of a prompt to feed one by one."""
        for start in range(0, len(ids), self._chunk):
            yield ids[start : start + self._chunk]


class DecodeLoop:
    """The state of a loop: everything but its iterator.

    Parameters
    ----------
    cached : CachedTokens
        What the loop takes to be in the cache; whoever answers a `Feed` keeps it true.
    prompt : (tokens,)
    sampler, limits : how tokens are chosen, and where they end
    context_length : int
        Tokens at most.
    stream : TextStream, optional
        Makes text of the tokens.
    clock : seconds, monotonic

    Attributes
    ----------
    closing : bool
        Set to end it as if cancelled, at its next look.
    reason : FinishReason or None
    prompt_tokens : int
    cached_tokens : int
        Those found in the cache.
    seed : int
    speculation : SpeculationGate or None
        Where it is given, drafts are checked along with the newest token.
    decode_tokens, decode_seconds : tokens of the steps behind the prompt, and what they took from asking to drawing
    """

    def __init__(
        self,
        cached: CachedTokens,
        prompt: Ids,
        sampler: Sampler,
        limits: Limits,
        context_length: int,
        stream: TextStream | None,
        clock: Callable[[], float],
        speculation: SpeculationGate | None = None,
    ) -> None:
        self.cached = cached
        self.speculation = speculation
        self._prompt: list[int] = prompt.tolist()
        self._sampler = sampler
        self._limits = limits
        self._context_length = context_length
        self._stream = stream
        self._clock = clock
        self.closing = False
        self.reason: FinishReason | None = None
        self.prompt_tokens = len(prompt)
        self.cached_tokens = 0
        self.seed = sampler.seed
        self._newest_id = [0]
        self._newest = Feed(self._newest_id)  # asked again and again: a step makes no objects that it can do without
        self.decode_seconds = 0.0
        self.decode_tokens = 0

    def steps(self) -> Steps:
        """The tokens, and what is needed on the way to them.

        An error thrown in as the answer to a `Feed` comes out again, unless it is the budget and that ends the text.
        """
        stream = self._stream
        tail = StopTail(self._limits.stops)
        logits = yield from self._prefill()
        drawn, choices = 0, [] if logits is None else [self._sampler.next(logits)]
        try:
            while choices:
                choice = choices.pop(0)
                if choice.id in self._limits.eos_ids:
                    self.reason = "eos"
                    break
                drawn += 1
                text = stream.push(choice.id) if stream is not None else ""
                token = Token(choice.id, text, choice.logprob)
                pending = stream is not None and stream.pending
                if pending or tail.holds_back:
                    yield from tail.add(token, pending)
                else:
                    yield token
                self.reason = self._reason_after(tail, drawn, len(choices))
                if self.reason is not None:
                    break
                if choices:
                    continue
                began = self._clock()
                if self.speculation is not None:
                    choices = yield from self._guess(choice.id, self._limits.max_tokens - drawn)
                if not choices:
                    self._newest_id[0] = choice.id
                    try:
                        logits = yield self._newest
                    except BudgetError as error:
                        self._out_of_budget(error)
                        break
                    self._sampler.accept(choice.id)
                    choices.append(self._sampler.next(logits))
                self.decode_seconds += self._clock() - began
                self.decode_tokens += len(choices)
            if self.reason != "stop":
                yield from tail.flush(stream.flush() if stream is not None else "")
        finally:
            # Of tokens drawn ahead and not given out all but the last are fed, and so is the newest one given out.
            self.cached.take_back(len(choices))

    def _guess(self, id: int, left: int) -> Generator[Feed, Any, list[Choice]]:
        """What a draft behind the newest token gives; nothing where there is none, or the budget has no room for it.

        All but the last of the choices are fed, and the sampler has accepted them.
        """
        gate = self.speculation
        if gate is None:
            return []
        gate.push([id])
        draft = gate.draft(min(left, self._context_length - len(self.cached.ids)) - 1)
        return (yield from self._check(id, draft, gate)) if draft else []

    def _check(self, id: int, draft: list[int], gate: SpeculationGate) -> Generator[Feed, Any, list[Choice]]:
        try:
            rows: Float32 = yield Feed([id, *draft], all_logits=True)
        except BudgetError:
            return []
        sampler, choices = self._sampler, []
        sampler.accept(id)
        for row, guess in zip(rows, [*draft, None], strict=True):
            choices.append(sampler.next(row))
            drawn = choices[-1].id
            if drawn != guess or drawn in self._limits.eos_ids:
                break
            sampler.accept(drawn)
        accepted = len(choices) - 1
        self.cached.take_back(len(draft) - accepted)
        gate.push(draft[:accepted])
        gate.checked(len(draft), accepted)
        return choices

    def _prefill(self) -> Generator[Feed, Any, Float32 | None]:
        """Logits after the prompt, or None if cancelled on the way or out of budget."""
        self.cached_tokens = self.cached.align(self._prompt)
        self._sampler.observe(np.array(self._prompt, dtype=np.int64))
        if self.speculation is not None:
            self.speculation.push(self._prompt)
        logits = None
        for chunk in self.cached.chunks(self._prompt[self.cached_tokens :]):
            if self._cancelled():
                self.reason = "cancelled"
                return None
            logits = yield from self._feed(chunk)
            if logits is None:
                break
        return logits

    def _feed(self, ids: Sequence[int]) -> Generator[Feed, Any, Float32 | None]:
        """Logits after the ids, or None where the budget ends the text; the cache holds what it held."""
        try:
            logits: Float32 = yield Feed(ids)
        except BudgetError as error:
            self._out_of_budget(error)
            return None
        return logits

    def _out_of_budget(self, error: BudgetError) -> None:
        """End the text, where the budget does; else the error goes on."""
        if not self._limits.budget_ends:
            raise error
        self.reason = "budget"

    def _reason_after(self, tail: StopTail, drawn: int, ahead: int) -> FinishReason | None:
        if tail.stopped:
            return "stop"
        if drawn >= self._limits.max_tokens:
            return "length"
        if not ahead and len(self.cached.ids) >= self._context_length:
            return "context"
        return "cancelled" if self._cancelled() else None

    def _cancelled(self) -> bool:
        cancel = self._limits.cancel
        return self.closing or (cancel is not None and cancel.is_set())


def next_token(steps: Steps, cached: CachedTokens) -> Token:
    """The next token of a loop that is driven alone. Raises StopIteration at its end."""
    item = next(steps)
    while isinstance(item, Feed):
        try:
            logits = cached.feed(item)
        except BaseException as error:  # noqa: BLE001 - the loop decides
            item = steps.throw(error)
        else:
            item = steps.send(logits)
    return item
