"""The recovery ladder of a policy, driven by readings and a clock of the test's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferos.config import MODES, PRESETS, Policy, Thresholds
from inferos.errors import ConfigError
from inferos.quality.monitor import QualityMonitor
from inferos.quality.recovery import GOOD_SECONDS, STEPS, RecoveryLadder, clamped

BAD, GOOD = 0.9, 0.1


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Store:
    """A policy with versions."""

    def __init__(self, **kv: Any) -> None:
        self.policy = Policy.from_mapping({"kv": kv})
        self.changes: list[Mapping[str, Any]] = []
        self.reasons: list[str] = []

    def update(self, changes: Mapping[str, Any], reason: str) -> int:
        self.policy = self.policy.update(changes)
        self.changes.append(changes)
        self.reasons.append(reason)
        return len(self.changes)

    @property
    def shares(self) -> tuple[float, float, float]:
        t = self.policy.kv.thresholds()
        return t.l1_int8, t.l2_int4, t.l3_evict


def ladder_over(store: Store, clock: Clock, *, npu: bool = False) -> RecoveryLadder:
    return RecoveryLadder(QualityMonitor(0.5), store, npu_in_use=lambda: npu, clock=clock)


def fall(ladder: RecoveryLadder, steps: int) -> None:
    for _ in range(3 * steps):
        ladder.observe(BAD)


def in_force(policy: Policy) -> tuple[Any, ...]:
    resolved = policy.resolve()
    return (
        policy.kv.thresholds(),
        policy.kv.l2_format,
        resolved.recent_window,
        resolved.scheduler_mode,
        policy.kv.mode,
    )


def test_the_steps_are_those_of_the_specification_in_order() -> None:
    store = Store()
    ladder = ladder_over(store, Clock(), npu=True)
    seen = []
    for _ in range(6):
        fall(ladder, 1)
        resolved = store.policy.resolve()
        seen.append(
            (
                store.shares,
                store.policy.kv.l2_format,
                resolved.recent_window,
                resolved.scheduler_mode,
                store.policy.kv.mode,
            )
        )
    assert seen == [
        ((1.0, 0.5, 0.1), "auto", 64, "hybrid", "dynamic"),
        ((1.0, 0.4, 0.1), "k8v4", 64, "hybrid", "dynamic"),
        ((1.0, 0.4, 0.1), "k8v4", 128, "hybrid", "dynamic"),
        ((1.0, 0.4, 0.1), "k8v4", 128, "gpu_only", "dynamic"),
        ((1.0, 0.0, 0.0), "k8v4", 256, "gpu_only", "quality_optimized"),
        ((0.0, 0.0, 0.0), "k8v4", 256, "gpu_only", "disabled"),
    ]  # fmt: skip
    assert ladder.steps == tuple(step.name for step in STEPS)
    assert ladder.exhausted
    assert store.policy.resolve().max_delta_ppl == 0.5  # the bound stays the one that was asked for


def test_a_step_takes_three_readings_in_a_row_and_says_why() -> None:
    store = Store()
    ladder = ladder_over(store, Clock())
    moves = [ladder.observe(delta) for delta in (BAD, BAD, GOOD, BAD, BAD, BAD, BAD)]
    assert [move is not None for move in moves] == [False, False, False, False, False, True, False]
    move = moves[5]
    assert move is not None
    assert (move.step, move.direction, move.version) == ("less INT4", "down", 1)
    assert store.reasons == ["quality: delta PPL 0.9 is over 0.5 for the third time in a row: less INT4"]


def test_gpu_only_is_passed_over_where_no_npu_is_in_use() -> None:
    store = Store()
    ladder = ladder_over(store, Clock(), npu=False)
    fall(ladder, 4)
    assert ladder.steps == ("less INT4", "more INT8", "wider window", "quality_optimized")


def test_a_step_that_would_change_nothing_is_passed_over() -> None:
    store = Store(
        level_thresholds={"L1_int8": 0.3, "L2_int4": 0.0, "L3_evict": 0.0}, l2_format="k8v4", recent_window=512
    )
    ladder = ladder_over(store, Clock())
    fall(ladder, 1)
    assert ladder.steps == ("disabled",)


def test_below_the_last_step_nothing_is_left() -> None:
    store = Store(mode="disabled", recent_window=512)
    ladder = ladder_over(store, Clock())
    fall(ladder, 5)
    assert ladder.steps == ("more INT8",)  # the format of a level that nothing uses
    assert ladder.exhausted
    assert store.shares == (0.0, 0.0, 0.0)


def test_ten_good_minutes_take_one_step_back_at_a_time() -> None:
    clock, store = Clock(), Store()
    before = in_force(store.policy)
    ladder = ladder_over(store, clock, npu=True)
    states = [before]
    for _ in STEPS:
        fall(ladder, 1)
        states.append(in_force(store.policy))
    ladder.observe(GOOD)
    for step in reversed(range(len(STEPS))):
        clock.now += GOOD_SECONDS - 1
        assert ladder.observe(GOOD) is None
        clock.now += 1
        move = ladder.observe(GOOD)
        assert move is not None
        assert (move.step, move.direction) == (STEPS[step].name, "up")
        assert in_force(store.policy) == states[step]
    assert ladder.steps == ()
    clock.now += 2 * GOOD_SECONDS
    assert ladder.observe(GOOD) is None


def test_good_minutes_are_counted_from_a_good_reading_and_a_bad_one_ends_them() -> None:
    clock, store = Clock(), Store()
    ladder = ladder_over(store, clock)
    fall(ladder, 1)
    clock.now += 10 * GOOD_SECONDS  # silence is no evidence
    assert ladder.observe(GOOD) is None
    clock.now += GOOD_SECONDS - 1
    assert ladder.observe(BAD) is None
    clock.now += 1
    assert ladder.observe(GOOD) is None
    clock.now += GOOD_SECONDS
    assert ladder.observe(GOOD) is not None


def test_what_a_person_changed_in_between_stays() -> None:
    clock, store = Clock(), Store()
    ladder = ladder_over(store, clock)
    fall(ladder, 3)
    store.update({"kv": {"recent_window": 96}}, "a person")
    ladder.observe(GOOD)
    clock.now += GOOD_SECONDS
    move = ladder.observe(GOOD)
    assert move is not None
    assert (move.step, move.changes, move.version) == ("wider window", {}, None)
    assert store.policy.resolve().recent_window == 96
    store.update({"kv": {"level_thresholds": {"L2_int4": 0.35}}}, "a person")
    clock.now += GOOD_SECONDS
    move = ladder.observe(GOOD)
    assert move is not None
    assert move.changes == {"kv": {"l2_format": "auto"}}
    assert store.shares == (1.0, 0.35, 0.1)


def test_a_mode_chosen_in_between_keeps_its_own_thresholds() -> None:
    clock, store = Clock(), Store()
    ladder = ladder_over(store, clock)
    fall(ladder, 4)
    assert store.policy.kv.mode == "quality_optimized"
    store.update({"kv": {"mode": "latency_optimized"}}, "a person")
    ladder.observe(GOOD)
    clock.now += GOOD_SECONDS
    ladder.observe(GOOD)
    latency = MODES["latency_optimized"].thresholds
    assert store.shares == (latency.l1_int8, latency.l2_int4, latency.l3_evict)


def test_a_refused_change_is_raised_and_no_step_is_taken() -> None:
    class Refusing(Store):
        def update(self, changes: Mapping[str, Any], reason: str) -> int:
            raise ConfigError("only kv=auto has a policy")

    ladder = ladder_over(Refusing(), Clock())
    ladder.observe(BAD)
    ladder.observe(BAD)
    with pytest.raises(ConfigError, match="only kv=auto"):
        ladder.observe(BAD)
    assert ladder.steps == ()


share = st.floats(0, 1)


@given(st.tuples(share, share, share).map(sorted), st.lists(st.booleans(), max_size=60))
def test_thresholds_stay_in_order_from_any_start_along_any_readings(levels: list[float], bad: list[bool]) -> None:
    l3, l2, l1 = levels
    clock = Clock()
    store = Store(level_thresholds={"L1_int8": l1, "L2_int4": l2, "L3_evict": l3})
    ladder = ladder_over(store, clock, npu=True)
    for is_bad in bad:
        clock.now += 300
        ladder.observe(BAD if is_bad else GOOD)
        l1_now, l2_now, l3_now = store.shares  # the policy itself refuses any other order
        assert 0 <= l3_now <= l2_now <= l1_now <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_fall_to_disabled(preset: str) -> None:
    store = Store(preset=preset)
    ladder = ladder_over(store, Clock())
    fall(ladder, len(STEPS))
    assert store.shares == (0.0, 0.0, 0.0)


def test_a_lower_threshold_gives_way_to_a_higher_one() -> None:
    assert clamped(0.5, 0.7, 0.9) == Thresholds(0.5, 0.5, 0.5)
    assert clamped(1.2, -0.1, 0.3) == Thresholds(1.0, 0.0, 0.0)
    assert clamped(0.7, 0.7 - 0.2, 0.3 - 0.2) == Thresholds(0.7, 0.5, 0.1)
