"""Benchmarks: turns in one process, and the record."""

from __future__ import annotations

import math

import pydantic
import pytest

from inferos.bench.record import SCHEMA, Peer, Report, Row, environment
from inferos.bench.timing import COLD_BYTES, Contender, copies_for, interleave

ROW_KEYS = {
    "impl", "kv", "heads", "kv_heads", "head_dim", "context", "batch", "threads", "ms_cpu_best", "ms_wall_median",
    "bytes", "fraction_of_read", "ratio_vs_ort_fp32",
}  # fmt: skip


class FakeClock:
    """Time passes only in calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.spent = 0.0

    def cpu(self) -> float:
        return self.spent

    def wall(self) -> float:
        return self.now


def spender(log: list[tuple[str, int]], clock: FakeClock, name: str, seconds: list[float], copies: int) -> Contender:
    """A contender whose calls take the times given, the first one (untimed) included, in a cycle."""
    count = iter(range(10_000))

    def call(copy: int) -> None:
        log.append((name, copy))
        took = seconds[next(count) % len(seconds)]
        clock.spent += took
        clock.now += 2 * took

    return Contender(name, call, copies)


def test_turns_alternate_and_each_round_begins_with_another_contender() -> None:
    log: list[tuple[str, int]] = []
    clock = FakeClock()
    contenders = [spender(log, clock, name, [1.0], copies=1) for name in "abc"]
    interleave(contenders, rounds=3, clock=clock)
    assert "".join(name for name, _ in log) == "abc" + "abc" + "bca" + "cab"


def test_calls_go_through_the_copies_and_no_turn_uses_one_twice() -> None:
    log: list[tuple[str, int]] = []
    clock = FakeClock()
    interleave([spender(log, clock, "a", [0.01], copies=3)], rounds=2, turn_seconds=1000, clock=clock)
    assert [copy for _, copy in log] == [0, 1, 2, 0, 1, 2, 0]


def test_a_turn_ends_when_its_time_is_over_and_the_next_goes_on() -> None:
    log: list[tuple[str, int]] = []
    clock = FakeClock()
    interleave([spender(log, clock, "a", [1.0], copies=8)], rounds=2, turn_seconds=3.0, clock=clock)
    assert [copy for _, copy in log] == [0, 1, 2, 3, 4]


def test_times_are_of_each_call_best_and_median() -> None:
    clock = FakeClock()
    [timing] = interleave([spender([], clock, "a", [9.0, 3.0, 1.0, 2.0], copies=1)], rounds=3, clock=clock)
    assert timing.cpu == [3.0, 1.0, 2.0]
    assert (timing.cpu_best, timing.cpu_median) == (1.0, 2.0)
    assert (timing.wall_best, timing.wall_median) == (2.0, 4.0)


def test_what_runs_before_a_turn_is_not_timed() -> None:
    clock = FakeClock()

    def before() -> None:
        clock.now += 100
        clock.spent += 100

    [timing] = interleave([Contender("a", lambda copy: None, 1, before)], rounds=2, clock=clock)
    assert timing.wall == [0.0, 0.0]


def test_progress_counts_turns() -> None:
    steps: list[int] = []
    clock = FakeClock()
    contenders = [spender([], clock, name, [1.0], 1) for name in "ab"]
    interleave(contenders, rounds=3, clock=clock, progress=steps.append)
    assert steps == [1] * 6


def test_copies_exceed_every_cache() -> None:
    assert copies_for(1_000_000) * 1_000_000 >= COLD_BYTES
    assert copies_for(COLD_BYTES * 4) == 2


def test_a_row_has_the_columns_of_the_schema_and_null_for_the_unknown() -> None:
    report = Report(bench="decode", environment={}, settings={}, rows=[Row(impl="inferos", ms_cpu_best=math.nan)])
    plain = report.as_json()
    assert plain["schema"] == SCHEMA == "inferos.bench/1"
    assert set(plain["rows"][0]) == ROW_KEYS
    assert plain["rows"][0]["ms_cpu_best"] is None


def test_a_derived_row_keeps_its_columns() -> None:
    class Wider(Row):
        gelem_per_s: float

    report = Report(bench="kernels", environment={}, settings={}, rows=[Wider(impl="inferos", gelem_per_s=8.0)])
    assert report.as_json()["rows"][0]["gelem_per_s"] == 8.0


def test_a_row_refuses_what_it_does_not_know() -> None:
    with pytest.raises(pydantic.ValidationError):
        Row(impl="inferos", speed=1.0)  # type: ignore[call-arg]


def test_the_environment_names_versions_isa_commit_and_load() -> None:
    found = environment([1.0, 2.0, 3.0])
    assert found["load_average"]["before"] == [1.0, 2.0, 3.0]
    assert {"versions", "cpu", "isa", "commit", "modified"} <= set(found)
    assert Peer(name="ort", status="not installed").version is None
