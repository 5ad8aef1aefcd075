"""Decode and prefill attention: inferos through its public API, its peers, and reading the same bytes, in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from inferos.bench import peers
from inferos.bench.problem import Entrant, Offer, Problem, SharedData
from inferos.bench.record import OURS, Peer, Report, Row, environment, load_average
from inferos.bench.timing import Contender, Timing, interleave
from inferos.kv import KVCache, LayerSpec, ReadBuffer, get_num_threads, set_num_threads
from inferos.kv.reading import READ_STEP

__all__ = ["Job", "KV_FORMATS", "READ", "Watcher", "run", "steps"]

KV_FORMATS = ("f16", "int8", "k8v4", "int4")
READ = "read"
_LONGEST_REASON = 200  # characters
_CHUNK = 512  # tokens appended at a time while a cache is filled
_ORT_FP32 = ("ort", "fp32")


class Watcher(Protocol):
    """Told how a job goes."""

    def advance(self, amount: int) -> None:
        """That many more of `steps` are done."""

    def describe(self, text: str) -> None:
        """What is done now."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything one run measures.

    Parameters
    ----------
    bench : "decode" or "prefill"
    problems : sequence of Problem
    kv : sequence of str
        Formats of `KV_FORMATS`.
    peers : sequence of str
        Names of `peers.PEERS`.
    rounds : int
        Turns of each contender on each problem.
    """

    bench: Literal["decode", "prefill"]
    problems: Sequence[Problem]
    kv: Sequence[str]
    peers: Sequence[str]
    rounds: int


@dataclass(slots=True)
class _Outcome:
    """What is known so far."""

    rows: list[Row] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # peer -> reason -> formats


def run(job: Job, watcher: Watcher) -> Report:
    """Measure all problems of a job.

    Returns
    -------
    Report
        With a row for every implementation and format; a peer that is not installed is named as such.
    """
    before = load_average()
    versions = {name: peers.load(name).version() for name in job.peers}
    outcome = _Outcome()
    threads = get_num_threads()
    try:
        for problem in job.problems:
            _measure(job, problem, [name for name in job.peers if versions[name] is not None], outcome, watcher)
    finally:
        set_num_threads(threads)
    return Report(
        bench=job.bench,
        environment=environment(before),
        settings={
            "shapes": list(dict.fromkeys(str(problem.shape) for problem in job.problems)),
            "kv": list(job.kv),
            "rounds": job.rounds,
        },
        peers=[Peer(name=name, status=_status(name, versions, outcome), version=versions[name]) for name in job.peers],
        rows=outcome.rows,
        measurements=outcome.measurements,
    )


def steps(job: Job) -> int:
    """How far a watcher's `advance` counts."""
    installed = [name for name in job.peers if peers.load(name).version() is not None]
    return sum(len(_offers(job, problem, installed)) * (job.rounds + 1) for problem in job.problems)


def _status(name: str, versions: dict[str, str | None], outcome: _Outcome) -> str:
    if versions[name] is None:
        return "not installed"
    faults = [f"{', '.join(formats)}: {reason}" for reason, formats in outcome.faults.get(name, {}).items()]
    if any(row.impl == name for row in outcome.rows):
        return "; ".join(["measured", *(f"but not {fault}" for fault in faults)])
    return f"failed: {'; '.join(faults)}" if faults else "not part of this benchmark"


def _offers(job: Job, problem: Problem, installed: Sequence[str]) -> list[Offer]:
    data = SharedData(problem)
    found = [Offer(OURS, kv, "", _ours_builder(problem, kv)) for kv in job.kv]
    for name in installed:
        found += peers.load(name).offers(problem, data)
    return found


def _measure(job: Job, problem: Problem, installed: Sequence[str], outcome: _Outcome, watcher: Watcher) -> None:
    """One problem: build everybody, time everybody in turns, let everything go."""
    where = f"{problem.shape} at {problem.context}"
    offers, entrants = [], []
    for offer in _offers(job, problem, installed):
        watcher.describe(f"{where}: {offer.name}")
        entrant = _built(offer, outcome)
        if entrant is None:
            watcher.advance(job.rounds + 1)
            continue
        watcher.advance(1)
        offers.append(offer)
        entrants.append(entrant)
    watcher.describe(where)
    set_num_threads(problem.threads)
    readers = _readers([entrant.bytes for entrant in entrants[: len(job.kv)]])
    contenders = [entrant.contender for entrant in (*entrants, *readers)]
    timings = interleave(contenders, rounds=job.rounds, progress=watcher.advance)
    _report(problem, offers, entrants, timings, readers, outcome)
    del offers, entrants, readers, contenders
    gc.collect()  # sessions and their buffers refer to each other


def _built(offer: Offer, outcome: _Outcome) -> Entrant | None:
    """An offer made good and tried once; None, and a fault noted, where a peer cannot."""
    if offer.impl == OURS:
        return offer.build()
    try:
        entrant = offer.build()
        entrant.contender.call(0)
    except Exception as error:  # noqa: BLE001 - whatever another implementation raises is its own failure, not ours
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        formats = outcome.faults.setdefault(offer.impl, {}).setdefault(reason, [])
        if offer.kv not in formats:
            formats.append(offer.kv)
        return None
    return entrant


def _ours_builder(problem: Problem, kv: str) -> Callable[[], Entrant]:
    return lambda: _ours(problem, kv)


