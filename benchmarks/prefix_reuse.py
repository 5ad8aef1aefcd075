"""The second turn of a chat whose history fills most of the context: tokens found in the cache, and the first token.

Both ways go through the same queue, one after the other in each round; a round has a history of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import inferos
from inferos.runtime.model import Model
from inferos.runtime.prefixes import PrefixCaches
from inferos.runtime.queue import RequestQueue

WORDS = "Once upon a time there was a king who lived in a castle by the sea and had three sons. "


def first_token(queue: RequestQueue, messages: list[dict[str, str]]) -> tuple[float, int, int, str]:
    """Seconds to the first token, cached and all tokens of the prompt, and the answer."""
    began = time.perf_counter()
    generation = queue.submit(messages, 32, priority="high")
    next(generation)
    seconds = time.perf_counter() - began
    for _ in generation:
        pass
    return seconds, generation.cached_tokens, generation.prompt_tokens, generation.text


def history(model: Model, share: float, number: int) -> str:
    """A text of about `share` of the context."""
    per_copy = len(model.prompt_ids(WORDS))
    copies = int(share * model.context_length / per_copy)
    return f"Tale {number}. " + WORDS * copies


def measure(name: str, kv: str, share: float, rounds: int) -> dict[str, Any]:
    """Both ways, and how much of the history was cached."""
    reused, anew, cached = [], [], []
    with inferos.load(name, kv=kv) as model:
        with_reuse, without = RequestQueue(model, prefixes=PrefixCaches()), RequestQueue(model)
        with with_reuse, without:
            for number in range(rounds):
                messages = [{"role": "user", "content": history(model, share, number)}]
                _, _, past, text = first_token(with_reuse, messages)
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
                seconds, found, prompt, _ = first_token(with_reuse, messages)
                reused.append(seconds)
                cached.append(found / past)
                anew.append(first_token(without, messages)[0])
        context = model.context_length
    ratios = [slow / fast for slow, fast in zip(anew, reused, strict=True)]
    return {
        "schema": "inferos.prefix_reuse/1",
        "model": name,
        "kv": kv,
        "context": context,
        "prompt_tokens": prompt,
        "history_tokens": past,
        "cached_share_of_history_least": min(cached),
        "first_token_s_reused": min(reused),
        "first_token_s_anew": min(anew),
        "times_sooner_median": statistics.median(ratios),
        "times_sooner_least": min(ratios),
        "rounds": rounds,
    }


def main() -> None:
    """Print one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--share", type=float, default=0.9, help="of the context that the history fills")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", default="-", help="- is stdout")
    given = parser.parse_args()
    record = json.dumps(measure(given.model, given.kv, given.share, given.rounds), indent=2)
    if given.json == "-":
        sys.stdout.write(record + "\n")
    else:
        with open(given.json, "w", encoding="utf-8") as file:
            file.write(record + "\n")


if __name__ == "__main__":
    main()
