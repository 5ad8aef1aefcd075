"""A conversation that keeps its cache between turns."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from inferos.errors import BusyError, ClosedError
from inferos.runtime.chat import Message, check_messages
from inferos.runtime.decode_loop import CachedTokens
from inferos.runtime.generate import Generation
from inferos.runtime.run import Run

if TYPE_CHECKING:
    from inferos.runtime.model import Model

__all__ = ["Conversation"]


class Conversation:
    """Turns with one cache: what a turn shares with the one before is not computed again.

    Made by `Model.chat`. One thread at a time.
    """

    def __init__(self, model: Model, system: str | None, options: Mapping[str, Any]) -> None:
        self._model = model
        self._options = dict(options)
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._cached: CachedTokens | None = None
        # Weak: the generation holds the conversation, for its answer.
        self._running: weakref.ref[Generation] | None = None
        self._closed = False

    @property
    def messages(self) -> list[Message]:
        """A copy of what was said, the answers included."""
        return list(self._messages)

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached.ids) if self._cached is not None else 0

    def send(self, content: str | Message | Sequence[Message], **options: Any) -> Generation:
        """Say something; the answer comes as a generation.

        A generation that is not finished is closed first, and what it gave counts as its answer. If it gave
        nothing, the answer fails or the messages do not fit, the conversation is as it was before.

        Parameters
        ----------
        content : the user's text, a message, or several (such as tool results)
        options : as of `Model.generate`, for this turn

        Raises
        ------
        ClosedError
            If the conversation or its model is closed.
        BusyError
            If another thread is inside the answer before.
        ConfigError, ContextError, TemplateError
            As `Model.generate`.
        """
        if self._closed:
            raise ClosedError("Conversation: it is closed")
        if not self._finish():
            raise BusyError("Conversation: another thread is taking an answer from it")
        model, before = self._model, list(self._messages)
        chosen = {**self._options, **options}
        tools = chosen.pop("tools", None)
        prepared = model._prepare(True, **chosen)  # noqa: SLF001 - a part of Model
        messages = [*before, *_as_messages(content)]
        ids = model.prompt_ids(messages, tools=tools)
        if self._cached is None:
            self._cached = model._cache()  # noqa: SLF001
        self._messages = messages

        def end(run: Run, error: BaseException | None) -> None:
            if error is not None or (run.tokens == 0 and run.finish_reason in ("cancelled", "budget")):
                self._messages = before
            else:
                self._messages.append({"role": "assistant", "content": run.text})
            if self._closed and self._cached is not None:
                self._cached.sequence.close()

        generation = model._start(self._cached, ids, prepared, end)  # noqa: SLF001
        self._running = weakref.ref(generation)
        return generation

    def reset(self) -> None:
        """Forget everything but the system message. The cache is freed."""
        if not self._finish():
            raise BusyError("Conversation: another thread is taking an answer from it")
        self._messages = [m for m in self._messages[:1] if m["role"] == "system"]
        if self._cached is not None:
            self._cached.sequence.close()
            self._cached = None

    def close(self) -> None:
        """Free the cache. Closing twice does nothing."""
        self._closed = True
        if self._finish() and self._cached is not None:
            self._cached.sequence.close()

    def _finish(self) -> bool:
        """End the generation that runs; False if another thread is inside, which ends it then."""
        running = self._running() if self._running is not None else None
        if running is None:
            return True
        running.close()
        return running.done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _as_messages(content: str | Message | Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return check_messages([content] if isinstance(content, Mapping) else content)
