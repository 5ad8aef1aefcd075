"""Where greedy decoding with a compressed cache first writes another token than with an uncompressed one.

Both sessions continue the same prompts, always with the most likely token. Until the first difference both caches hold
the same text, so the position says how long a reader would not notice. A prompt whose continuations agree to the end
has no position; it counts with all its tokens in the mean, which is therefore a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inferos.errors import ConfigError, ContextError
from inferos.quality._scoring import finite
from inferos.quality._statistics import Interval, mean_interval, wilson
from inferos.runtime.protocols import DecoderSession, Ids

__all__ = ["Divergence", "Greedy", "greedy_divergence", "greedy_prompts", "record_greedy"]

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Greedy:
    """A prompt (tokens,) and the uncompressed session's greedy continuation of it, (tokens,); both int64."""

    prompt: Ids
    continuation: Ids


@dataclass(frozen=True, slots=True)
class Divergence:
    """A session's greedy continuations against the uncompressed ones.

    Parameters
    ----------
    tokens : int
        Tokens of a continuation.
    positions : tuple of int or None
        For each prompt the first differing token, counted from 0; None where none of the `tokens` differs.
    mean : float
        Mean number of agreeing tokens, at most `tokens`.
    mean_interval : Interval
        Of `mean`, by resampling prompts.
    same : float
        Share of prompts without a difference.
    same_interval : Interval
        Wilson 95 % interval of `same`.
    """

    tokens: int
    positions: tuple[int | None, ...]
    mean: float
    mean_interval: Interval
    same: float
    same_interval: Interval


def greedy_prompts(texts: Sequence[Ids], tokens: int, *, count: int = 8) -> list[Ids]:
    """Prompts of `tokens` tokens, their starts spread evenly over the texts.

    Raises
    ------
    ConfigError
        If no text is that long, or a number is below 1.
    """
    if tokens < 1 or count < 1:
        raise ConfigError(f"greedy_prompts: {count} prompts of {tokens} tokens, expected at least 1 of 1")
    pieces = [text[start : start + tokens] for text in texts for start in range(len(text) - tokens + 1)]
    if not pieces:
        raise ConfigError(f"greedy_prompts: no text has the {tokens} tokens of a prompt")
    places = np.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().astype(int)
    return [pieces[place] for place in places]


def record_greedy(
    session: DecoderSession, prompts: Sequence[Ids], tokens: int, *, progress: Progress | None = None
) -> list[Greedy]:
    """Continue each prompt greedily with the uncompressed session.

    Parameters
    ----------
    session : DecoderSession
    prompts : sequence of (tokens,) int64
        Each is fed as one prompt.
    tokens : int
        Length of a continuation.
    progress : callable, optional
        Called with the number of tokens just run.

    Raises
    ------
    ConfigError
        If there is no prompt, or `tokens` is below 1.
    ContextError
        If a prompt and its continuation are longer than the model's context.
    ProviderError
        If the session gives a logit that is not a number.
    """
    if not prompts or tokens < 1:
        raise ConfigError(f"record_greedy: {len(prompts)} prompts, {tokens} tokens; expected at least 1 of each")
    longest = max(len(prompt) for prompt in prompts)
    if longest + tokens > session.context_length:
        raise ContextError(
            f"record_greedy: a prompt of {longest} tokens and {tokens} more, "
            f"the model's context is {session.context_length}"
        )
    return [Greedy(prompt, _continue(session, prompt, tokens, progress)) for prompt in prompts]


def greedy_divergence(
    recorded: Sequence[Greedy], session: DecoderSession, *, progress: Progress | None = None
) -> Divergence:
    """Decode the recorded prompts greedily with another session, each up to its first different token.

    Raises
    ------
    ConfigError
        If nothing was recorded.
    ProviderError
        If the session gives a logit that is not a number.
    """
    if not recorded:
        raise ConfigError("greedy_divergence: 0 recorded continuations, expected at least one")
    tokens = len(recorded[0].continuation)
    positions = tuple(_first_difference(session, greedy, progress) for greedy in recorded)
    agreeing = np.array([tokens if position is None else position for position in positions], np.float64)
    same = positions.count(None)
    return Divergence(
        tokens=tokens,
        positions=positions,
        mean=float(agreeing.mean()),
        mean_interval=mean_interval(agreeing, block=1),
        same=same / len(positions),
        same_interval=Interval(*wilson(same, len(positions))),
    )


def _continue(session: DecoderSession, prompt: Ids, tokens: int, progress: Progress | None) -> Ids:
    written = np.empty(tokens, np.int64)
    sequence = session.sequence()
    try:
        logits = sequence.feed(prompt)
        for place in range(tokens):
            written[place] = finite(session, logits, len(prompt) + place).argmax()
            if place + 1 < tokens:
                logits = sequence.feed(written[place : place + 1])
    finally:
        sequence.close()
    if progress is not None:
        progress(len(prompt) + tokens)
    return written


def _first_difference(session: DecoderSession, greedy: Greedy, progress: Progress | None) -> int | None:
    """The uncompressed continuation is fed: up to the first difference it is the session's own."""
    prompt, wanted = greedy.prompt, greedy.continuation
    found: int | None = None
    sequence = session.sequence()
    try:
        logits = sequence.feed(prompt)
        for place in range(len(wanted)):
            if finite(session, logits, len(prompt) + place).argmax() != wanted[place]:
                found = place
                break
            if place + 1 < len(wanted):
                logits = sequence.feed(wanted[place : place + 1])
    finally:
        sequence.close()
    if progress is not None:
        progress(len(prompt) + len(wanted))
    return found
