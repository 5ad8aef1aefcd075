"""The policy in force: versions that can be gone back to, and thresholds that follow pressure and quality."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferos.config import MODES, PRESETS, Policy, Thresholds
from inferos.errors import ConfigError
from inferos.kv.policy import DynamicPolicy, PolicyStore

START = MODES["dynamic"].thresholds


class Clock:
    """A second a call."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def sinks(store: PolicyStore) -> int:
    return store.policy.kv.sink_tokens


# Versions ----------------------------------------------------------------------------------------------------------


def test_a_change_is_a_version_with_its_reason_and_time() -> None:
    store = PolicyStore(clock=Clock())
    assert store.update({"kv": {"sink_tokens": 8}}, "  more sinks ") == 2
    assert [(v.version, v.reason, v.at) for v in store.history] == [(1, "start", 101.0), (2, "more sinks", 102.0)]
    assert store.current is store.history[-1]
    assert (sinks(store), store.history[0].policy) == (8, Policy())


def test_changes_are_merged_into_the_policy_in_force() -> None:
    store = PolicyStore(Policy.from_mapping({"kv": {"recent_window": 32}}))
    store.update({"kv": {"sink_tokens": 8}}, "a")
    store.update({"io": {"host_pool_bytes": "1GiB"}}, "b")
    assert store.policy.requested() == {
        "kv": {"recent_window": 32, "sink_tokens": 8},
        "io": {"host_pool_bytes": 1 << 30},
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kv": {"sink_tokens": 65}}, "x"), ({"kw": {}}, "x"), ({}, ""), ({}, " "), ({}, "x" * 501), ({}, 5)],
)
def test_a_refused_update_leaves_policy_and_history(changes: dict[str, Any], reason: Any) -> None:
    store = PolicyStore()
    before = store.history
    with pytest.raises(ConfigError):
        store.update(changes, reason)
    assert store.history == before


def test_what_cannot_be_applied_never_comes_into_force() -> None:
    applied: list[Policy] = []

    def apply(policy: Policy) -> None:
        policy.kv.max_levels(4)
        applied.append(policy)

    store = PolicyStore(apply=apply)
    store.update({"kv": {"sink_tokens": 8}}, "x")
    with pytest.raises(ConfigError, match="the model has 4"):
        store.update({"kv": {"layer_overrides": {"4": {"max_level": "L1"}}}}, "x")
    assert (store.current.version, applied) == (2, [store.policy])


def test_a_rollback_is_a_new_version_with_the_old_policy() -> None:
    store = PolicyStore()
    store.update({"kv": {"sink_tokens": 8}}, "a")
    store.update({"kv": {"sink_tokens": 9}}, "b")
    assert store.rollback(2) == 4
    assert (sinks(store), store.current.reason) == (8, "rollback to version 2")
    assert store.rollback(1, "as it was") == 5
    assert (store.policy, store.current.reason) == (Policy(), "as it was")


def test_only_the_newest_versions_are_remembered() -> None:
    store = PolicyStore(keep=3)
    for count in range(5):
        store.update({"kv": {"sink_tokens": count}}, "x")
    assert [version.version for version in store.history] == [4, 5, 6]
    with pytest.raises(ConfigError, match=r"version: 3 is not within 4\.\.6"):
        store.rollback(3)


def test_updates_of_many_threads_are_all_kept_and_numbered_once() -> None:
    store = PolicyStore(keep=1000)
    found: list[int] = []

    def change(sinks: int) -> None:
        found.extend(store.update({"kv": {"sink_tokens": sinks}}, f"thread {sinks}") for _ in range(50))

    threads = [threading.Thread(target=change, args=(sinks,)) for sinks in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(2, 202))
    assert [version.version for version in store.history] == list(range(1, 202))


# Thresholds that move ----------------------------------------------------------------------------------------------

