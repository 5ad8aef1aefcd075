"""A generation as its consumer sees it: an iterator of tokens with the figures of the run."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from inferos.runtime.decode_loop import FinishReason
from inferos.runtime.run import TokenSource
from inferos.runtime.stop_texts import Token

__all__ = ["Generation"]


class Generation:
    """An iterator of tokens as they come, and the figures of the run.

    Closing it, leaving its ``with`` block or setting the cancel event ends it. The figures stay.
    """

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._run = source.run

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, those found in the cache included."""
        return self._run.loop.prompt_tokens

    @property
    def tokens(self) -> int:
        """Tokens generated; of a generation that runs alone, those given out."""
        return self._run.tokens

    @property
    def text(self) -> str:
        """Their text."""
        return self._run.text

    @property
    def seed(self) -> int:
        """With it the same options give the same tokens again."""
        return self._run.loop.seed

    @property
    def finish_reason(self) -> FinishReason | None:
        """eos, stop (a stop text), length (max_tokens), context (it is full), budget (the KV budget is used up, and
        the policy's overflow is stop) or cancelled; None before the end.
        """
        return self._run.finish_reason

    @property
    def error(self) -> BaseException | None:
        """What failed and ended it; None otherwise."""
        return self._run.error

    @property
    def done(self) -> bool:
        """Whether it is over, in whatever way."""
        return self._run.ended

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache already."""
        return self._run.loop.cached_tokens

    @property
    def first_token_seconds(self) -> float | None:
        """From the first request to the first token given out, time outside the iterator not counted."""
        return self._run.first_token_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of decoding, prompt and consumer not counted; None before the first step."""
        loop = self._run.loop
        return loop.decode_tokens / loop.decode_seconds if loop.decode_seconds > 0 else None

    @property
    def accept_rate(self) -> float | None:
        """Share of drafted tokens that were right, over the last 50 drafts; None without speculation or a draft."""
        gate = self._run.loop.speculation
        return gate.accept_rate if gate is not None else None

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of KV as the allocator counts them, now or at the end; None if they could not be read."""
        return self._run.kv()[0]

    @property
    def kv_elements(self) -> int | None:
        """K and V values in them."""
        return self._run.kv()[1]

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
        return self._source.next()

    def ready(self) -> list[Token]:
        """Tokens that can be taken without waiting, of a request that a queue continues; no error is raised.

        Look at `done` before: where it is True and nothing is ready, nothing comes any more.
        """
        return self._source.ready()

    def close(self) -> None:
        """End it. From another thread: it ends after the step that is running."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left with `break` frees its cache now, not at some later collection.
        if hasattr(self, "_source"):
            self.close()
