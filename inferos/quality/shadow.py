"""Shadow replay: what compression costs on the requests that are really served.

Some requests, chosen before anything is known about them, are run again after they were answered, teacher-forced and off
the serving path, over two caches side by side: one compressed as the served one, one uncompressed. Both are fed the same
tokens in the same steps, so every scored prediction differs by the cache alone. The sequences live in budgets of their
own and share the model's weights.

A replay is bounded in tokens and in seconds. A request longer than the bound is cut behind its first tokens, never in
front: a cache without its beginning would be another cache. Where time runs out, what was scored until then counts if it
is at least 16 positions.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from inferos.errors import ConfigError, InferosError
from inferos.quality._background import Background
from inferos.quality._scoring import exp, finite, score
from inferos.quality._sharing import shared
from inferos.runtime.protocols import DecoderSession, Float32, Ids, RequestObserver, TokenSequence

__all__ = ["ServingModel", "ShadowCounts", "ShadowReading", "ShadowReplay"]

_FEWEST = 16  # scored positions: fewer say nothing
_CHUNK = 512  # tokens of a prompt between two looks at the clock, as many as a session's own prefill chunk
_KEPT = 100  # readings
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShadowReading:
    """What one replayed request lost to compression; `inferos.quality.measures` defines the numbers.

    Parameters
    ----------
    positions : int
        Predictions scored.
    context : int
        Tokens in the caches at the last of them.
    baseline_ppl, ppl : float
        Perplexity of the scored tokens, uncompressed and compressed.
    delta_nll : float
        Mean change of the negative log-likelihood, nats.
    delta_ppl : float
        ppl - baseline_ppl.
    kld_mean, kld_max : float
        Nats.
    same_top1 : float
        Share of positions, 0..1.
    seconds : float
        The replay took.
    complete : bool
        Whether the replay reached its end before its time.
    """

    positions: int
    context: int
    baseline_ppl: float
    ppl: float
    delta_nll: float
    delta_ppl: float
    kld_mean: float
    kld_max: float
    same_top1: float
    seconds: float
    complete: bool


@dataclass(frozen=True, slots=True)
class ShadowCounts:
    """Requests so far.

    Parameters
    ----------
    seen : int
        Finished requests.
    sampled : int
        Those chosen for a replay.
    short, waiting : int
        Chosen, but not replayed: too few tokens, or one was waiting already.
    unfinished, failed : int
        Replays without a reading: the time ran out too early, or a step failed.
    replayed : int
        Replays that gave a reading.
    """

    seen: int = 0
    sampled: int = 0
    short: int = 0
    waiting: int = 0
    unfinished: int = 0
    failed: int = 0
    replayed: int = 0


class ServingModel(Protocol):
    """What `inferos.Model` gives: its session, and a place for an observer."""

    observer: RequestObserver | None

    @property
    def session(self) -> DecoderSession:
        """The session that serves."""
        ...


@dataclass(frozen=True, slots=True)
class _Request:
    ids: Ids  # (tokens,), cut to the bound
    prompt: int  # tokens fed before the first scored one


class ShadowReplay:
    """Replays sampled requests; a `RequestObserver`.

    Parameters
    ----------
    reference : callable
        Opens the uncompressed session, at the first replay.
    session : callable
        Opens the compressed one, for each replay, so that it follows the policy in force.
    every : int, optional
        Every n-th finished request is sampled.
    probability : float, optional
        Each finished request is sampled with this chance; give this or `every`.
    seed : int, default 0
        Of that chance.
    max_tokens : int, default 1024
        Tokens of a replay, at least 32.
    max_seconds : float, default 10
        Seconds of a replay.
    observe : callable, optional
        Given each reading's delta PPL, such as `QualityMonitor.record` or `RecoveryLadder.observe`.
    clock : callable
        Seconds, monotonic.

    Notes
    -----
    Thread-safe. `finished` only chooses and remembers, at most one request at a time; the work is in `run_pending`,
    called by the host when it has time or by the thread of `start`.

    Raises
    ------
    ConfigError
        If an option is out of range, or not exactly one of `every` and `probability` is given.
    """

    def __init__(
        self,
        reference: Callable[[], DecoderSession],
        session: Callable[[], DecoderSession],
        *,
        every: int | None = None,
        probability: float | None = None,
        seed: int = 0,
        max_tokens: int = 1024,
        max_seconds: float = 10.0,
        observe: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_sampling(every, probability)
        if max_tokens < 2 * _FEWEST:
            raise ConfigError(f"max_tokens: {max_tokens!r} is not at least {2 * _FEWEST}")
        if not max_seconds > 0:
            raise ConfigError(f"max_seconds: {max_seconds!r} is not above 0")
        self._open_reference = reference
        self._open_session = session
        self._every = every
        self._probability = probability
        self._random = random.Random(seed)  # noqa: S311 - which request is measured, not a secret
        self._max_tokens = max_tokens
        self._max_seconds = max_seconds
        self._observe = observe
        self._clock = clock
        self._reference: DecoderSession | None = None
        self._pending: _Request | None = None
        self._counts = ShadowCounts()
        self._readings: deque[ShadowReading] = deque(maxlen=_KEPT)
        # Over the fields; never held while a model runs. A generation that the collector finds while it is held ends
        # in `finished`, in the same thread.
        self._lock = threading.RLock()
        self._running = threading.Lock()
        self._background: Background | None = None
        self._closed = False
        self.last_error: str | None = None

    @classmethod
    def of(
        cls,
        model: ServingModel,
        *,
        every: int | None = None,
        probability: float | None = None,
        seed: int = 0,
        max_tokens: int = 1024,
        max_seconds: float = 10.0,
        observe: Callable[[float], object] | None = None,
    ) -> Self:
        """A replay of a model's own requests, in force at once. The weights are shared with the model.

        Raises
        ------
        ConfigError
            As the constructor, or if the model's cache is uncompressed.
        """
        session = shared(model.session)
        shadow = cls(
            lambda: session.beside(kv="f16"),
            session.beside,
            every=every,
            probability=probability,
            seed=seed,
            max_tokens=max_tokens,
            max_seconds=max_seconds,
            observe=observe,
        )
        model.observer = shadow
        return shadow

    def finished(self, prompt: Ids, tokens: Sequence[int]) -> None:
        """A request ended: choose whether it will be replayed."""
        with self._lock:
            counts = replace(self._counts, seen=self._counts.seen + 1)
            if self._closed or not self._chosen(counts.seen):
                self._counts = counts
                return
            counts = replace(counts, sampled=counts.sampled + 1)
            ids = np.concatenate([prompt, np.array(tokens, np.int64)])[: self._max_tokens]
            first = min(len(prompt), len(ids) - _FEWEST)
            if first < 1:
                counts = replace(counts, short=counts.short + 1)
            elif self._pending is not None:
                counts = replace(counts, waiting=counts.waiting + 1)
            else:
                self._pending = _Request(ids, first)
            self._counts = counts
            background = self._background
        if background is not None:
            background.wake()

    def run_pending(self) -> ShadowReading | None:
        """Replay the request that waits, if any; its reading, or None. An InferosError is counted, not raised."""
        if not self._running.acquire(blocking=False):
            return None
        try:
            with self._lock:
                request, self._pending = self._pending, None
            if request is None or self._closed:
                return None
            return self._run(request)
        finally:
            self._running.release()

    @property
    def latest(self) -> ShadowReading | None:
        """The newest reading; None before the first."""
        with self._lock:
            return self._readings[-1] if self._readings else None

    @property
    def readings(self) -> tuple[ShadowReading, ...]:
        """The newest readings, at most 100, oldest first."""
        with self._lock:
            return tuple(self._readings)

    @property
    def counts(self) -> ShadowCounts:
        """What became of the requests."""
        with self._lock:
            return self._counts

    def start(self) -> None:
        """Replay in a thread of its own from now on. Starting twice does nothing."""
        with self._lock:
            if self._background is None and not self._closed:
                self._background = Background("inferos-shadow", self.run_pending)

    def close(self) -> None:
        """End the thread after the step that runs, and take no more requests. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            self._pending = None
            background, self._background = self._background, None
        if background is not None:
            background.close()
        self._reference = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _chosen(self, number: int) -> bool:
        if self._every is not None:
            return number % self._every == 0
        return self._random.random() < (self._probability or 0.0)

    def _run(self, request: _Request) -> ShadowReading | None:
        try:
            if self._reference is None:
                self._reference = self._open_reference()
            reading = self._replay(request, self._reference, self._open_session())
            if reading is None:
                self._count("unfinished")
                return None
        except InferosError as error:
            self.last_error = str(error)
            self._count("failed")
            _log.warning("a shadow replay failed: %s", error)
            return None
        with self._lock:
            self._readings.append(reading)
        self._count("replayed")
        if self._observe is not None:
            try:
                self._observe(reading.delta_ppl)
            except InferosError as error:
                self.last_error = str(error)
                _log.warning("a shadow reading was refused: %s", error)
        return reading

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + 1})

    def _replay(self, request: _Request, reference: DecoderSession, session: DecoderSession) -> ShadowReading | None:
        start = self._clock()
        scores: list[tuple[float, ...]] = []
        sides = (reference, session)
        with contextlib.ExitStack() as held:
            pair = [held.enter_context(contextlib.closing(side.sequence())) for side in sides]
            for position, logits in self._predictions(request, pair, start):
                rows = [finite(side, row, position) for side, row in zip(sides, logits, strict=True)]
                scores.append(score(rows[0], rows[1], int(request.ids[position])))
        if len(scores) < _FEWEST or self._closed:
            return None
        complete = len(scores) == len(request.ids) - request.prompt
        return _reading(scores, request.prompt, self._clock() - start, complete)

    def _predictions(
        self, request: _Request, pair: Sequence[TokenSequence], start: float
    ) -> Iterator[tuple[int, list[Float32]]]:
        """The position predicted and both logits (vocab_size,), until the end or until time is up."""
        ids, prompt = request.ids, request.prompt
        ends = [*range(_CHUNK, prompt, _CHUNK), *range(prompt, len(ids))]
        begin = 0
        for end in ends:
            if self._closed or self._clock() - start >= self._max_seconds:
                return
            logits = [sequence.feed(ids[begin:end]) for sequence in pair]
            begin = end
            if end >= prompt:
                yield end, logits


def _reading(scores: Sequence[tuple[float, ...]], prompt: int, seconds: float, complete: bool) -> ShadowReading:
    nll_reference, nll, kld, _, same = np.array(scores).T
    baseline, ppl = exp(nll_reference.mean()), exp(nll.mean())
    return ShadowReading(
        positions=len(scores),
        context=prompt + len(scores) - 1,
        baseline_ppl=baseline,
        ppl=ppl,
        delta_nll=float((nll - nll_reference).mean()),
        delta_ppl=ppl - baseline,
        kld_mean=float(kld.mean()),
        kld_max=float(kld.max()),
        same_top1=float(same.mean()),
        seconds=seconds,
        complete=complete,
    )


def _check_sampling(every: int | None, probability: float | None) -> None:
    if (every is None) == (probability is None):
        raise ConfigError(
            f"ShadowReplay: every is {every!r}, probability {probability!r}; expected exactly one of them"
        )
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ConfigError(f"every: {every!r} is not a whole number of at least 1")
    if probability is not None and not 0 < probability <= 1:
        raise ConfigError(f"probability: {probability!r} is not above 0 and at most 1")
