"""How far a compressed cache moves a model's predictions, against the same model with an uncompressed one.

Both sessions read the same text, teacher-forced. The first `prompt` tokens are fed in one call, as a prompt is (the
session cuts it into its own prefill chunks); every later token is fed alone, so each scored prediction comes from the
decode path over a cache in the state decoding leaves it in. The prediction after the prompt's last token is scored too.

For a scored position, p and q are the softmax of the uncompressed and the compressed logits, in float64:

- NLL is -log q(token), PPL is exp(mean NLL), exact by token; the relative change is PPL / uncompressed PPL - 1;
- KLD is sum p (log p - log q), in nats;
- RMS delta p is the root mean square of q(token) - p(token);
- same-top-1 is the share of positions where both have the same most likely token.

Intervals are 95 % percentile intervals of a circular block bootstrap over positions, blocks of 32 tokens. The paired
difference of NLL is resampled for the relative change, so it is far narrower than the interval of either PPL. The
largest KLD has none: resampling cannot say how far a maximum may lie beyond what was seen.

Several texts of one length are scored as one sample: `windows` cuts a long text into overlapping ones, each token
scored once with at least `window - stride` tokens before it, which makes the PPL a sliding-window one.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inferos.errors import ConfigError, ContextError, ShapeError
from inferos.quality._scoring import Position, exp, expm1, finite, log_softmax, score
from inferos.quality._statistics import Interval, mean_interval, percentile_interval
from inferos.runtime.protocols import DecoderSession, Float32, Ids, TokenSequence
from inferos.runtime.sampler import Sampler, SamplingOptions

__all__ = [
    "Interval",
    "Measures",
    "Position",
    "Trace",
    "Watch",
    "compare",
    "compare_all",
    "evaluate",
    "evaluate_all",
    "perplexity",
    "record",
    "record_all",
    "sample_text",
    "windows",
]

Float64 = npt.NDArray[np.float64]
Progress = Callable[[int], None]

_IN_MEMORY = 256 * 2**20  # bytes of logits kept in memory; more go to a temporary file


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
        return perplexity([self])

    @property
    def nll(self) -> list[float]:
        """Negative log-likelihood of each scored token, nats."""
        tokens = self.ids[self.prompt :]
        return [-float(log_softmax(row)[token]) for row, token in zip(self.logits, tokens, strict=True)]


@dataclass(frozen=True, slots=True)
class Measures:
    """A session against the trace of the uncompressed one; the module's text defines each number.

    Parameters
    ----------
    positions : int
        Predictions compared.
    baseline_ppl : float
        The uncompressed session's perplexity.
    context : int
        Tokens in the cache at the end of a text.
    kv_bytes, kv_elements : int
        The cache after a whole text; of several texts the last one's.
    tokens_per_s : float or None
        One-token steps a second, only the time inside the session counted.
    """

    positions: int
    context: int
    baseline_ppl: float
    ppl: float
    ppl_interval: Interval
    delta_ppl_rel: float
    delta_ppl_rel_interval: Interval
    kld_mean: float
    kld_mean_interval: Interval
    kld_median: float
    kld_median_interval: Interval
    kld_p99: float
    kld_p99_interval: Interval
    kld_max: float
    rms_delta_p: float
    rms_delta_p_interval: Interval
    same_top1: float
    same_top1_interval: Interval
    kv_bytes: int
    kv_elements: int
    tokens_per_s: float | None

    @property
    def delta_ppl(self) -> float:
        """Change of the perplexity, absolute."""
        return self.baseline_ppl * self.delta_ppl_rel

    @property
    def bits_per_element(self) -> float:
        """Bits the cache takes for one value of K or V, scales and window included."""
        return 8 * self.kv_bytes / self.kv_elements


def windows(ids: Ids, window: int, stride: int) -> list[Ids]:
    """Overlapping pieces of a text for `record_all` with a prompt of `window - stride`: each token is scored once.

    What is left at the end is shorter than `stride` and is not scored.

    Parameters
    ----------
    ids : (tokens,) int64
    window : int
        Tokens of a piece.
    stride : int
        Tokens from one piece to the next, 1..window - 1; so many are scored in each.

    Raises
    ------
    ConfigError
        If the stride does not fit the window, or the text is shorter than one.
    """
    if not 1 <= stride < window:
        raise ConfigError(f"windows: stride is {stride}, expected 1..{window - 1} for windows of {window} tokens")
    if len(ids) < window:
        raise ConfigError(f"windows: a text of {len(ids)} tokens, expected at least one window of {window}")
    return [ids[start : start + window] for start in range(0, len(ids) - window + 1, stride)]


def evaluate(reference: DecoderSession, session: DecoderSession, ids: Ids, *, prompt: int | None = None) -> Measures:
    """Both sessions over one text; see `record` and `compare`."""
    return evaluate_all(reference, session, [ids], prompt=prompt)


def evaluate_all(
    reference: DecoderSession,
    session: DecoderSession,
    texts: Sequence[Ids],
    *,
    prompt: int | None = None,
    progress: Progress | None = None,
) -> Measures:
    """Both sessions over texts of one length, text by text, so that one text's logits are held at a time.

    As `record_all` and `compare_all`, for sessions that may be open together.
    """
    first = _prompt_of(reference, texts, prompt)
    rows, vocab = len(texts[0]) - first, reference.vocab_size
    traces = (_record_one(reference, text, first, _room(rows, vocab), progress) for text in texts)
    return _pooled(session, traces, progress)


def record(session: DecoderSession, ids: Ids, *, prompt: int | None = None, progress: Progress | None = None) -> Trace:
    """Run the uncompressed session over a text and keep what it says; see `record_all`."""
    return record_all(session, [ids], prompt=prompt, progress=progress)[0]


def record_all(
    session: DecoderSession, texts: Sequence[Ids], *, prompt: int | None = None, progress: Progress | None = None
) -> list[Trace]:
    """Run the uncompressed session over texts and keep what it says.

    Parameters
    ----------
    session : DecoderSession
    texts : sequence of (tokens,) int64
        All of one length.
    prompt : int, optional
        Tokens fed as one prompt, at least 1; half of a text where not given.
    progress : callable, optional
        Called with the number of tokens just run.

    Raises
    ------
    ShapeError
        If a text is not one-dimensional int64 with an id of the vocabulary each, or the lengths differ.
    ConfigError
        If there is no text, the prompt leaves nothing to score, or the logits find no room.
    ContextError
        If a text is longer than the model's context.
    """
    first = _prompt_of(session, texts, prompt)
    rows = len(texts[0]) - first
    room = _room(len(texts) * rows, session.vocab_size)
    return [
        _record_one(session, text, first, room[number * rows : (number + 1) * rows], progress)
        for number, text in enumerate(texts)
    ]


def _prompt_of(session: DecoderSession, texts: Sequence[Ids], prompt: int | None) -> int:
    """Tokens fed as one prompt, once the texts are known to fit the session and each other."""
    if not texts:
        raise ConfigError("record: 0 texts, expected at least one")
    length = len(_checked(session, texts[0]))
    for text in texts:
        if len(_checked(session, text)) != length:
            raise ShapeError(f"record: texts of {length} and {len(text)} tokens, expected one length")
    first = max(1, length // 2) if prompt is None else prompt
    if not 1 <= first < length:
        raise ConfigError(f"record: prompt is {first}, expected 1..{length - 1} for a text of {length} tokens")
    return first


def _record_one(session: DecoderSession, text: Ids, first: int, logits: Float32, progress: Progress | None) -> Trace:
    def keep(row: int, values: Float32, _: TokenSequence) -> None:
        logits[row] = values

    kv_bytes, kv_elements, seconds = _teacher_force(session, text, first, keep, progress)
    return Trace(text, first, logits, kv_bytes, kv_elements, _speed(len(logits), seconds))


def perplexity(traces: Sequence[Trace]) -> float:
    """Perplexity of the uncompressed session over all scored tokens."""
    nll = [value for trace in traces for value in trace.nll]
    return exp(sum(nll) / len(nll))


def compare(
    trace: Trace, session: DecoderSession, *, progress: Progress | None = None, watch: Watch | None = None
) -> Measures:
    """Run a session over the trace's text and measure how far its predictions are from the trace's."""
    return compare_all([trace], session, progress=progress, watch=watch)


def compare_all(
    traces: Sequence[Trace], session: DecoderSession, *, progress: Progress | None = None, watch: Watch | None = None
) -> Measures:
    """Run a session over the traces' texts and measure how far its predictions are from theirs, all as one sample.

    Parameters
    ----------
    traces : sequence of Trace
    session : DecoderSession
    progress : callable, optional
        Called with the number of tokens just run.
    watch : callable, optional
        Called for every scored position; it may read the sequence but not feed it.

    Raises
    ------
    ConfigError
        If there is no trace.
    ShapeError
        If the session's vocabulary is not the traces'.
    ContextError
        If a text is longer than the model's context.
    ProviderError
        If the session gives a logit that is not a number.
    """
    if not traces:
        raise ConfigError("compare: 0 traces, expected at least one")
    return _pooled(session, traces, progress, watch)


def _pooled(
    session: DecoderSession, traces: Iterable[Trace], progress: Progress | None, watch: Watch | None = None
) -> Measures:
    parts: list[Float64] = []
    context, held, total_seconds = 0, (0, 0), 0.0
    for trace in traces:
        scores, kv_bytes, kv_elements, seconds = _compare_one(trace, session, progress, watch)
        parts.append(scores)
        context, held = len(trace.ids), (kv_bytes, kv_elements)
        total_seconds += seconds
    every = np.concatenate(parts)
    return _summary(every, context, *held, _speed(len(every), total_seconds))


def _compare_one(
    trace: Trace, session: DecoderSession, progress: Progress | None, watch: Watch | None
) -> tuple[Float64, int, int, float]:
    """Scores (positions, 5) over one text, the cache's bytes and elements, the seconds of the steps."""
    text = _checked(session, trace.ids)
    if session.vocab_size != trace.logits.shape[1]:
        raise ShapeError(f"compare: the session has {session.vocab_size} tokens, the trace {trace.logits.shape[1]}")
    scores = np.empty((len(text) - trace.prompt, 5))

    def take(row: int, values: Float32, sequence: TokenSequence) -> None:
        scored = score(trace.logits[row], values, int(text[trace.prompt + row]))
        scores[row] = scored
        if watch is not None:
            watch(trace.prompt + row, scored, sequence)

    return scores, *_teacher_force(session, text, trace.prompt, take, progress)


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
    needed = rows * vocab_size * 4
    if needed <= _IN_MEMORY:
        return np.empty((rows, vocab_size), np.float32)
    # A mapped file that outgrows its disk would end the process, not raise.
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise ConfigError(f"record: {needed} bytes of logits, {free} are free for temporary files; score fewer tokens")
    # The file has no name (or goes with its handle), so nothing is left behind however the process ends.
    with tempfile.TemporaryFile(prefix="inferos-trace-") as file:
        return np.memmap(file, np.float32, "w+", shape=(rows, vocab_size))


