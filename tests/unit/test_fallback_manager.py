"""Fallbacks by reason, driven by a clock of their own."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inferos
from inferos.config import Policy
from inferos.errors import ConfigError, ProviderError
from inferos.kv.policy import PolicyStore
from inferos.quality.monitor import QualityMonitor
from inferos.quality.recovery import GOOD_SECONDS, RecoveryLadder
from inferos.runtime.failover import (
    DEVICE_ORDER,
    MEMORY_STEPS,
    REASONS,
    TABLE,
    BackoffStrategy,
    EngineHealth,
    FallbackReason,
    Notification,
    RobustFallbackManager,
    Signals,
)

QUALITY, DEVICE, MEMORY, TIMEOUT, UNKNOWN = FallbackReason
DOCS = Path(__file__).resolve().parents[2] / "docs" / "failover.md"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """Bytes that each step frees, by its name."""

    def __init__(self, used: int = 1000, **frees: int) -> None:
        self.used = used
        self.frees = frees
        self.taken: list[str] = []

    def used_bytes(self) -> int:
        return self.used

    def scale_budget(self, factor: float) -> None:
        self._take(f"budget x{factor}", "budget")

    def scale_batch(self, factor: float) -> None:
        self._take(f"batch x{factor}", "batch")

    def restore(self) -> None:
        self.taken.append("restore")

    def _take(self, name: str, step: str) -> None:
        self.taken.append(name)
        self.used -= self.frees.get(step, 0)


class Setting:
    """A manager and all that it acts on."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.told: list[Notification] = []
        self.policies = PolicyStore(Policy(), clock=self.clock)
        self.memory = Memory()
        self.called: list[str] = []
        names = {rule.follow_up for rule in TABLE}
        self.manager = RobustFallbackManager(
            **{
                "policy": self.policies,
                "memory": self.memory,
                "follow_ups": {name: self._called(name) for name in names},
                "notify": self.told.append,
                "clock": self.clock,
            }
            | options
        )

    def _called(self, name: str) -> Callable[[], None]:
        return lambda: self.called.append(name)

    def at(self, seconds: float, **signals: Any) -> tuple[str, ...]:
        self.clock.now = seconds
        return self.manager.observe(Signals(**signals))


@given(
    st.floats(0.001, 1e3), st.floats(0.001, 1e4), st.floats(1, 100), st.lists(st.booleans(), min_size=1, max_size=60)
)
def test_a_backoff_grows_to_its_cap_and_never_passes_it(
    first: float, cap: float, factor: float, succeeds: list[bool]
) -> None:
    if first > cap:
        first, cap = cap, first
    backoff = BackoffStrategy(first, cap, factor)
    last = 0.0
    for success in succeeds:
        if success:
            backoff.reset()
            last = 0.0
        delay = backoff.get_delay()
        assert last <= delay <= cap
        assert success is False or delay == first
        last = delay


@pytest.mark.parametrize(
    ("reason", "delays"),
    [
        (QUALITY, [2, 3, 4.5, 6.75, 10.125]),
        (DEVICE, [5, 10, 20, 40, 80, 160, 300, 300]),
        (MEMORY, [1, 1.8, 3.24, 5.832]),
        (TIMEOUT, [3, 6.6, 14.52, 31.944, 70.2768, 154.60896, 180, 180]),
        (UNKNOWN, [5, 10, 20, 40, 80, 160, 300, 300]),
    ],
)
def test_each_reason_has_its_own_delays(reason: FallbackReason, delays: list[float]) -> None:
    backoff = REASONS[reason].backoff()
    assert [backoff.get_delay() for _ in delays] == pytest.approx(delays)
    assert backoff.attempt_count == len(delays)


@pytest.mark.parametrize("numbers", [(0, 1, 2), (2, 1, 2), (1, 2, 0.5), (1, float("inf"), 2), (float("nan"), 2, 2)])
def test_a_backoff_of_impossible_numbers_is_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="BackoffStrategy"):
        BackoffStrategy(*numbers)


