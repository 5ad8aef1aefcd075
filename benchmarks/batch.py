"""Prompts continued together and one by one: tokens/s on the reference model, and whether both give the same.

    python benchmarks/batch.py [--threads N] [--json FILE]

Eight prompts of different lengths through the public API, greedy: as one batch, as eight generations of their own, and as a
batch of eight prompts of one length with as many tokens in all. In turns of 16 tokens of every row in one process, every round
beginning with another. tokens/s are those of the best turn, wall time; ratios are medians over the rounds. `worst_logit` is
the largest difference of a logit between both ways over 128 teacher-forced steps, `rows_equal` how many of the rows gave the
same tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import inferos
from inferos.bench.record import environment, load_average
from inferos.runtime.model import Model
from inferos.runtime.reference import reference_words

SHARES = (0.05, 0.2, 0.5, 0.8, 1.0, 1.3, 1.75, 2.4)  # of the mean length; they add up to 8
TURN = 16  # tokens of each row


def prompts_of(model: Model, lengths: Sequence[int]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Texts of words the model knows, each another one."""
    words = np.random.default_rng(0).choice(reference_words(), 2 * sum(lengths))
    ids = model.tokenizer.encode(" ".join(words))
    ends = np.cumsum(lengths)
    return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]


class Ways:
    """The same prompts in every way, each advanced by a turn at a time."""

    def __init__(self, model: Model, mean: int, tokens: int) -> None:
        ragged = prompts_of(model, [max(1, round(share * mean)) for share in SHARES])
        even = prompts_of(model, [mean] * len(SHARES))
        self.batch = model.generate(ragged, tokens, ignore_eos=True)
        self.even = model.generate(even, tokens, ignore_eos=True)
        self.alone = [model.generate(prompt, tokens, ignore_eos=True) for prompt in ragged]
        self.first: list[int] = []  # what the batch's first row gave
        self.ids: list[list[int]] = [[] for _ in ragged]  # what each gave alone
        self.turns: dict[str, Callable[[], object]] = {
            "batch": lambda: self.first.extend(self._steps(self.batch)),
            "even": lambda: self._steps(self.even),
            "alone": self._singles,
        }

    def _steps(self, batch: inferos.Batch) -> list[int]:
        return [next(batch.rows[0]).id for _ in range(TURN)]  # the others move on with it

    def _singles(self) -> None:
        for ids, row in zip(self.ids, self.alone, strict=True):
            ids += [next(row).id for _ in range(TURN)]

    def rows_equal(self) -> int:
        """Rows of the batch that gave what they give alone."""
        others = [[token.id for token in row] for row in self.batch.rows[1:]]
        return sum(ids == own[: len(ids)] for ids, own in zip(self.ids, [self.first, *others], strict=True))

    def close(self) -> None:
        """Free the caches."""
        self.batch.close()
        self.even.close()
        for row in self.alone:
            row.close()


def worst_logit(model: Model, mean: int, steps: int) -> float:
    """The largest difference of a logit, both ways fed the same tokens."""
    lengths = [max(1, round(share * mean)) for share in SHARES]
    texts = prompts_of(model, [length + steps for length in lengths])
    together, alone = ([model.session.sequence() for _ in lengths] for _ in range(2))
    for sequence, twin, ids, length in zip(together, alone, texts, lengths, strict=True):
        sequence.feed(ids[:length])
        twin.feed(ids[:length])
    worst = 0.0
    for step in range(steps):
        tokens = np.array([ids[length + step] for ids, length in zip(texts, lengths, strict=True)])
        rows = model.session.step(together, tokens)
        for row, twin, token in zip(rows, alone, tokens, strict=True):
            worst = max(worst, float(np.abs(row - twin.feed(token[None])).max()))
    for sequence in (*together, *alone):
        sequence.close()
    return worst


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def row(kv: str, threads: int, mean: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    with inferos.load("reference", kv, threads=threads) as model:
        ways = Ways(model, mean, tokens=TURN * (rounds + 1) + 1)
        for turn in ways.turns.values():
            turn()  # the prompts, and whatever a first step costs
        wall: dict[str, list[float]] = {name: [] for name in ways.turns}
        cpu: dict[str, list[float]] = {name: [] for name in ways.turns}
        names = list(ways.turns)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                began, began_cpu = time.perf_counter(), time.process_time()
                ways.turns[name]()
                wall[name].append((time.perf_counter() - began) / (TURN * len(SHARES)))
                cpu[name].append((time.process_time() - began_cpu) / (TURN * len(SHARES)))
        equal = ways.rows_equal()
        ways.close()
        best = {name: min(times) for name, times in wall.items()}
        return {
            "kv": kv,
            "threads": threads,
            "mean_prompt_tokens": mean,
            "rows": len(SHARES),
            "tokens_per_s": {name: 1 / seconds for name, seconds in best.items()},
            "us_cpu_per_token": {name: min(times) * 1e6 for name, times in cpu.items()},
            "speedup": ratio(wall["alone"], wall["batch"]),
            "ragged_over_even": ratio(wall["batch"], wall["even"]),
            "rows_equal": equal,
            "worst_logit": worst_logit(model, mean, 128),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="f16,int8,k8v4,int4,auto", metavar="LIST")
    parser.add_argument("--threads", default="1", metavar="LIST")
    parser.add_argument("--mean", default="128,640", metavar="LIST", help="mean tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="- = stdout")
    arguments = parser.parse_args()
    before = load_average()
    rows = []
    for threads in map(int, arguments.threads.split(",")):
        for mean in map(int, arguments.mean.split(",")):
            for kv in arguments.kv.split(","):
                rows.append(row(kv, threads, mean, arguments.rounds))
                found = rows[-1]
                print(
                    f"{threads} threads, {mean:4} tokens, {kv:5}"
                    f" {found['tokens_per_s']['alone']:6.0f} tokens/s alone, {found['tokens_per_s']['batch']:6.0f} together:"
                    f" {found['speedup']:.2f}x; ragged over even {found['ragged_over_even']:.2f};"
                    f" {found['rows_equal']} rows equal, logits within {found['worst_logit']:.1e}",
                    file=sys.stderr,
                )
    record = {
        "schema": "inferos.batch/1",
        "environment": environment(before),
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "rows": rows,
    }
    if arguments.json is not None and str(arguments.json) != "-":
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    elif arguments.json is not None:
        json.dump(record, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
