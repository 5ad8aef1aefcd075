"""What importance costs: a cache that scores, reviews and decides, beside one that holds the same formats and does not.

    python benchmarks/importance_cost.py [--json FILE]

One layer, decode attention through the public API, one thread, CPU time.
`share`: of 64 tokens, which are one review and eight samples of the mass, what these add to plain steps of the same cache;
medians by kind of step.
`share_beside_fork`: turns of 64 tokens beside a fork that neither measures nor reviews (all layers limited to L0) and reads the
very same blocks; what leaves its window in the turn stays FP16, and lies elsewhere, which is worth a percent or two either way.
`--chunk` compares a prefill chunk with the fork's alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from inferos import KVCache, LayerSpec
from inferos.bench.record import environment, load_average
from inferos.kv import ReadBuffer, set_num_threads

TURN = 64  # tokens: from one review to the next
SETTLE = 6 * TURN
SAMPLED = 8  # tokens between two samples
PACKING = 7  # steps behind a review in which blocks are packed, where any are
FILL = 512  # tokens a step while a cache is filled
COLD_BYTES = 64 << 20


class Sequence:
    """The cache that is measured."""

    def __init__(
        self, shape: tuple[int, int, int], context: int, thresholds: tuple[float, float, float], l2_format: str
    ) -> None:
        heads, kv_heads, head_dim = shape
        rng = np.random.default_rng(0)
        self.rows = rng.standard_normal((FILL, kv_heads, head_dim), dtype=np.float32)
        self.queries = rng.standard_normal((FILL, heads, head_dim), dtype=np.float32)
        self.cache = KVCache([LayerSpec(kv_heads, head_dim)], kv="auto", thresholds=thresholds, l2_format=l2_format)
        for chunk in range(context // FILL):
            self.step(self.cache, FILL, attend=(chunk + 1) * FILL >= context)
        for _ in range(SETTLE):  # until verdicts hold and are carried out
            self.step(self.cache, 1)

    def step(self, cache: KVCache, tokens: int, *, attend: bool = True) -> None:
        """Append, attend, commit."""
        cache.begin(tokens)
        cache.append(0, self.rows[:tokens], self.rows[:tokens])
        if attend:
            cache.attend(0, self.queries[:tokens])
        cache.commit()

    def plain(self) -> KVCache:
        """The same blocks without scores and reviews."""
        fork = self.cache.fork()
        fork.set_policy(max_levels=["L0"])
        return fork


def steps(sequence: Sequence, reviews: int) -> dict[str, float]:
    """Median CPU milliseconds of a step by what it does besides attention, over so many reviews."""
    times: dict[str, list[float]] = {"plain": [], "pack": [], "sample": [], "review": []}
    for _ in range(reviews * TURN):
        length = sequence.cache.length
        kind = "plain" if length % TURN >= PACKING else "pack"  # what left the window and what the last review demotes
        if (length + 1) % SAMPLED == 0:
            kind = "review" if (length + 1) % TURN == 0 else "sample"
        begin = time.thread_time_ns()
        sequence.step(sequence.cache, 1)
        times[kind].append((time.thread_time_ns() - begin) / 1e6)
    return {kind: statistics.median(own) for kind, own in times.items()}


def added(ms: dict[str, float]) -> float:
    """What samples, the review and its demotions add to 64 plain steps."""
    samples = TURN // SAMPLED * (ms["sample"] - ms["plain"])
    return (samples + ms["review"] - ms["sample"] + PACKING * (ms["pack"] - ms["plain"])) / (TURN * ms["plain"])


def turns(sequence: Sequence, rounds: int, chunk: int) -> dict[str, list[float]]:
    """CPU seconds of each turn, a prefill chunk or 64 decoded tokens, by cache; who is first changes."""
    other = ReadBuffer(COLD_BYTES)
    times: dict[str, list[float]] = {"auto": [], "plain": []}
    for number in range(rounds):
        with sequence.plain() as plain:
            order = [("auto", sequence.cache), ("plain", plain)]
            for name, cache in order[:: 1 if number % 2 else -1]:
                other.read(0, other.size)
                begin = time.process_time()
                for tokens in [chunk] if chunk else [1] * TURN:
                    sequence.step(cache, tokens)
                times[name].append(time.process_time() - begin)
    return times


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One JSON record."""
    before = load_average()
    set_num_threads(arguments.threads)
    heads, kv_heads, head_dim = (int(part) for part in arguments.shape.split("/"))
    rows = []
    for thresholds, l2_format in (((1.0, 0.0, 0.0), "k8v4"), ((1.0, 0.7, 0.3), "k8v4"), ((1.0, 0.7, 0.3), "int4")):
        sequence = Sequence((heads, kv_heads, head_dim), arguments.context, thresholds, l2_format)
        times = turns(sequence, arguments.rounds, arguments.chunk)
        by_step: dict[str, Any] = {}
        if not arguments.chunk:
            ms = steps(sequence, arguments.rounds)
            by_step = {"ms_cpu_by_step": ms, "share": added(ms)}
        best = {name: min(seconds) for name, seconds in times.items()}
        pairs = [a / p - 1 for a, p in zip(times["auto"], times["plain"], strict=True)]
        rows.append(
            {
                "thresholds": thresholds,
                "l2_format": l2_format,
                "bytes": sequence.cache.stats().total_bytes,
                "score_bytes": sequence.cache.stats().score_bytes,
                "ms_cpu_best": {name: value * 1e3 for name, value in best.items()},
                "share_beside_fork": statistics.median(pairs),
                **by_step,
            }
        )
        sequence.cache.close()
    return {
        "schema": "inferos.importance_cost/1",
        "environment": environment(before),
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32/8/128", metavar="H/KV/D")
    parser.add_argument("--context", type=int, default=32768, metavar="TOKENS")
    parser.add_argument(
        "--chunk",
        type=int,
        default=0,
        metavar="TOKENS",
        help="time a prefill chunk, at most 512; 0 = decode",
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="- = stdout")
    arguments = parser.parse_args()
    record = measure(arguments)
    if arguments.json is not None and str(arguments.json) != "-":
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    else:
        json.dump(record, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
