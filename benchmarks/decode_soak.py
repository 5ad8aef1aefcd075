"""Decoding for a long time: allocations of a step, memory that grows, and what bound arrays save.

    python benchmarks/decode_soak.py --json benchmarks/results/decode-soak.json

One thread, the embedded reference model, kv=int8. A sequence is decoded from `LOW` to `HIGH` tokens and rewound, over and over,
so that packing, rewinding and every shape of a step are met thousands of times. The resident set is read every 1,000 steps.
Allocations are calls to Python's allocators (see allocations.py): of a step of a session (one token in, logits out,
committed), and of a token of a generation, sampled at temperature 0.8, as an id and with its text. The times of a step
with and without IOBinding are CPU times, interleaved.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from allocations import Counter

import inferos
from inferos.bench.record import environment, load_average
from inferos.runtime._compressed import CompressedSession
from inferos.runtime._runner import Runner
from inferos.runtime.model import Model
from inferos.runtime.protocols import TokenSequence
from inferos.runtime.reference import reference_folder
from inferos.runtime.session import open_session

SCHEMA = "inferos.decode-soak/1"
LOW, HIGH = 200, 400  # tokens; at most LOW + 3 blocks of 64 are packed between two rewinds
LOOK = 1000  # steps


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * resource.getpagesize()


def opened(**options: Any) -> CompressedSession:
    session = open_session(reference_folder(), kv="int8", threads=1, **options)
    assert isinstance(session, CompressedSession)
    return session


def filled(session: CompressedSession) -> TokenSequence:
    sequence = session.sequence()
    sequence.feed(np.random.default_rng(0).integers(1, 4000, LOW))
    return sequence


def decode(sequence: TokenSequence, token: np.ndarray) -> None:
    """A greedy step."""
    token[0] = sequence.feed(token).argmax()
    if sequence.length == HIGH:
        sequence.rewind(LOW)


def soak(steps: int) -> dict[str, Any]:
    sequence, token = filled(opened()), np.array([5])
    resident = []
    gc.collect()
    for step in range(1, steps + 1):
        decode(sequence, token)
        if step % LOOK == 0:
            resident.append(resident_bytes())
    return {
        "steps": steps,
        "resident_bytes_after_1000": resident[0],
        "resident_bytes_at_end": resident[-1],
        "resident_bytes_most": max(resident),
        "growth_bytes": max(resident) - resident[0],
    }


def allocations() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))
        token = np.array([5])
        found = {}
        for name, bound in (("step", True), ("step_without_iobinding", False)):
            sequence = filled(opened(iobinding=bound))
            found[name] = counter.per_call(lambda each=sequence: decode(each, token))
        with inferos.load("reference", kv="int8", threads=1) as model:
            options = {"max_tokens": 1500, "temperature": 0.8, "seed": 1, "ignore_eos": True}
            ids = Model(model.session).generate(model.prompt_ids("It was a"), **options)
            found["generate"] = counter.per_call(lambda: next(ids))
            tokens = model.generate("It was a", **options)
            found["generate_with_text"] = counter.per_call(lambda: next(tokens))
        return found


def times(rounds: int) -> dict[str, float]:
    """One ONNX Runtime session, its steps by turns with and without bound arrays."""
    session = opened()
    sequence = filled(session)
    engine: Any = session.routes.decode[0]
    kinds = {True: engine, False: Runner(engine.ort, session.layout.logits, trims=engine.trims)}
    took: dict[bool, list[float]] = {True: [], False: []}
    token = np.array([5])
    order = [True, False]
    for _ in range(rounds):
        order.reverse()  # who comes second finds warmer caches
        for bound in order:
            session.routes.place(decode=[kinds[bound]])
            began = time.process_time()
            sequence.feed(token)
            took[bound].append(time.process_time() - began)
            if sequence.length == HIGH:
                sequence.rewind(LOW)
    ratios = [b / a for a, b in zip(took[True], took[False], strict=True)]
    return {
        "us_bound_best": 1e6 * min(took[True]),
        "us_run_best": 1e6 * min(took[False]),
        "us_bound_median": 1e6 * statistics.median(took[True]),
        "us_run_median": 1e6 * statistics.median(took[False]),
        "speedup_median": statistics.median(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.steps < 2 * LOOK:
        parser.error(f"--steps: {args.steps} is not at least {2 * LOOK}")
    before = load_average()
    record = {"schema": SCHEMA, "allocations": allocations(), "times": times(args.rounds), "memory": soak(args.steps)}
    record["environment"] = environment(before)
    for name in ("allocations", "times", "memory"):
        print(name, json.dumps(record[name]))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
