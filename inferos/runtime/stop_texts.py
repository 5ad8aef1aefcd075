"""Tokens as they are given out, and the stop texts that hold some of them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inferos.errors import ConfigError

__all__ = ["StopTail", "Token", "check_stops"]

MAX_STOPS = 64
MAX_STOP_LENGTH = 256


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


class StopTail:
    """Tokens held back because their text may be the beginning of a stop text, or is not a whole character yet."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held: list[Token] = []
        self.stopped = False

    @property
    def holds_back(self) -> bool:
        """Whether the next token may have to wait although its text is complete, or others wait."""
        return bool(self._stops or self._held)

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
