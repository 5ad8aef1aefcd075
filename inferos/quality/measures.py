"""How far a compressed cache moves a model's predictions, against the same model with an uncompressed one.

Both sessions read the same text, teacher-forced. The first `prompt` tokens are fed in one call, as a prompt is (the
session cuts it into its own prefill chunks); every later token is fed alone, so each scored prediction comes from the
decode path over a cache in the state decoding leaves it in. The prediction after the prompt's last token is scored too.

For a scored position, p and q are the softmax of the uncompressed and the compressed logits, in float64:

- NLL is -log q(token), PPL is exp(mean NLL), exact by token; the relative change is PPL / uncompressed PPL - 1;
- KLD is sum p (log p - log q), in nats;
- RMS delta p is the root mean square of q(token) - p(token);
- same-top-1 is the share of positions where both have the same most likely token.

Intervals are 95 % percentile intervals of a circular block bootstrap (https://doi.org/10.1214/aos/1176347265) over
positions, blocks of 32 tokens, because neighbouring positions of one text are not independent. The paired difference
of NLL is resampled for the relative change, so it is far narrower than the interval of either PPL.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inferos.errors import ConfigError, ContextError, ProviderError, ShapeError
from inferos.runtime.protocols import DecoderSession, Float32, Ids, TokenSequence
from inferos.runtime.sampler import Sampler, SamplingOptions

__all__ = ["Interval", "Measures", "Position", "Trace", "Watch", "compare", "evaluate", "record", "sample_text"]

Float64 = npt.NDArray[np.float64]
Progress = Callable[[int], None]

_BLOCK = 32  # positions
_RESAMPLES = 2000
_IN_MEMORY = 256 * 2**20  # bytes of logits kept in memory; more go to a temporary file


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


class Position(NamedTuple):
    """One scored prediction: negative log-likelihoods in nats, KLD, change of probability, same top 1 (0 or 1)."""

    nll_reference: float
    nll: float
    kld: float
    delta_p: float
    same_top1: float


Watch = Callable[[int, Position, TokenSequence], None]
"""Called after a prediction is scored, with the tokens then in the cache, the scores and the sequence itself."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What the uncompressed session said about a text.

    Parameters
    ----------
    ids : (tokens,) int64
    prompt : int
        Tokens fed as one prompt.
    logits : (tokens - prompt, vocab_size) float32
        Row i predicts ids[prompt + i].
    kv_bytes, kv_elements : int
        The cache after the whole text.
    tokens_per_s : float or None
        One-token steps a second; None without such a step.
    """

    ids: Ids
    prompt: int
    logits: Float32
    kv_bytes: int
    kv_elements: int
    tokens_per_s: float | None

    @property
    def ppl(self) -> float:
        """Perplexity of the scored tokens."""
        tokens = self.ids[self.prompt :]
        nll = [-float(_log_softmax(row)[token]) for row, token in zip(self.logits, tokens, strict=True)]
        return _exp(sum(nll) / len(nll))


@dataclass(frozen=True, slots=True)
class Measures:
    """A session against the trace of the uncompressed one; the module's text defines each number.

    Parameters
    ----------
    positions : int
        Predictions compared.
    context : int
        Tokens in the cache at the end.
    kv_bytes, kv_elements : int
        The cache after the whole text.
    tokens_per_s : float or None
        One-token steps a second, only the time inside the session counted.
    """

    positions: int
    context: int
    ppl: float
    ppl_interval: Interval
    delta_ppl_rel: float
    delta_ppl_rel_interval: Interval
    kld_mean: float
    kld_mean_interval: Interval
    kld_median: float
    kld_p99: float
    kld_max: float
    rms_delta_p: float
    same_top1: float
    same_top1_interval: Interval
    kv_bytes: int
    kv_elements: int
    tokens_per_s: float | None

    @property
    def bits_per_element(self) -> float:
        """Bits the cache takes for one value of K or V, scales and window included."""
        return 8 * self.kv_bytes / self.kv_elements


def evaluate(reference: DecoderSession, session: DecoderSession, ids: Ids, *, prompt: int | None = None) -> Measures:
    """Both sessions over one text; see `record` and `compare`."""
    return compare(record(reference, ids, prompt=prompt), session)


def record(session: DecoderSession, ids: Ids, *, prompt: int | None = None, progress: Progress | None = None) -> Trace:
    """Run the uncompressed session over a text and keep what it says.

    Parameters
    ----------
    session : DecoderSession
    ids : (tokens,) int64
    prompt : int, optional
        Tokens fed as one prompt, at least 1; half of the text where not given.
    progress : callable, optional
        Called with the number of tokens just run.

    Raises
    ------
    ShapeError
        If ids is not one-dimensional int64 with an id of the vocabulary each.
    ConfigError
        If the prompt leaves nothing to score.
    ContextError
        If the text is longer than the model's context.
    """
    text = _checked(session, ids)
    first = max(1, len(text) // 2) if prompt is None else prompt
    if not 1 <= first < len(text):
        raise ConfigError(f"record: prompt is {first}, expected 1..{len(text) - 1} for a text of {len(text)} tokens")
    logits = _room(len(text) - first, session.vocab_size)

    def keep(row: int, values: Float32, _: TokenSequence) -> None:
        logits[row] = values

    run = _teacher_force(session, text, first, keep, progress)
    return Trace(text, first, logits, *run)


def compare(
    trace: Trace, session: DecoderSession, *, progress: Progress | None = None, watch: Watch | None = None
) -> Measures:
    """Run a session over the trace's text and measure how far its predictions are from the trace's.

    Parameters
    ----------
    trace : Trace
    session : DecoderSession
    progress : callable, optional
        Called with the number of tokens just run.
    watch : callable, optional
        Called for every scored position; it may read the sequence but not feed it.

    Raises
    ------
    ShapeError
        If the session's vocabulary is not the trace's.
    ContextError
        If the text is longer than the model's context.
    ProviderError
        If the session gives a logit that is not a number.
    """
    text = _checked(session, trace.ids)
    if session.vocab_size != trace.logits.shape[1]:
        raise ShapeError(f"compare: the session has {session.vocab_size} tokens, the trace {trace.logits.shape[1]}")
    scores = np.empty((len(text) - trace.prompt, 5))

    def score(row: int, values: Float32, sequence: TokenSequence) -> None:
        scored = _score(trace.logits[row], values, int(text[trace.prompt + row]))
        scores[row] = scored
        if watch is not None:
            watch(trace.prompt + row, scored, sequence)

    kv_bytes, kv_elements, speed = _teacher_force(session, text, trace.prompt, score, progress)
    return _summary(scores, len(text), kv_bytes, kv_elements, speed)


def sample_text(
    session: DecoderSession,
    tokens: int,
    *,
    seed: int = 0,
    first_token: int = 0,
    avoid: Sequence[int] = (),
    progress: Progress | None = None,
) -> Ids:
    """A text the model writes itself at temperature 1, so that no data set is needed.

    Parameters
    ----------
    session : DecoderSession
        The uncompressed one.
    tokens : int
        Length of the result, the first token included.
    seed : int, default 0
        The same seed gives the same text on one machine; logits differ in their last bits between machines.
    first_token : int, default 0
    avoid : sequence of int
        Ids never drawn, such as the end of the text.
    progress : callable, optional
        Called with 1 for each token.

    Returns
    -------
    (tokens,) int64
    """
    if not 1 <= tokens <= session.context_length:
        raise ContextError(f"sample_text: tokens is {tokens}, expected 1..{session.context_length}")
    if any(not 0 <= token < session.vocab_size for token in (first_token, *avoid)):
        raise ConfigError(f"sample_text: ids {(first_token, *avoid)}, expected each in 0..{session.vocab_size - 1}")
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
    text = np.empty(tokens, np.int64)
    text[0] = first_token
    sequence = session.sequence()
    try:
        for position in range(1, tokens):
            logits = sequence.feed(text[position - 1 : position]).copy()
            logits[list(avoid)] = -np.inf
            text[position] = sampler.next(logits).id
            sampler.accept(int(text[position]))
            if progress is not None:
                progress(1)
    finally:
        sequence.close()
    return text


def _checked(session: DecoderSession, ids: Ids) -> Ids:
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise ShapeError(f"ids are {ids.dtype} of shape {ids.shape}, expected (tokens,) int64")
    if len(ids) < 2 or ids.min() < 0 or ids.max() >= session.vocab_size:
        raise ShapeError(f"ids are {len(ids)} tokens, expected at least 2, each in 0..{session.vocab_size - 1}")
    if len(ids) > session.context_length:
        raise ContextError(f"a text of {len(ids)} tokens, the model's context is {session.context_length}")
    return ids


def _room(rows: int, vocab_size: int) -> Float32:
    if rows * vocab_size * 4 <= _IN_MEMORY:
        return np.empty((rows, vocab_size), np.float32)
    # The file has no name (or goes with its handle), so nothing is left behind however the process ends.
    with tempfile.TemporaryFile(prefix="inferos-trace-") as file:
        return np.memmap(file, np.float32, "w+", shape=(rows, vocab_size))


def _teacher_force(
    session: DecoderSession,
    text: Ids,
    prompt: int,
    take: Callable[[int, Float32, TokenSequence], None],
    progress: Progress | None,
) -> tuple[int, int, float | None]:
    """Feed the text, hand each prediction to `take`; the cache's bytes and elements and the steps a second."""
    sequence: TokenSequence = session.sequence()
    try:
        take(0, _finite(session, sequence.feed(text[:prompt]), prompt), sequence)
        if progress is not None:
            progress(prompt)
        seconds = 0.0
        # The last token is fed too: the cache then holds the whole text. Nothing scores what it predicts.
        for position in range(prompt, len(text)):
            start = time.perf_counter()
            logits = sequence.feed(text[position : position + 1])
            seconds += time.perf_counter() - start
            if position + 1 < len(text):
                take(position + 1 - prompt, _finite(session, logits, position + 1), sequence)
            if progress is not None:
                progress(1)
        speed = (len(text) - prompt) / seconds if seconds > 0 else None
        return sequence.kv_bytes, sequence.kv_elements, speed
    finally:
        sequence.close()