def test_the_names_of_the_reasons_are_those_of_the_guide() -> None:
    assert [reason.value for reason in inferos.FallbackReason] == [
        "quality_degradation",
        "device_error",
        "memory_pressure",
        "timeout",
        "unknown",
    ]


@pytest.mark.parametrize(("reason", "count"), [(QUALITY, 3), (DEVICE, 2), (MEMORY, 4), (TIMEOUT, 3), (UNKNOWN, 3)])
def test_somebody_is_told_from_a_number_of_fallbacks_on(reason: FallbackReason, count: int) -> None:
    setting = Setting()
    for place in range(5):
        setting.clock.now = place * 10.0
        setting.manager.handle_fallback(reason)
    assert [(n.severity, n.count, n.reason) for n in setting.told] == [("warning", n, reason) for n in range(count, 6)]
    assert all(n.recommended_action == REASONS[reason].recommended_action for n in setting.told)


def test_what_is_older_than_five_minutes_does_not_count() -> None:
    setting = Setting()
    for now in (0.0, 300.0, 600.0):
        setting.clock.now = now
        setting.manager.handle_fallback(DEVICE)
    assert setting.told == []
    setting.clock.now = 899.9
    setting.manager.handle_fallback(DEVICE)
    assert [n.count for n in setting.told] == [2]


def test_five_fallbacks_are_carried_out_and_a_sixth_in_five_minutes_is_critical() -> None:
    moved: list[str] = []
    setting = Setting(switch_device=moved.append)
    reasons = [DEVICE, TIMEOUT, DEVICE, UNKNOWN, TIMEOUT]
    assert [setting.manager.handle_fallback(r)["status"] for r in reasons] == ["fallback_executed"] * 5
    before = list(moved)
    assert not setting.manager.critical
    answer = setting.manager.handle_fallback(DEVICE, {"current_device": "npu"})
    assert (answer["status"], answer["next_retry"]) == ("critical", 300.0)
    assert moved == before
    assert setting.manager.critical
    assert (setting.told[-1].severity, setting.told[-1].count) == ("critical", 6)
    setting.clock.now = 300.0
    assert not setting.manager.critical
    assert setting.manager.handle_fallback(DEVICE)["status"] == "fallback_executed"


def test_a_success_begins_the_backoff_anew() -> None:
    manager = Setting().manager
    assert [manager.handle_fallback(TIMEOUT)["delay_seconds"] for _ in range(2)] == pytest.approx([3, 6.6])
    manager.succeeded(TIMEOUT)
    assert manager.handle_fallback(TIMEOUT)["delay_seconds"] == 3


def test_notices_go_to_the_log_unless_somebody_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    manager = RobustFallbackManager(clock=Clock())
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            manager.handle_fallback(DEVICE, {"prompt": "a secret"})
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING] * 4 + [logging.CRITICAL]
    assert "driver" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("reason", [DEVICE, TIMEOUT])
@pytest.mark.parametrize(
    ("current", "broken", "result"),
    [
        ("npu", (), {"status": "switched", "fallback_device": "dml"}),
        ("npu", ("dml",), {"status": "switched", "fallback_device": "cpu"}),
        ("dml", (), {"status": "switched", "fallback_device": "cpu"}),
        ("cpu", (), {"status": "no_available_device"}),
        ("npu", ("dml", "cpu"), {"status": "no_available_device"}),
    ],
)
def test_devices_are_taken_in_order(
    reason: FallbackReason, current: str, broken: tuple[str, ...], result: dict[str, str]
) -> None:
    def switch(device: str) -> None:
        if device in broken:
            raise ProviderError("not there")

    assert DEVICE_ORDER == ("npu", "dml", "cpu")
    answer = Setting(switch_device=switch).manager.handle_fallback(reason, {"current_device": current})
    assert answer["result"] == result


def test_without_targets_fallbacks_are_counted_and_change_nothing() -> None:
    manager = RobustFallbackManager(notify=lambda _: None, clock=Clock())
    statuses = [manager.handle_fallback(reason)["result"]["status"] for reason in FallbackReason]
    assert statuses == ["no_target", "no_target", "no_target", "no_target", "recorded"]


