"""Prompt-lookup speculation beside plain decoding: tokens/s of both, interleaved, and whether the tokens are the same.

    python benchmarks/speculation.py [--json FILE]

The embedded model, one thread, process CPU time of the decode steps. Two texts: one that repeats itself (a line of the
prompt, five times; greedy) and a random one (random ids; sampled at temperature 1.5, so that guesses are wrong).
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

from inferos.bench.record import environment, load_average
from inferos.bench.statistics import median_ratio
from inferos.runtime.model import Model, load
from inferos.runtime.reference import reference_words

ROUNDS = 15
TOKENS = 256
LINE = 24  # tokens


def prompts(model: Model) -> dict[str, tuple[list[int], dict[str, Any]]]:
    rng = np.random.default_rng(0)
    words = reference_words()
    line = model.prompt_ids(" ".join(rng.choice(words, LINE)))[:LINE].tolist()
    noise = rng.integers(5, model.session.vocab_size, 5 * LINE).tolist()
    return {"repeats itself": (line * 5, {}), "random": (noise, {"temperature": 1.5, "seed": 7})}


def decode(
    model: Model, prompt: list[int], speculate: bool, options: dict[str, Any]
) -> tuple[float, list[int], float | None]:
    """CPU seconds behind the first token, the ids, the accept rate."""
    with model.generate(prompt, TOKENS, ignore_eos=True, speculate=speculate, **options) as generation:
        ids = [next(generation).id]
        began = time.process_time()
        ids += [token.id for token in generation]
        return time.process_time() - began, ids, generation.accept_rate


def measure(model: Model, prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    ids: dict[bool, list[int]] = {}
    rate = None
    for number in range(ROUNDS):
        for speculate in (False, True) if number % 2 else (True, False):
            spent, ids[speculate], found = decode(model, prompt, speculate, options)
            seconds[speculate].append(spent)
            rate = found if speculate else rate
    ratio, interval = median_ratio(seconds[False], seconds[True])
    return {
        "tokens": TOKENS,
        "same_tokens": ids[False] == ids[True],
        "plain_tokens_per_s": (TOKENS - 1) / statistics.median(seconds[False]),
        "speculative_tokens_per_s": (TOKENS - 1) / statistics.median(seconds[True]),
        "ratio": ratio,
        "ratio_interval": interval,
        "accept_rate": rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    before = load_average()
    rows = []
    for kv in ("f16", "int8", "k8v4", "int4", "auto"):
        with load("reference", kv=kv, threads=1) as model:
            for text, (prompt, options) in prompts(model).items():
                row = {"kv": kv, "text": text, **measure(model, prompt, options)}
                rows.append(row)
                print(
                    f"{kv:5} {text:15} {row['plain_tokens_per_s']:7.0f} -> {row['speculative_tokens_per_s']:7.0f} tokens/s"
                    f"  x{row['ratio']:.3f} {row['ratio_interval']}  accepted {row['accept_rate']}  same {row['same_tokens']}",
                    file=sys.stderr,
                )
    if arguments.json:
        record = {"schema": "inferos.benchmarks.speculation/1", **environment(before), "rounds": ROUNDS, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