def _finite(session: DecoderSession, logits: Float32, position: int) -> Float32:
    if np.isnan(logits).any():
        raise ProviderError(f"the session with kv={session.kv} gave a logit that is not a number at token {position}")
    return logits


def _log_softmax(logits: Float32) -> Float64:
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    return values


def _score(reference: Float32, logits: Float32, token: int) -> Position:
    log_p, log_q = _log_softmax(reference), _log_softmax(logits)
    p = np.exp(log_p)
    seen = p > 0  # 0 log 0 = 0
    kld = float(np.sum(p[seen] * (log_p[seen] - log_q[seen])))
    return Position(
        nll_reference=-float(log_p[token]),
        nll=-float(log_q[token]),
        kld=max(0.0, kld),  # never negative but for rounding
        delta_p=float(np.exp(log_q[token]) - p[token]),
        same_top1=float(reference.argmax() == logits.argmax()),
    )


def _resampled_means(values: Float64) -> Float64:
    """Means of `_RESAMPLES` circular block resamples of values (positions,)."""
    count = len(values)
    block = min(_BLOCK, count)
    blocks = -(-count // block)
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    block_sums = around[block:] - around[:-block]
    starts = np.random.default_rng(0).integers(0, count, (_RESAMPLES, blocks))
    means: Float64 = block_sums[starts].sum(axis=1) / (blocks * block)
    return means


def _interval(means: Float64) -> Interval:
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))


