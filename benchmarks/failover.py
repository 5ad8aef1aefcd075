"""What failover costs: a step with and without a deadline, interleaved, and a step that fails over.

    python benchmarks/failover.py [--json FILE]

The embedded model, INT8, one thread. Microseconds of a decode step: process CPU time, the quickest round, and wall
time, the median round. The second engine is the same ONNX Runtime session under another name. "hand-off" is a call of
nothing on another thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inferos.bench.record import environment, load_average
from inferos.errors import ProviderError
from inferos.runtime.failover import RobustFallbackManager
from inferos.runtime.failover.steps import StepFailover
from inferos.runtime.failover.workers import Workers, deadline
from inferos.runtime.model import load

ROUNDS = 15
STEPS = 100  # of a round
CONTEXT = 256
FAR = 60.0  # seconds; a deadline that nothing misses


class Second:
    """The same session under another name; throws where `broken`."""

    def __init__(self, real: Any, *, broken: bool = False) -> None:
        self.name, self.device, self.trims, self.types = f"second {broken}", "cpu", real.trims, real.types
        self.real = real
        self.broken = broken

    def run(self, feeds: Any, *, run_options: Any = None) -> Any:
        if self.broken:
            raise ProviderError("the engine is broken")
        return self.real.run(feeds, run_options=run_options)


def contenders() -> dict[str, Callable[[], None]]:
    workers, wait = Workers(), deadline(FAR)

    def nothing() -> None:
        pass

    found: dict[str, Callable[[], None]] = {"hand-off": lambda: workers.run(nothing, wait, nothing)}
    for name, engines, limit in (
        ("one engine", 1, False),
        ("two engines", 2, False),
        ("two engines, a deadline", 2, True),
        ("the first engine throws", 2, False),
    ):
        found[name] = stepper(name, engines, limit)
    return found


def stepper(name: str, engines: int, limit: bool) -> Callable[[], None]:
    model = load("reference", kv="int8", threads=1)
    session: Any = model.session
    (real,) = session.routes.decode[:1]
    throws = name.endswith("throws")
    # A clock that stands at a moment when everything is due: the broken engine is tried in every step.
    manager = RobustFallbackManager(clock=iter(range(1, 10**9, 1000)).__next__, notify=lambda _: None)
    session.failover = StepFailover(manager, deadline(FAR) if limit else None)
    session.routes.place(decode=[Second(real, broken=True), real] if throws else [real, Second(real)][:engines])
    sequence = session.sequence()
    sequence.feed(np.arange(5, 5 + CONTEXT))
    one = np.array([7])

    def step() -> None:
        if sequence.length > CONTEXT + STEPS:
            sequence.rewind(CONTEXT)
        sequence.feed(one)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    before = load_average()
    calls = contenders()
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began, spent = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                call()
            cpu[name].append((time.process_time() - spent) / STEPS * 1e6)
            wall[name].append((time.perf_counter() - began) / STEPS * 1e6)
    rows = [
        {"what": name, "us_cpu_best": min(cpu[name]), "us_wall_median": statistics.median(wall[name])} for name in calls
    ]
    for row in rows:
        print(
            f"{row['what']:26} {row['us_cpu_best']:8.1f} us CPU  {row['us_wall_median']:8.1f} us wall", file=sys.stderr
        )
    if arguments.json:
        record = {"schema": "inferos.benchmarks.failover/1", **environment(before), "rounds": ROUNDS, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
