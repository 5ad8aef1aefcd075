"""What importance costs: a cache that scores, reviews and decides, beside one that holds the same formats and does not.

    python benchmarks/importance_cost.py [--json FILE]

One layer, decode attention through the public API, one thread, CPU time; the two take turns of 64 tokens: one review, eight
samples of the mass and what a review demotes. The plain cache is `int8`, its blocks demoted by hand to the formats the
automatic one has decided on, so both read the same bytes. `--chunk` compares a prefill chunk instead.
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
from inferos.kv import KV_FORMATS, ReadBuffer, set_num_threads

TURN = 64  # tokens: from one review to the next
FILL = 512  # tokens a step while a cache is filled
COLD_BYTES = 64 << 20


class Sequences:
    """The two caches, grown in the same steps."""

    def __init__(
        self, shape: tuple[int, int, int], context: int, thresholds: tuple[float, float, float], l2_format: str
    ) -> None:
        heads, kv_heads, head_dim = shape
        rng = np.random.default_rng(0)
        self.rows = rng.standard_normal((FILL, kv_heads, head_dim), dtype=np.float32)
        self.queries = rng.standard_normal((FILL, heads, head_dim), dtype=np.float32)
        layer = LayerSpec(kv_heads, head_dim)
        self.auto = KVCache([layer], kv="auto", thresholds=thresholds, l2_format=l2_format)
        self.plain = KVCache([layer], kv="int8")
        for cache in (self.auto, self.plain):
            for chunk in range(context // FILL):
                self.step(cache, FILL, attend=(chunk + 1) * FILL >= context)
            for _ in range(4 * TURN):  # until verdicts hold
                self.step(cache, 1)
        self.kv_heads = kv_heads
        self.match()

    def step(self, cache: KVCache, tokens: int, *, attend: bool = True) -> None:
        """Append, attend, commit."""
        cache.begin(tokens)
        cache.append(0, self.rows[:tokens], self.rows[:tokens])
        if attend:
            cache.attend(0, self.queries[:tokens])
        cache.commit()

    def match(self) -> None:
        """Give the plain cache's blocks the formats of the automatic one's."""
        for head in range(self.kv_heads):
            held = self.auto.formats(0, head)[4::TURN]
            for block in np.flatnonzero(held > self.plain.formats(0, head)[4::TURN]):
                self.plain.demote(0, head, int(block), KV_FORMATS[held[block]])


def turns(sequences: Sequences, rounds: int, chunk: int) -> dict[str, list[float]]:
    """CPU seconds of each turn, a prefill chunk or 64 decoded tokens, by cache; who is first changes."""
    other = ReadBuffer(COLD_BYTES)
    times: dict[str, list[float]] = {"auto": [], "plain": []}
    for number in range(rounds):
        order = [("auto", sequences.auto), ("plain", sequences.plain)]
        for name, cache in order[:: 1 if number % 2 else -1]:
            other.read(0, other.size)
            begin = time.process_time()
            for tokens in [chunk] if chunk else [1] * TURN:
                sequences.step(cache, tokens)
            times[name].append(time.process_time() - begin)
        sequences.match()
    return times


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One JSON record."""
    before = load_average()
    set_num_threads(arguments.threads)
    heads, kv_heads, head_dim = (int(part) for part in arguments.shape.split("/"))
    rows = []
    for thresholds, l2_format in (((1.0, 0.0, 0.0), "k8v4"), ((1.0, 0.7, 0.3), "k8v4"), ((1.0, 0.7, 0.3), "int4")):
        sequences = Sequences((heads, kv_heads, head_dim), arguments.context, thresholds, l2_format)
        times = turns(sequences, arguments.rounds, arguments.chunk)
        best = {name: min(seconds) for name, seconds in times.items()}
        pairs = [a / p - 1 for a, p in zip(times["auto"], times["plain"], strict=True)]
        rows.append(
            {
                "thresholds": thresholds,
                "l2_format": l2_format,
                "bytes": {"auto": sequences.auto.stats().total_bytes, "plain": sequences.plain.stats().total_bytes},
                "score_bytes": sequences.auto.stats().score_bytes,
                "ms_cpu_best": {name: value * 1e3 for name, value in best.items()},
                "share_of_best": best["auto"] / best["plain"] - 1,
                "share_median": statistics.median(pairs),
            }
        )
        sequences.auto.close()
        sequences.plain.close()
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