def _exp(nll: float) -> float:
    """The perplexity of a mean NLL; infinite where it leaves float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll))


def _expm1(change: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.expm1(change))


def _summary(scores: Float64, context: int, kv_bytes: int, kv_elements: int, speed: float | None) -> Measures:
    nll_reference, nll, kld, delta_p, same = scores.T
    change = nll - nll_reference
    # exp keeps order, so it may follow the percentile.
    nll_range, change_range = _interval(_resampled_means(nll)), _interval(_resampled_means(change))
    return Measures(
        positions=len(scores),
        context=context,
        ppl=_exp(nll.mean()),
        ppl_interval=Interval(_exp(nll_range.low), _exp(nll_range.high)),
        delta_ppl_rel=_expm1(change.mean()),
        delta_ppl_rel_interval=Interval(_expm1(change_range.low), _expm1(change_range.high)),
        kld_mean=float(kld.mean()),
        kld_mean_interval=_interval(_resampled_means(kld)),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)),
        kld_max=float(kld.max()),
        rms_delta_p=float(np.sqrt(np.mean(delta_p**2))),
        same_top1=float(same.mean()),
        same_top1_interval=_interval(_resampled_means(same)),
        kv_bytes=kv_bytes,
        kv_elements=kv_elements,
        tokens_per_s=speed,
    )
