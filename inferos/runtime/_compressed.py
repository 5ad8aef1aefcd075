"""The compressed session: one ONNX Runtime session over the rewritten graph, one native cache per sequence."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Sequence as Collection
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from inferos.errors import BusyError, ClosedError, InferosError, ProviderError, RewindError, ShapeError
from inferos.kv import Arena, KVCache, LayerSpec
from inferos.runtime._ort import ORT_ERRORS, check_ids, chunks
from inferos.runtime._reviews import QualitySource, Reviews
from inferos.runtime._runner import open_runner
from inferos.runtime._step_inputs import OneToken, step_inputs
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.failover import EngineState, RobustFallbackManager
from inferos.runtime.failover.steps import StepFailover
from inferos.runtime.layout import ModelLayout
from inferos.runtime.placer import Placer
from inferos.runtime.protocols import Engine, Float32, Ids, Role, TokenSequence
from inferos.runtime.routes import Routes

__all__ = ["CompressedSequence", "CompressedSession"]


_ROLES: tuple[Role, Role] = ("prefill", "decode")


class CompressedSession:
    """A decoder whose attention keeps K and V in inferos' cache.

    `rules` may be replaced at any time: new sequences are opened by them, and open ones follow from their next review
    on, as far as an open cache can: its sinks, its scorer and a fixed format stay. `measured_delta_ppl` is asked for
    the newest measured delta PPL before a review whose thresholds move. `routes` are the engines that run its steps;
    one on the CPU unless given, and a `placer` changes their order; `failover` runs a step on the next one where one
    fails.

    Thread-safe over different sequences; a sequence is used by one thread at a time (`BusyError` otherwise).
    """

    def __init__(
        self,
        layout: ModelLayout,
        *,
        rules: CacheRules,
        arena: Arena,
        threads: int,
        prefill_chunk: int,
        routes: Routes | None = None,
        failover: StepFailover | None = None,
    ) -> None:
        self.layout = layout
        self.arena = arena
        self.prefill_chunk = prefill_chunk
        self.rules = rules
        self.measured_delta_ppl: QualitySource = lambda: None
        self.placer: Placer | None = None
        self.iobinding = True  # whether its engines bind the arrays of a decode step
        self.sequence().close()  # wrong options show here, before the weights are read
        self.routes = Routes([open_runner(layout, threads=threads)]) if routes is None else routes
        self.failover = StepFailover(RobustFallbackManager()) if failover is None else failover

    @property
    def kv(self) -> str:
        """What older tokens are kept in: f16, int8, k8v4, int4 or auto. Of sequences that are opened now."""
        return self.rules.kv

    @property
    def vocab_size(self) -> int:
        """Logits per token."""
        return self.layout.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens the model can hold."""
        return self.layout.context_length

    @property
    def trims(self) -> bool:
        """Whether a prompt gives logits for its last token only."""
        # Engines behind the first may not be open.
        return bool(self.layout.logits_to_keep) or self.routes.prefill[0].trims

    def engine_states(self) -> dict[Role, tuple[EngineState, ...]]:
        """Engines in the order in which the next step of a role would try them; those that hang come last."""
        health, found = self.failover.manager.health, dict[Role, tuple[EngineState, ...]]()
        for role in _ROLES:
            engines = self.routes.of(role)
            order = health.order(engines)
            found[role] = health.states([*order, *(engine for engine in engines if engine not in order)])
        return found

    def prefer(self, device: str) -> None:
        """Run prefill and decode on the engines of a device first, from the next step on.

        Raises
        ------
        ProviderError
            If a role has none; nothing is changed.
        """
        orders = [sorted(self.routes.of(role), key=lambda e: e.device != device) for role in _ROLES]
        if any(order[0].device != device for order in orders):
            raise ProviderError(f"no engine of this session runs on {device}")
        self.routes.place(prefill=orders[0], decode=orders[1])

    def sequence(self) -> CompressedSequence:
        """A new, empty sequence."""
        return self.sequence_of(self.rules, self.arena)

    def sequence_of(self, rules: CacheRules, arena: Arena) -> CompressedSequence:
        """A new sequence kept by `rules` in `arena`, until the session's own rules are replaced."""
        reviews = Reviews(rules, self.rules, lambda: self.measured_delta_ppl())
        layers = [LayerSpec(layer.kv_heads, layer.head_dim, layer.local_window) for layer in self.layout.layers]
        cache = KVCache(layers, arena=arena, max_tokens=self.layout.context_length, **rules.options())
        return CompressedSequence(self, cache, reviews)

    def beside(self, *, kv: str | None = None, budget_bytes: int = 0) -> CompressedSession:
        """The same model and weights over caches that take nothing from this session's budget.

        Parameters
        ----------
        kv : str, optional
            The format of its caches; this session's own unless given. f16 is uncompressed.
        budget_bytes : int
            Bytes that its sequences may hold together; 0 = no limit.
        """
        other = copy.copy(self)
        other.rules = self.rules if kv is None else replace(self.rules, kv=kv)
        other.arena = Arena(budget_bytes)
        other.sequence().close()
        return other

    def apart(self, engine: Engine) -> CompressedSession:
        """The same model on one engine alone, over uncompressed caches that take nothing from this session's budget."""
        other = self.beside(kv="f16")
        other.routes = Routes([engine])
        return other

    def step(self, sequences: Collection[TokenSequence], ids: Ids) -> Float32:
        """One token for each sequence, in one run; see `DecoderSession.step`.

        A graph that counts positions from one length for all rows is run once for each length.

        Raises
        ------
        ShapeError
            If a sequence is of another session, or ids are not one per sequence.
        BusyError
            If a sequence is given twice or used by another thread.
        """
        rows = [row for row in sequences if isinstance(row, CompressedSequence) and row.session is self]
        tokens = np.asarray(ids)
        if len(rows) != len(sequences) or tokens.shape != (len(rows),):
            raise ShapeError(f"step: ids of shape {tokens.shape} for {len(rows)} sequences of this session")
        if not rows:
            return np.zeros((0, self.vocab_size), np.float32)
        for row, token in zip(rows, tokens, strict=True):
            check_ids([token], self.layout, row.length)
        with contextlib.ExitStack() as held:
            turns = [held.enter_context(row.turn()) for row in rows]
            for turn in turns:
                turn.sequence.reviews.before_step(turn.cache, 1, self.rules)
            run = self._run_by_length if self.layout.shared_positions else self.run
            logits = run(turns, tokens.astype(np.int64)[:, None])
            _commit(turns)
            last: Float32 = logits[:, -1].astype(np.float32, copy=False)
            return last

    def _run_by_length(self, turns: list[Turn], ids: Ids) -> npt.NDArray[Any]:
        """As `run`, once for the rows of each length."""
        logits = np.empty((len(turns), 1, self.vocab_size), np.float32)
        for length in sorted({turn.past for turn in turns}):
            rows = [row for row, turn in enumerate(turns) if turn.past == length]
            logits[rows] = self.run([turns[row] for row in rows], ids[rows])[:, -1:]
        return logits

    def run(self, turns: Collection[Turn], ids: Ids, *, keep_all: bool = False) -> npt.NDArray[Any]:
        """Logits (rows, tokens, vocab_size) of one run over ids (rows, tokens). Commits nothing.

        Unless `keep_all`, those of all but the last token may be left out. Several tokens of a prompt are prefill;
        one token a row, and tokens whose logits are all wanted, are decoding.

        Raises
        ------
        InferosError
            What failed inside the cache; ProviderError for everything else. The step is dropped.
        """
        role: Role = "decode" if keep_all or ids.shape[1] == 1 else "prefill"
        step = _Step(self.layout, turns, ids, keep_all)
        engines = self.routes.of(role)
        preferred = engines[0]
        if len(engines) > 1:
            return self.failover.run(engines, step)
        try:
            return preferred.run(step.feeds(preferred))
        except ORT_ERRORS as error:
            raise _typed(turns, error) from error