pressures = st.floats(0, 2)
losses = st.none() | st.floats(-1, 4)
shifts = st.floats(-1, 1)
starts = st.sampled_from([*MODES.values(), *PRESETS.values()]).map(lambda point: point.thresholds)


def moved(start: Thresholds, pressure: float, delta: float | None, previous: float) -> tuple[float, float, float]:
    policy = DynamicPolicy(start)
    return policy.thresholds(policy.shift(pressure, delta, previous=previous)).as_tuple()


@given(starts, pressures, pressures, losses, shifts)
def test_more_pressure_never_lowers_a_threshold(
    start: Thresholds, one: float, other: float, delta: float | None, previous: float
) -> None:
    low = moved(start, min(one, other), delta, previous)
    high = moved(start, max(one, other), delta, previous)
    assert all(a <= b for a, b in zip(low, high, strict=True))


@given(starts, pressures, st.floats(-1, 4), st.floats(-1, 4), shifts)
def test_a_greater_loss_never_raises_a_threshold(
    start: Thresholds, pressure: float, one: float, other: float, previous: float
) -> None:
    better = moved(start, pressure, min(one, other), previous)
    worse = moved(start, pressure, max(one, other), previous)
    assert all(a >= b for a, b in zip(better, worse, strict=True))


@given(starts, pressures, losses, shifts)
def test_thresholds_stay_ordered_between_the_limits(
    start: Thresholds, pressure: float, delta: float | None, previous: float
) -> None:
    levels = moved(start, pressure, delta, previous)
    assert 0 <= levels[2] <= levels[1] <= levels[0] <= 1
    for own, level, tight, relaxed in zip(start.as_tuple(), levels, (1, 1, 0.6), (0.8, 0.3, 0), strict=True):
        assert min(own, relaxed) <= level <= max(own, tight)
        assert level == 0 or own > 0


@given(pressures, losses, shifts)
def test_the_same_measurements_change_nothing_again(pressure: float, delta: float | None, previous: float) -> None:
    policy = DynamicPolicy(START)
    once = policy.shift(pressure, delta, previous=previous)
    assert policy.shift(pressure, delta, previous=once) == once


def test_without_pressure_and_within_the_bound_the_start_is_in_force() -> None:
    assert moved(START, 0.45, None, 1.0) == START.as_tuple()
    assert moved(START, 0.0, 0.4, 0.0) == START.as_tuple()


def test_full_pressure_is_the_tight_limit_and_a_loss_of_twice_the_bound_the_relaxed_one() -> None:
    assert moved(START, 0.9, None, 0.0) == (1, 1, 0.6)
    assert moved(START, 1.0, 1.0, 1.0) == (0.8, 0.3, 0)
    assert moved(START, 0.7, None, 0.0) == (1, 0.85, 0.45)


def test_pressure_must_fall_by_the_margin_before_a_step_is_taken_back() -> None:
    policy = DynamicPolicy(START)
    up = policy.shift(0.7)
    assert policy.shift(0.66, previous=up) == up
    assert policy.shift(0.64, previous=up) < up
    assert policy.shift(0.45, previous=up) == 0


def test_quality_must_be_better_by_the_margin_before_compression_comes_back() -> None:
    policy = DynamicPolicy(START)
    down = policy.shift(0.0, 0.75)
    assert down == -0.5
    assert policy.shift(0.0, 0.71, previous=down) == down
    assert policy.shift(0.0, 0.6, previous=down) > down
    assert policy.shift(0.0, 0.44, previous=down) == 0


def test_a_bound_of_zero_allows_no_loss() -> None:
    policy = DynamicPolicy(START)
    assert policy.shift(0.0, 1e-9, max_delta_ppl=0.0) == -1
    assert policy.shift(0.0, -1e-9, max_delta_ppl=0.0) == 0


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="delta_ppl is not a number"):
        DynamicPolicy(START).shift(0.5, float("nan"))
    with pytest.raises(ConfigError, match=r"calm 0\.9 is not below full 0\.9"):
        DynamicPolicy(START, calm=0.9)
