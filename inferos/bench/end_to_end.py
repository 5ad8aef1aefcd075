"""Whole-model decode: tokens/s and memory of stock ONNX Runtime and of inferos, stepped in turns in one process.

Every contender decodes greedily from its own random past, one token a turn. Of ONNX Runtime's ways to keep a cache of
one type, the quickest in a short trial is measured.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from inferos.bench.decoders import Greedy, InferosRows, RandomKv, Rows
from inferos.bench.memory import available_bytes, private_bytes
from inferos.bench.record import OURS, Peer, Row
from inferos.bench.statistics import fit_line, median_ratio
from inferos.bench.timing import Contender, Timing, interleave
from inferos.bench.weights import WeightBytes, weight_bytes
from inferos.config import Policy
from inferos.errors import ConfigError, InferosError
from inferos.kv import ReadBuffer, set_num_threads
from inferos.runtime.layout import ModelLayout
from inferos.runtime.session import open_session

if TYPE_CHECKING:
    from inferos.bench.peers.ort_decoder import StockForm, StockSession

__all__ = ["BASELINE", "EndToEnd", "EndToEndRow", "MODES", "Plan", "SCALE_CONTEXTS", "scaling", "spare_tokens"]

PEER = "ort"
BASELINE = "baseline"
MODES = (BASELINE, OURS)
SCALE_CONTEXTS = (8192, 65_536, 262_144, 1_048_576)  # tokens
MEASURED = "measured"
_SINGLE = "single rows"
_TRIAL_ROUNDS = 5
_READ_BYTES, _READ_COPIES, _READ_ROUNDS = 64 << 20, 4, 5  # parts are read in turn, so that none is in a cache
_SPARE_BYTES = 1 << 30  # left to the rest of the machine
# Bits that a cached value takes at most, scales included; the newest tokens are FP16 on top.
_BITS = {"f16": 17.0, "int8": 9.5, "k8v4": 7.5, "int4": 5.5}
_WINDOW = 192  # tokens
_LONGEST_STATUS = 200  # characters


class EndToEndRow(Row):
    """One contender at one context and batch. `context` is the mean over the steps measured.

    `fraction_of_read` counts `weight_bytes` and `bytes` together; ratios are those of time, medians over pairs of
    turns, CPU time with one thread and wall time with more.

    Parameters
    ----------
    model : str
    status : str
        "measured", or why not.
    way : str
        Of the peer's ways to keep such a cache, the one measured.
    tokens_per_s : float
        All rows together, at the median wall time.
    peak_bytes : int, optional
        Memory at most: weights mapped, and what session, caches and a step took.
    weight_bytes : int
        Weights that a step reads, as the model stores them.
    pairs : int
        Turns compared.
    ratio_vs_ort_fp32_interval, ratio_vs_ort_int8_interval : (float, float)
        95 % confidence interval of the median.
    ratio_vs_ort_int8 : float
        As `ratio_vs_ort_fp32`, against ONNX Runtime's quickest INT8 cache.
    allowed_vs_ort_fp32, allowed_vs_ort_int8 : float
        The ratio if both only read their weights and caches, at one speed.
    ratio_vs_single_rows : float
        Time of the same rows in runs of their own over the time of one run.
    """

    model: str
    status: str = MEASURED
    way: str | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    pairs: int | None = None
    ratio_vs_ort_fp32_interval: tuple[float, float] | None = None
    ratio_vs_ort_int8: float | None = None
    ratio_vs_ort_int8_interval: tuple[float, float] | None = None
    allowed_vs_ort_fp32: float | None = None
    allowed_vs_ort_int8: float | None = None
    ratio_vs_single_rows: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Parameters
    ----------
    contexts, batches : tuple of int
        Tokens; rows.
    modes : tuple of str
        Of `MODES`.
    formats : tuple of str
        inferos' formats.
    threads : int
    rounds : int
        Tokens of each contender.
    policy : Policy, optional
        Its `scheduler` places inferos' sessions; the processor unless given. The peer runs on the processor.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = MODES
    formats: tuple[str, ...] = ("int8", "k8v4", "int4")
    threads: int = 1
    rounds: int = 32
    policy: Policy | None = None


def spare_tokens(rounds: int) -> int:
    """Tokens that a model must hold beyond a context at which so many are measured."""
    return rounds + _TRIAL_ROUNDS + 4


class _DoesNotFitError(InferosError):
    """A contender's memory is not there; becomes its row's status."""


@dataclass(slots=True)
class _Entry:
    """A contender of one cell: rows over a session, and what both took."""

    impl: str
    kv: str
    rows: Rows
    way: str | None = None
    peak_bytes: int | None = None
    timing: Timing = field(default_factory=lambda: Timing(""))


def _gained(do: Callable[[], Any]) -> tuple[Any, int | None]:
    """What `do` gives, and the private memory that the process gained meanwhile."""
    before = private_bytes()
    result = do()
    after = private_bytes()
    return result, None if before is None or after is None else max(0, after - before)


class EndToEnd:
    """The benchmark of one model. Sessions stay open between its cells; close it at the end.

    Parameters
    ----------
    layout : ModelLayout
    name : str
        What the rows call the model.
    plan : Plan

    Raises
    ------
    ConfigError
        If a context does not fit into the model's, or a baseline is asked of a rewritten model.
    """

    def __init__(self, layout: ModelLayout, name: str, plan: Plan) -> None:
        longest = max(plan.contexts)
        if longest + spare_tokens(plan.rounds) > layout.context_length:
            raise ConfigError(
                f"context: {longest} tokens and {plan.rounds} more are more than the model's {layout.context_length}"
            )
        if layout.rewritten and BASELINE in plan.modes:
            raise ConfigError(f"compare modes: baseline needs the model as exported; {name} is a rewritten one")
        self._layout, self._name, self._plan = layout, name, plan
        self._weights: WeightBytes = weight_bytes(layout)
        self._random = RandomKv()
        self._read = ReadBuffer(_READ_BYTES * _READ_COPIES)
        self._ours: Any = None
        self._stock: dict[StockForm, StockSession] = {}
        self._session_bytes: dict[object, int | None] = {}
        self._left_at_first = math.inf
        self.measurements: list[dict[str, Any]] = []

    def peers(self) -> list[Peer]:
        """What was compared with."""
        from inferos.bench.peers.ort import version

        if BASELINE not in self._plan.modes:
            return []
        return [Peer(name=PEER, status=MEASURED, version=version())]

    def cells(self, progress: Callable[[int], object] | None = None) -> Iterator[list[EndToEndRow]]:
        """The rows of one context and batch after the other.

        Parameters
        ----------
        progress : callable, optional
            Called with 1 for each of `turns`.
        """
        for context in self._plan.contexts:
            for batch in self._plan.batches:
                yield self._cell(context, batch, progress)

    def turns(self) -> int:
        """How often `progress` will be called at most."""
        ours = len(self._plan.formats) if OURS in self._plan.modes else 0
        theirs = 2 if BASELINE in self._plan.modes else 0
        per_context = sum(theirs + ours * (2 if batch > 1 else 1) for batch in self._plan.batches)
        return per_context * self._plan.rounds * len(self._plan.contexts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free sessions."""
        self._ours = None
        self._stock.clear()

    # One cell.

    def _cell(self, context: int, batch: int, progress: Callable[[int], object] | None) -> list[EndToEndRow]:
        steps = self._plan.rounds + 2
        filled = max(1, context - steps // 2)
        entries: list[_Entry] = []
        missing: list[EndToEndRow] = []
        self._left_at_first = self._left()
        with contextlib.ExitStack() as opened:
            for impl, kv, build in self._builders():
                try:
                    entries += build(filled, batch, opened)
                except InferosError as error:
                    missing.append(
                        self._row(impl, kv, context, batch, status=" ".join(str(error).split())[:_LONGEST_STATUS])
                    )
            self._measure(entries, batch, progress)
            return [*self._rows(entries, self._read_seconds(), context, batch), *missing]

    def _builders(self) -> Iterator[tuple[str, str, Callable[[int, int, contextlib.ExitStack], list[_Entry]]]]:
        if OURS in self._plan.modes:
            for kv in self._plan.formats:
                yield OURS, kv, functools.partial(self._build_ours, kv)
        if BASELINE in self._plan.modes:
            for kv in ("model", "int8"):
                yield PEER, self._stock_kv(kv), functools.partial(self._build_stock, kv)

    def _stock_kv(self, kv: str) -> str:
        return {"float32": "fp32", "float16": "fp16"}[self._layout.dtype] if kv == "model" else kv

    def _elements(self, tokens: int) -> int:
        """K and V values of a row."""
        return sum(2 * layer.kv_heads * layer.head_dim * tokens for layer in self._layout.layers)

    def _left(self) -> float:
        """Bytes for caches and sessions. Mapped weights count as available; without them tokens come from the disk."""
        available = available_bytes()
        return math.inf if available is None else max(0, available - self._weights.mapped - _SPARE_BYTES)

    def _require(self, needed: int) -> None:
        left = self._left()
        if needed > left:
            beside = "beside the others" if needed <= self._left_at_first else "on this machine"
            raise _DoesNotFitError(
                f"does not fit {beside}: needs {needed / 1e6:.0f} MB more, {left / 1e6:.0f} MB are left"
            )

    def _session(self, key: object, opener: Callable[[], Any]) -> Any:
        """A new session, its private memory noted."""
        self._require(0 if self._weights.shared else self._weights.mapped)
        session, self._session_bytes[key] = _gained(opener)
        return session

    def _build_ours(self, kv: str, filled: int, batch: int, opened: contextlib.ExitStack) -> list[_Entry]:
        if self._ours is None:
            threads, policy = self._plan.threads, self._plan.policy
            self._ours = self._session(OURS, lambda: open_session(self._layout, threads=threads, policy=policy))
        self._require(int(batch * (_BITS[kv] * self._elements(filled) + 16 * self._elements(_WINDOW)) / 8))
        rows = InferosRows.filled(self._ours, kv, batch, filled, self._random)
        opened.callback(rows.close)
        entries = [_Entry(OURS, kv, rows, peak_bytes=self._peak(OURS, rows, batch))]
        if batch > 1:
            apart = rows.apart()
            opened.callback(apart.close)
            entries.append(_Entry(_SINGLE, kv, apart))
        return entries

    def _build_stock(self, kv: str, filled: int, batch: int, opened: contextlib.ExitStack) -> list[_Entry]:
        from inferos.bench.peers.ort_decoder import StockRows, StockSession, forms

        ways = forms(kv, self._plan.threads)
        capacity = filled + spare_tokens(self._plan.rounds)
        width = 1 if kv == "int8" else {"float32": 4, "float16": 2}[self._layout.dtype]
        self._require(width * batch * self._elements(capacity))
        for form in ways:
            if form not in self._stock:
                opener = functools.partial(StockSession, self._layout, form, self._plan.threads)
                self._stock[form] = self._session(form, opener)
        buffers = self._stock[ways[0]].buffers(batch, capacity, filled, self._random)
        # They come one after the other at the same positions, so one set of buffers serves them all.
        tried = {form: StockRows(self._stock[form], buffers, filled) for form in ways}
        for rows in tried.values():
            opened.callback(rows.close)
        best = self._trial(tried, batch)
        tried[best].length = filled
        return [_Entry(PEER, self._stock_kv(kv), tried[best], best.way, self._peak(best, tried[best], batch))]

    def _trial(self, tried: dict[StockForm, Any], batch: int) -> StockForm:
        forms = list(tried)
        contenders = [Contender(form.way, Greedy(rows, batch)) for form, rows in tried.items()]
        timings = interleave(contenders, rounds=_TRIAL_ROUNDS)
        for form, timing in zip(forms, timings, strict=True):
            self.measurements.append(
                {
                    "impl": PEER,
                    "kv": self._stock_kv(form.kv),
                    "way": form.way,
                    "context": tried[form].length,
                    "batch": batch,
                    **_summary(timing),
                }
            )
        return forms[min(range(len(forms)), key=lambda i: self._best(timings[i]))]

    def _peak(self, session: object, rows: Rows, batch: int) -> int | None:
        """Memory after a first step: weights, what the session took, the caches, and what the step took."""
        opened = self._session_bytes.get(session)
        _, step = _gained(Greedy(rows, batch))
        return None if opened is None or step is None else self._weights.mapped + opened + rows.held_bytes + step

    def _measure(self, entries: list[_Entry], batch: int, progress: Callable[[int], object] | None) -> None:
        """Fill in the entries' timings."""
        contenders = [Contender(f"{e.impl} {e.kv}", Greedy(e.rows, batch)) for e in entries]
        timings = interleave(contenders, rounds=self._plan.rounds, turn_seconds=0.0, progress=progress)
        for entry, timing in zip(entries, timings, strict=True):
            entry.timing = timing

    def _read_seconds(self) -> float:
        """Time to read a byte of memory. By itself: whoever came after it in turns would find the caches worse."""
        set_num_threads(self._plan.threads)
        read = Contender("read", lambda copy: self._read.read(copy * _READ_BYTES, _READ_BYTES), _READ_COPIES)
        (timing,) = interleave([read], rounds=_READ_ROUNDS)
        return self._best(timing) / _READ_BYTES

    # What was measured, as rows.

    def _best(self, timing: Timing) -> float:
        return timing.cpu_best if self._plan.threads == 1 else timing.wall_best

    def _series(self, timing: Timing) -> list[float]:
        return timing.cpu if self._plan.threads == 1 else timing.wall

    def _rows(self, entries: list[_Entry], per_byte: float, context: int, batch: int) -> list[EndToEndRow]:
        single = {entry.kv: entry for entry in entries if entry.impl == _SINGLE}
        stock = {entry.kv: entry for entry in entries if entry.impl == PEER}
        rows = []
        for entry in entries:
            if entry.impl != _SINGLE:
                values = self._values(entry, stock, per_byte, batch)
                if entry.impl == OURS and entry.kv in single:
                    pairs = self._series(single[entry.kv].timing), self._series(entry.timing)
                    values["ratio_vs_single_rows"] = median_ratio(*pairs)[0]
                rows.append(self._row(entry.impl, entry.kv, context, batch, **values))
                self.measurements.append(
                    {"impl": entry.impl, "kv": entry.kv, "way": entry.way, "context": context, "batch": batch}
                    | _summary(entry.timing)
                )
        return rows

    def _values(self, entry: _Entry, stock: dict[str, _Entry], per_byte: float, batch: int) -> dict[str, Any]:
        weights, cached = self._weights.read, entry.rows.kv_bytes
        values: dict[str, Any] = {
            "way": entry.way,
            "ms_cpu_best": 1e3 * entry.timing.cpu_best,
            "ms_wall_median": 1e3 * entry.timing.wall_median,
            "bytes": cached,
            "weight_bytes": weights,
            "peak_bytes": entry.peak_bytes,
            "tokens_per_s": batch / entry.timing.wall_median,
            "fraction_of_read": per_byte * (weights + cached) / self._best(entry.timing),
            "pairs": len(entry.timing.cpu),
        }
        for key, kv in (("fp32", self._stock_kv("model")), ("int8", "int8")):
            if kv in stock:
                ratio, interval = median_ratio(self._series(stock[kv].timing), self._series(entry.timing))
                values[f"ratio_vs_ort_{key}"] = ratio
                values[f"ratio_vs_ort_{key}_interval"] = interval
                values[f"allowed_vs_ort_{key}"] = (weights + stock[kv].rows.kv_bytes) / (weights + cached)
        return values

    def _row(self, impl: str, kv: str, context: int, batch: int, **values: Any) -> EndToEndRow:
        layers = self._layout.layers
        return EndToEndRow(
            model=self._name,
            impl=impl,
            kv=kv,
            heads=layers[0].heads,
            kv_heads=layers[0].kv_heads,
            head_dim=layers[0].head_dim,
            context=context,
            batch=batch,
            threads=self._plan.threads,
            **values,
        )


def _summary(timing: Timing) -> dict[str, float]:
    return {
        "ms_cpu_best": 1e3 * timing.cpu_best,
        "ms_cpu_median": 1e3 * timing.cpu_median,
        "ms_wall_best": 1e3 * timing.wall_best,
        "ms_wall_median": 1e3 * timing.wall_median,
    }


def scaling(rows: Sequence[EndToEndRow]) -> dict[str, Any] | None:
    """The line of milliseconds a token over the bytes of the cache, through rows of one format; None below two rows.

    CPU time with one thread, median wall time with more.
    """
    points = [(row.bytes, row.ms_cpu_best if row.threads == 1 else row.ms_wall_median) for row in rows]
    known = [(float(x), y) for x, y in points if x is not None and y is not None]
    if len(known) < 2:
        return None
    line = fit_line([x for x, _ in known], [y for _, y in known])
    return {
        "ms_per_gb": line.slope * 1e9,
        "ms_without_cache": line.intercept,
        "residuals_ms": list(line.residuals),
        "worst_relative_residual": line.worst_relative_residual,
    }