class _Step:
    """A `Step` of rows that are in use; ids (rows, tokens)."""

    __slots__ = ("_ids", "_keep_all", "_layout", "_turns")

    def __init__(self, layout: ModelLayout, turns: Collection[Turn], ids: Ids, keep_all: bool) -> None:
        self._layout = layout
        self._turns = turns
        self._ids = ids
        self._keep_all = keep_all

    def feeds(self, engine: Engine) -> dict[str, npt.NDArray[Any]]:
        turns, ids = self._turns, self._ids
        if ids.size == 1:
            turn = turns[0]
            return turn.sequence.one_token().fill(engine, turn.past, turn.handle, ids[0, 0])
        past, handles = [turn.past for turn in turns], [turn.handle for turn in turns]
        return step_inputs(engine, self._layout, past, handles, ids, keep_all=self._keep_all)

    def typed(self, error: Exception) -> InferosError:
        return _typed(self._turns, error)

    def forsaken(self) -> None:
        for turn in self._turns:
            turn.sequence.take_from_run(turn)


class Turn:
    """One use of a sequence, from taking it to the commit or the rollback; void once the sequence is abandoned."""

    __slots__ = ("cache", "handle", "past", "sequence")

    def __init__(self, sequence: CompressedSequence) -> None:
        self.sequence = sequence
        self.cache = sequence.cache
        self.handle = self.past = 0

    def __enter__(self) -> Self:
        self.sequence.take(self)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.sequence.give_back(self, failed=kind is not None)


