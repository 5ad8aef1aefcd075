"""Drafts without a second model: what followed the last time the text went like this (prompt lookup).

A draft is a guess at the next tokens. The loop feeds it in one step behind the newest token, draws from the logits of
each place as it would have drawn there, and keeps what it drew up to the first place where that is not the guess. So
the tokens are those of plain decoding, greedy and sampled alike: a guess never changes what is drawn, only how many
steps it takes. (Prompt lookup: https://github.com/apoorvumang/prompt-lookup-decoding; exact acceptance, of which this
is the case of a draft that is certain of itself: https://arxiv.org/abs/2211.17192.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Drafter", "PromptLookup", "SpeculationGate"]

NGRAM = 3
FEWEST, MOST = 4, 8  # tokens of a draft; the cache can take back 16 in any layer
RUNS = 50  # drafts that accept_rate looks back on
TRIAL = 6  # drafts before they are judged, at the beginning and after a pause
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096  # tokens
ALONE_AFTER = 64  # tokens; reviews of the cache follow steps of one token


class Drafter(Protocol):
    """Where guesses come from."""

    def push(self, ids: Sequence[int]) -> None:
        """These were appended to the text."""
        ...

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may follow; none where it has no idea."""
        ...


class PromptLookup:
    """Guesses what followed the last three tokens where they last stood together, in the prompt or in the answer.

    A token costs one dictionary entry, whatever the length of the text.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position behind its last occurrence but the newest

    def push(self, ids: Sequence[int]) -> None:
        """Append tokens. The newest n-gram is entered with the token behind it, so that it never finds itself."""
        text, ends = self._ids, self._ends
        for id in ids:
            if len(text) >= NGRAM:
                ends[tuple(text[-NGRAM:])] = len(text)
            text.append(id)

    def draft(self, most: int) -> list[int]:
        """What followed, and where the text ends before `most`, what follows from that: a loop goes on as a loop."""
        text = self._ids
        at = self._ends.get(tuple(text[-NGRAM:])) if len(text) >= NGRAM else None
        if at is None:
            return []
        period = len(text) - at
        return [text[at + i % period] for i in range(most)]


class SpeculationGate:
    """Decides whether a draft is worth its step, from the share of drafted tokens that were accepted.

    Off where that share falls below `min_accept_rate`; tried again after a pause of 64 tokens, which doubles every time
    it was in vain, to 4,096 at most. Drafts grow from 4 tokens to 8 while whole ones are accepted.

    Parameters
    ----------
    min_accept_rate : float
        0..1; `quality.min_accept_rate` of the policy.
    drafter : Drafter

    Attributes
    ----------
    drafted, accepted : tokens, from the beginning
    """

    def __init__(self, min_accept_rate: float, drafter: Drafter) -> None:
        self._least = min_accept_rate
        self._drafter = drafter
        self._last: deque[tuple[int, int]] = deque(maxlen=RUNS)  # drafted, accepted
        self._trial: deque[tuple[int, int]] = deque(maxlen=RUNS)  # of these, those since the last pause
        self._length = FEWEST
        self._pause = FIRST_PAUSE
        self._paused = 0  # tokens left
        self._since_alone = 0  # tokens since a step of one
        self.drafted = 0
        self.accepted = 0

    @property
    def accept_rate(self) -> float | None:
        """Accepted of the drafted tokens of the last 50 drafts; None before the first."""
        return _rate(self._last)

    @property
    def active(self) -> bool:
        """Whether drafts are made; False in a pause."""
        return self._paused == 0

    def push(self, ids: Sequence[int]) -> None:
        """These were appended to the text."""
        self._drafter.push(ids)

    def draft(self, most: int) -> list[int]:
        """What to feed behind the newest token, at most `most` tokens; often nothing."""
        if self._paused:
            self._paused -= 1
            return []
        guess: list[int] = []
        if most > 0 and self._since_alone < ALONE_AFTER:
            guess = self._drafter.draft(min(self._length, most))
        self._since_alone = self._since_alone + 1 if guess else 0
        return guess

    def checked(self, drafted: int, accepted: int) -> None:
        """What became of a draft."""
        self.drafted += drafted
        self.accepted += accepted
        self._since_alone += accepted
        self._length = min(2 * self._length, MOST) if accepted == drafted else FEWEST
        self._last.append((drafted, accepted))
        self._trial.append((drafted, accepted))
        if len(self._trial) < TRIAL:
            return
        if (_rate(self._trial) or 0.0) < self._least:
            self._paused, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._trial.clear()
        else:
            self._pause = FIRST_PAUSE


def _rate(runs: deque[tuple[int, int]]) -> float | None:
    drafted, accepted = map(sum, zip(*runs, strict=True)) if runs else (0, 0)
    return accepted / drafted if drafted else None