def _ours(problem: Problem, kv: str) -> Entrant:
    """A sequence per row of the batch, a layer per copy, filled with random K and V through the public API.

    A call appends the new tokens to a layer and attends; between turns the step is rolled back, so that all are alike.
    """
    shape = problem.shape
    layer = LayerSpec(shape.kv_heads, shape.head_dim)
    copies = problem.copies(_estimate(problem, kv))
    sequences = [KVCache([layer] * copies, kv=kv) for _ in range(problem.batch)]
    for sequence in sequences:
        _fill(sequence, problem.past, copies, shape.kv_heads, shape.head_dim)
    query = problem.query()
    k, v = problem.new_kv()

    def before() -> None:
        for sequence in sequences:
            sequence.rollback()
            sequence.begin(problem.tokens)

    def call(copy: int) -> None:
        for row, sequence in enumerate(sequences):
            sequence.append(copy, k[row], v[row])
            sequence.attend(copy, query[row])

    before()
    for copy in range(copies):  # the step after the last fill packs what left the window
        for row, sequence in enumerate(sequences):
            sequence.append(copy, k[row], v[row])
    size = sum(sequence.stats().total_bytes for sequence in sequences) // copies
    return Entrant(Contender(OURS, call, copies, before), size)


def _estimate(problem: Problem, kv: str) -> int:
    """Bytes of one copy from below: codes only, FP16 tokens left out."""
    bits = {"f16": 32, "int8": 16, "k8v4": 12, "int4": 8}[kv]
    return problem.elements * bits // 8


def _fill(sequence: KVCache, tokens: int, layers: int, kv_heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, min(_CHUNK, max(1, tokens)), kv_heads, head_dim), dtype=np.float32)
    for start in range(0, tokens, _CHUNK):
        count = min(_CHUNK, tokens - start)
        sequence.begin(count)
        for layer in range(layers):
            sequence.append(layer, k[:count], v[:count])
        sequence.commit()


def _readers(sizes: Sequence[int]) -> list[Entrant]:
    """Reading as many bytes as each of our formats has; all in one buffer."""
    from inferos.bench.timing import copies_for

    rounded = sorted({-(-size // READ_STEP) * READ_STEP for size in sizes})
    buffer = ReadBuffer(max(copies_for(size) * size for size in rounded))
    return [_reader(buffer, size) for size in rounded]


def _reader(buffer: ReadBuffer, size: int) -> Entrant:
    return Entrant(Contender(READ, lambda copy: buffer.read(copy * size, size), buffer.size // size), size)


def _report(
    problem: Problem,
    offers: Sequence[Offer],
    entrants: Sequence[Entrant],
    timings: Sequence[Timing],
    readers: Sequence[Entrant],
    outcome: _Outcome,
) -> None:
    """Add the rows and measurements of one problem."""
    rates = {
        reader.bytes: reader.bytes / _seconds(timing, problem)
        for reader, timing in zip(readers, timings[len(entrants) :], strict=True)
    }
    best: dict[tuple[str, str], tuple[Entrant, Timing]] = {}
    for offer, entrant, timing in zip(offers, entrants, timings, strict=False):
        outcome.measurements.append(_measurement(problem, offer.impl, offer.kv, offer.way, entrant.bytes, timing))
        known = best.get((offer.impl, offer.kv))
        if known is None or _seconds(timing, problem) < _seconds(known[1], problem):
            best[offer.impl, offer.kv] = (entrant, timing)
    for reader, timing in zip(readers, timings[len(entrants) :], strict=True):
        outcome.measurements.append(_measurement(problem, READ, None, "", reader.bytes, timing))
    stock = best.get(_ORT_FP32)
    for (impl, kv), (entrant, timing) in best.items():
        seconds = _seconds(timing, problem)
        nearest = min(rates, key=lambda size: abs(math.log(size / entrant.bytes)))
        outcome.rows.append(
            Row(
                impl=impl,
                kv=kv,
                **_place(problem),
                ms_cpu_best=timing.cpu_best * 1e3,
                ms_wall_median=timing.wall_median * 1e3,
                bytes=entrant.bytes,
                fraction_of_read=entrant.bytes / rates[nearest] / seconds if seconds else None,
                ratio_vs_ort_fp32=_seconds(stock[1], problem) / seconds if stock and seconds else None,
            )
        )


def _seconds(timing: Timing, problem: Problem) -> float:
    """What is compared: CPU time, which others on the machine disturb least; with several threads, elapsed time."""
    return timing.cpu_best if problem.threads == 1 else timing.wall_best


def _place(problem: Problem) -> dict[str, int]:
    return {
        "heads": problem.shape.heads,
        "kv_heads": problem.shape.kv_heads,
        "head_dim": problem.shape.head_dim,
        "context": problem.context,
        "batch": problem.batch,
        "threads": problem.threads,
    }


def _measurement(problem: Problem, impl: str, kv: str | None, way: str, size: int, timing: Timing) -> dict[str, Any]:
    return {
        "impl": impl,
        "kv": kv,
        "way": way,
        **_place(problem),
        "tokens": problem.tokens,
        "bytes": size,
        "calls": len(timing.cpu),
        "ms_cpu_best": timing.cpu_best * 1e3,
        "ms_cpu_median": timing.cpu_median * 1e3,
        "ms_wall_best": timing.wall_best * 1e3,
        "ms_wall_median": timing.wall_median * 1e3,
        "gb_per_s": size / _seconds(timing, problem) / 1e9 if _seconds(timing, problem) else None,
    }