class CompressedSequence:
    """Tokens of one conversation and their cache."""

    def __init__(self, session: CompressedSession, cache: KVCache, reviews: Reviews) -> None:
        self.session = session
        self.cache = cache
        self.reviews = reviews
        self._turn: Turn | None = None
        self._one_token: OneToken | None = None
        self._newest = np.zeros((1, 1), np.int64)  # the id of a one-token step; copied into the inputs
        self._guard = threading.Lock()  # over _turn and what is done on its strength; never held while the model runs

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.cache.length

    @property
    def kv_bytes(self) -> int:
        """Bytes of its blocks in the arena; blocks that a fork shares count for each."""
        return self.cache.stats().total_bytes

    @property
    def kv_elements(self) -> int:
        """K and V values held."""
        return self.cache.stats().elements

    def feed(self, ids: Ids) -> Float32:
        """Logits (vocab_size,) after the last id. See `TokenSequence.feed`."""
        return self._feed_one(ids) if np.asarray(ids).size == 1 else self._feed(ids, keep_all=False)[-1]

    def feed_all(self, ids: Ids) -> Float32:
        """Logits (tokens, vocab_size) after each id. See `TokenSequence.feed_all`."""
        return self._feed(ids, keep_all=True)

    def rewind(self, length: int) -> None:
        """Forget positions >= length. A packed block stays packed, with fewer valid tokens.

        Raises
        ------
        RewindError
            If `length` is beyond the tokens held, or before what a sliding window still holds.
        """
        with self.turn():
            self.cache.rewind(length)

    def fork(self) -> CompressedSequence:
        """A second sequence with the same tokens; packed blocks are shared."""
        with self.turn():
            return CompressedSequence(self.session, self.cache.fork(), self.reviews.fork())

    def close(self) -> None:
        """Free the cache; a run in flight fails with ClosedError."""
        with self._guard:
            self._turn = None
            self.cache.close()

    def abandon(self) -> None:
        """Take the sequence away from a run that hangs.

        The sequence is back at its committed length and usable at once; the run may finish late, but cannot write
        any more, and ends in ClosedError.
        """
        with self._guard:
            self._turn = None
            self._one_token = None  # the run may still read it
            self.cache.abandon()

    def turn(self) -> Turn:
        """Exclusive use, in a ``with`` block; one that fails rolls the open step back. BusyError on entering."""
        return Turn(self)

    # Every step takes the guard three times, by hand: a `with` block makes two objects each time.

    def take(self, turn: Turn) -> None:
        """Begin a turn."""
        self._guard.acquire()
        try:
            if self._turn is not None:
                raise BusyError("the sequence is in use by another call")
            turn.handle, turn.past = self.cache.handle, self.cache.length  # ClosedError: no turn has begun
            self._turn = turn
        finally:
            self._guard.release()

    def give_back(self, turn: Turn, *, failed: bool) -> None:
        """End a turn, if it still is one."""
        self._guard.acquire()
        try:
            if self._turn is not turn:
                return
            self._turn = None
            if failed:
                self.cache.rollback()
        finally:
            self._guard.release()

    def one_token(self) -> OneToken:
        """The arrays that feed a step of one token."""
        if self._one_token is None:
            self._one_token = OneToken(self.session.layout)
        return self._one_token

    def holds(self, turn: Turn) -> bool:
        """Whether the turn may still write."""
        return self._turn is turn

    def take_from_run(self, turn: Turn) -> None:
        """Go on with the turn under a new handle, at the committed length; a run under the old one cannot write."""
        with self._guard:
            if self._turn is turn:  # else closed or abandoned, which does the same
                self._one_token = None  # the run may still read it
                self.cache.abandon()
                turn.handle = self.cache.handle

    def commit(self, turn: Turn) -> None:
        """Make the step of a run that succeeded part of the sequence."""
        self._guard.acquire()
        try:
            if self._turn is not turn:
                raise ClosedError("the sequence was closed or abandoned while the model ran")
            self.cache.commit()
            turn.past = self.cache.length
        finally:
            self._guard.release()

    def _feed_one(self, ids: Ids) -> Float32:
        session = self.session
        with self.turn() as turn:
            token = check_ids(ids, session.layout, turn.past)
            self.reviews.before_step(turn.cache, 1, session.rules)
            np.copyto(self._newest, token)
            logits = session.run((turn,), self._newest)
            self.commit(turn)
            last: Float32 = logits[0, -1].astype(np.float32, copy=False)
            return last

    def _feed(self, ids: Ids, *, keep_all: bool) -> Float32:
        session = self.session
        step = session.layout.tokens_per_run(session.prefill_chunk, keep_all=keep_all)
        shown = session.vocab_size if keep_all or not session.trims else 1  # logits per token
        rows = []
        with self.turn() as turn:
            start = turn.past
            ids = check_ids(ids, session.layout, start)
            try:
                for chunk in chunks(ids, step, shown):
                    self.reviews.before_step(turn.cache, len(chunk), session.rules)
                    logits = session.run([turn], chunk[None, :], keep_all=keep_all)[0]
                    self.commit(turn)
                    # Of many logits one row is kept, not a view that keeps all of them.
                    kept = logits if keep_all or len(logits) == 1 else logits[-1:].copy()
                    rows.append(kept.astype(np.float32, copy=False))
            except BaseException:
                self._undo(turn, start)
                raise
        return np.concatenate(rows) if len(rows) > 1 and keep_all else rows[-1]

    def _undo(self, turn: Turn, start: int) -> None:
        """Drop the chunks that were committed before one failed."""
        with self._guard:
            if self._turn is not turn or turn.past == start:
                return
            self.cache.rollback()
            # A sliding window may have let go of what lies before: then the chunks that succeeded stay.
            with contextlib.suppress(RewindError):
                self.cache.rewind(start)


def _commit(turns: list[Turn]) -> None:
    """All rows or none."""
    done: list[Turn] = []
    starts = [turn.past for turn in turns]
    try:
        for turn in turns:
            turn.sequence.commit(turn)
            done.append(turn)
    except InferosError:
        for turn, start in zip(done, starts, strict=False):
            turn.cache.rewind(start)
        raise


def _typed(turns: Collection[Turn], error: Exception) -> InferosError:
    """The error that the op kept on a handle; ONNX Runtime itself only passes on its text."""
    if not all(turn.sequence.holds(turn) for turn in turns):
        return ClosedError("the sequence was closed or abandoned while the model ran")
    for turn in turns:
        kept = turn.cache.take_error()
        if kept is not None and str(kept) in str(error):  # not one left behind by another call
            return kept
    if isinstance(error, ProviderError):
        return error
    return ProviderError(f"the model failed: {error}")