def test_quality_is_left_to_the_ladder() -> None:
    ladder = Ladder()
    setting = Setting(quality=ladder)
    answers = [setting.manager.handle_fallback(QUALITY, {"delta_ppl": 0.8})["result"] for _ in range(3)]
    assert answers == [{"status": "observed"}] * 2 + [{"status": "applied", "step": "less INT4", "direction": "down"}]
    assert ladder.seen == [0.8] * 3


class Ladder:
    """Takes a step down with every third reading, up with a negative one."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def observe(self, delta_ppl: float) -> Any:
        self.seen.append(delta_ppl)
        if delta_ppl < 0:
            return SimpleNamespace(step="less INT4", direction="up")
        return None if len(self.seen) % 3 else SimpleNamespace(step="less INT4", direction="down")


@pytest.mark.parametrize(
    ("frees", "taken"),
    [
        ({"budget": 300}, ["budget x0.7"]),
        ({"budget": 100, "batch": 200}, ["budget x0.7", "batch x0.5"]),
        ({}, ["budget x0.7", "batch x0.5"]),
    ],
)
def test_memory_steps_are_taken_until_enough_came_free(frees: Mapping[str, int], taken: list[str]) -> None:
    memory = Memory(**frees)
    setting = Setting(memory=memory)
    result = setting.manager.handle_fallback(MEMORY, {"needed_bytes": 300})["result"]
    assert memory.taken == taken
    compressed = setting.policies.policy.kv.preset == "memory_pressure"
    if frees:
        assert result["status"] == "effective"
        assert result["freed_bytes"] == 300
        assert not compressed
    else:
        assert result["status"] == "memory_reduction_failed"
        assert [name for name, _ in result["steps"]] == [step.name for step in MEMORY_STEPS]
        assert compressed
    setting.manager.succeeded(MEMORY)
    assert memory.taken[-1] == "restore"
    assert setting.policies.policy.kv.preset is None


def test_the_last_memory_step_collects_what_nobody_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    monkeypatch.setattr("gc.collect", lambda: memory._take("gc", "budget"))
    memory.frees = {"batch": 0}
    Setting(memory=memory).manager.handle_fallback(MEMORY, {"needed_bytes": 1})
    assert memory.taken == ["budget x0.7", "batch x0.5", "gc"]


def test_unknown_signals_change_nothing() -> None:
    setting = Setting()
    assert setting.at(0) == ()
    setting.at(1, dml_present=False)
    assert setting.at(1000) == ()
    assert setting.manager.active == ("DirectML is missing",)


def test_directml_is_used_again_five_minutes_after_it_is_back() -> None:
    setting = Setting()
    assert setting.at(0, dml_present=False) == ("began: DirectML is missing",)
    policy = setting.policies.policy
    assert (policy.kv.preset, policy.scheduler.prefill_device, policy.scheduler.decode_device) == (
        "dml_unavailable",
        "cpu",
        "cpu",
    )
    assert setting.at(1000, dml_present=True) == ()
    assert setting.at(1200, dml_present=False) == ()  # gone again: the five minutes begin anew
    assert setting.at(1300, dml_present=True) == ()
    assert setting.at(1599.9, dml_present=True) == ()
    assert setting.at(1600, dml_present=True) == ("ended: DirectML is missing",)
    policy = setting.policies.policy
    assert (policy.kv.preset, policy.scheduler.prefill_device, policy.scheduler.decode_device) == (None, "dml", "npu")
    assert setting.called.count("check_driver") == 2


def test_an_npu_is_tried_again_every_five_minutes_and_used_when_it_is_fit() -> None:
    setting = Setting()
    health = setting.manager.health
    npu = SimpleNamespace(name="n", device="npu")
    cpu = SimpleNamespace(name="c", device="cpu")
    setting.at(0, npu_fit=False)
    assert setting.policies.policy.resolve().decode_device == "dml"
    assert setting.policies.policy.kv.preset == "npu_thermal"
    for now in range(0, 901, 50):
        setting.at(now, npu_fit=False)
        if health.order([npu, cpu])[0] is npu:
            health.left(npu, DEVICE)
    assert setting.called == ["retry_npu"] * 4
    assert setting.at(950, npu_fit=True) == ("ended: the NPU is missing or too hot",)
    assert setting.policies.policy.scheduler.decode_device == "npu"


def test_a_good_quality_steps_back_after_ten_minutes() -> None:
    clock = Clock()
    store = PolicyStore(Policy(), clock=clock)
    ladder = RecoveryLadder(QualityMonitor(), store, clock=clock)
    setting = Setting(quality=ladder, clock=clock)
    told = []
    for place in range(3):
        clock.now = float(place)
        told += setting.manager.observe(Signals(delta_ppl=0.9))
    assert told == ["quality: less INT4"]
    row = next(rule for rule in TABLE if rule.action == "quality ladder")
    assert row.hold_seconds == GOOD_SECONDS == 600
    back = []
    for now in range(10, 10 + 601, 100):
        clock.now = float(now)
        back.append(setting.manager.observe(Signals(delta_ppl=0.0)))
    assert back == [()] * 6 + [("quality: back from less INT4",)]
    assert setting.called == ["tighten_quality"]


def test_memory_is_short_until_less_than_four_fifths_are_used() -> None:
    setting = Setting()
    assert setting.at(0, memory_used=0.89) == ()
    assert setting.at(1, memory_used=0.9) == ("began: memory is short",)
    assert setting.memory.taken == ["budget x0.7", "batch x0.5"]
    assert setting.policies.policy.kv.preset == "memory_pressure"
    setting.at(1.9, memory_used=0.9)
    assert len(setting.memory.taken) == 2
    setting.at(2.0, memory_used=0.9)  # its first delay is over
    assert len(setting.memory.taken) == 4
    assert setting.at(3.0, memory_used=0.8) == ()
    assert setting.at(4.0, memory_used=0.79) == ("ended: memory is short",)
    assert setting.memory.taken[-1] == "restore"
    assert setting.policies.policy.kv.preset is None


def test_an_agent_that_is_silent_leaves_a_plain_cache_until_it_is_healthy() -> None:
    setting = Setting()
    setting.at(0, agent_healthy=False)
    assert setting.policies.policy.kv.mode == "disabled"
    assert setting.called == ["restart_agent"]
    setting.at(3, agent_healthy=False)
    assert setting.called == ["restart_agent"] * 2
    assert setting.at(4, agent_healthy=True) == ("ended: the agent does not answer",)
    assert setting.policies.policy.kv.mode == "dynamic"


def test_below_half_the_speed_the_policy_turns_to_latency() -> None:
    setting = Setting()
    assert setting.at(0, tps_share=0.5) == ()
    setting.at(1, tps_share=0.49)
    assert setting.policies.policy.kv.mode == "latency_optimized"
    setting.at(2, tps_share=0.8)
    assert setting.at(601.9, tps_share=0.9) == ()
    assert setting.at(602, tps_share=0.9) == ("ended: decoding is slow",)
    assert setting.policies.policy.kv.mode == "dynamic"


def test_the_later_row_wins_where_two_are_in_force_and_both_are_taken_back() -> None:
    setting = Setting()
    setting.at(0, npu_fit=False, dml_present=False)
    assert setting.policies.policy.kv.preset == "dml_unavailable"
    assert setting.policies.policy.scheduler.decode_device == "cpu"
    setting.at(1, memory_used=0.95)
    assert setting.policies.policy.kv.preset == "memory_pressure"
    setting.at(2, npu_fit=True)
    assert setting.policies.policy.kv.preset == "memory_pressure"
    setting.at(3, memory_used=0.1)
    assert setting.policies.policy.kv.preset == "dml_unavailable"
    setting.at(4, dml_present=True)
    setting.at(304, dml_present=True)
    policy = setting.policies.policy
    assert policy.kv.preset is None
    assert policy.scheduler.decode_device == "npu"


def test_what_a_person_sets_in_between_stays() -> None:
    setting = Setting()
    setting.at(0, dml_present=False)
    setting.policies.update({"kv": {"preset": "13b"}}, "by hand")
    setting.at(1, npu_fit=False)
    assert setting.policies.policy.kv.preset == "13b"
    setting.at(2, dml_present=True)
    setting.at(302, dml_present=True, npu_fit=True)
    assert setting.policies.policy.kv.preset == "13b"
    assert setting.policies.policy.scheduler.prefill_device == "dml"


def test_a_row_beyond_five_fallbacks_changes_nothing() -> None:
    setting = Setting()
    for _ in range(5):
        setting.manager.handle_fallback(UNKNOWN)
    setting.at(0, agent_healthy=False)
    assert setting.policies.policy.kv.mode == "dynamic"
    assert setting.told[-1].severity == "critical"
    assert setting.called == []


def test_an_engine_waits_while_its_device_is_not_there_and_five_minutes_more() -> None:
    clock, there = Clock(), False
    health = EngineHealth(clock, lambda device: there or device != "dml")
    dml, cpu = SimpleNamespace(name="d", device="dml"), SimpleNamespace(name="c", device="cpu")
    health.left(dml, DEVICE)
    first = []
    for clock.now in (299.0, 300.0, 1000.0):
        first.append(health.order([dml, cpu])[0])
    there = True
    for clock.now in (1001.0, 1299.0, 1300.0):
        first.append(health.order([dml, cpu])[0])
    assert first == [cpu] * 5 + [dml]


def test_a_step_can_fail_over_while_another_thread_changes_the_policy() -> None:
    """A policy that places devices measures them, with steps that may fail over: whoever sets one holds its store."""
    one, two = (SimpleNamespace(name=name, device="cpu") for name in "ab")
    done = threading.Event()

    def step() -> None:
        setting.manager.failed_over(one, two, DEVICE)
        done.set()

    def apply(_policy: Policy) -> None:
        thread = threading.Thread(target=step, daemon=True)
        thread.start()
        assert done.wait(60)

    setting = Setting(policy=PolicyStore(Policy(), apply=apply))
    setting.at(0, tps_share=0.1)
    assert setting.manager.failover_count == 1


def test_engines_back_off_each_on_its_own() -> None:
    health = EngineHealth(Clock())
    one, two = (SimpleNamespace(name=name, device="cpu") for name in "ab")
    assert [health.left(one, DEVICE) for _ in range(3)] == [5, 10, 20]
    assert health.left(two, DEVICE) == 5
    assert health.succeeded(one)
    assert not health.succeeded(one)
    assert health.left(one, DEVICE) == 5


def test_the_page_shows_the_table_and_the_reasons_as_they_are() -> None:
    text = DOCS.read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    by_first = {row[0]: row[1:] for row in rows}
    for rule in TABLE:
        begins, action, follow_up, ends = by_first[rule.event]
        assert begins == f"`{rule.begins}`"
        assert re.findall(r"`(\w+)`", follow_up) == [rule.follow_up]
        if rule.every_seconds is not None:
            assert f"every {rule.every_seconds / 60:g} minutes" in follow_up
        wanted = f"`{rule.ends}`" + (f" for {rule.hold_seconds / 60:g} minutes" if rule.hold_seconds else "")
        assert ends == wanted
        changes = [json.loads(text) for text in re.findall(r"`(\{.*?\})`", action.replace("\\", ""))]
        assert changes == ([json.loads(json.dumps(rule.changes))] if rule.changes else [])
        assert rule.action.split()[0] in action
    for reason, rules in REASONS.items():
        delays = f"{rules.initial_delay:g} s to {rules.max_delay:g} s, x{rules.multiplier:g}"
        assert by_first[f"`{reason.value}`"] == [delays, str(rules.notify_at), rules.recommended_action]
    for step in MEMORY_STEPS:
        assert f"**{step.name}**" in text


def test_the_delay_that_comes_next_can_be_looked_at_without_taking_it() -> None:
    strategy = BackoffStrategy(2.0, 5.0, 2.0)
    for wanted in (2.0, 4.0, 5.0, 5.0):
        assert strategy.current_delay == strategy.current_delay == wanted
        assert strategy.get_delay() == wanted
    strategy.reset()
    assert strategy.current_delay == 2.0