def _teacher_force(
    session: DecoderSession,
    text: Ids,
    prompt: int,
    take: Callable[[int, Float32, TokenSequence], None],
    progress: Progress | None,
) -> tuple[int, int, float]:
    """Feed the text, hand each prediction to `take`; the cache's bytes and elements and the seconds of the steps."""
    sequence: TokenSequence = session.sequence()
    try:
        take(0, finite(session, sequence.feed(text[:prompt]), prompt), sequence)
        if progress is not None:
            progress(prompt)
        seconds = 0.0
        # The last token is fed too: the cache then holds the whole text. Nothing scores what it predicts.
        for position in range(prompt, len(text)):
            start = time.perf_counter()
            logits = sequence.feed(text[position : position + 1])
            seconds += time.perf_counter() - start
            if position + 1 < len(text):
                take(position + 1 - prompt, finite(session, logits, position + 1), sequence)
            if progress is not None:
                progress(1)
        return sequence.kv_bytes, sequence.kv_elements, seconds
    finally:
        sequence.close()


def _speed(steps: int, seconds: float) -> float | None:
    return steps / seconds if seconds > 0 else None


def _summary(scores: Float64, context: int, kv_bytes: int, kv_elements: int, speed: float | None) -> Measures:
    nll_reference, nll, kld, delta_p, same = scores.T
    change = nll - nll_reference
    # exp and the square root keep order, so they may follow the percentile.
    nll_range, change_range, squares = mean_interval(nll), mean_interval(change), mean_interval(delta_p**2)
    return Measures(
        positions=len(scores),
        context=context,
        baseline_ppl=exp(nll_reference.mean()),
        ppl=exp(nll.mean()),
        ppl_interval=Interval(exp(nll_range.low), exp(nll_range.high)),
        delta_ppl_rel=expm1(change.mean()),
        delta_ppl_rel_interval=Interval(expm1(change_range.low), expm1(change_range.high)),
        kld_mean=float(kld.mean()),
        kld_mean_interval=mean_interval(kld),
        kld_median=float(np.median(kld)),
        kld_median_interval=percentile_interval(kld, 50),
        kld_p99=float(np.percentile(kld, 99)),
        kld_p99_interval=percentile_interval(kld, 99),
        kld_max=float(kld.max()),
        rms_delta_p=float(np.sqrt(np.mean(delta_p**2))),
        rms_delta_p_interval=Interval(math.sqrt(max(0.0, squares.low)), math.sqrt(max(0.0, squares.high))),
        same_top1=float(same.mean()),
        same_top1_interval=mean_interval(same),
        kv_bytes=kv_bytes,
        kv_elements=kv_elements,
        tokens_per_s=speed,
    )
