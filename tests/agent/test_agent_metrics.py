"""Figures in the contract's groups; what is unknown is null; loops say how well they keep their period."""

from __future__ import annotations

from typing import Any

import pytest
from agent_client import ask, controlling
from prometheus_client.parser import text_string_to_metric_families

from inferos.agent.history import AgentStore
from inferos.agent.launch import chosen_port, opened_state
from inferos.agent.loops import Loop
from inferos.agent.metrics import snapshot
from inferos.agent.telemetry import Telemetry
from inferos.config import Policy
from inferos.errors import ConfigError
from inferos.runtime.metrics import RequestTimes

GROUPS = {
    "timestamp", "measurement_window", "throughput", "latency", "first_token_latency", "quality", "memory",
    "device_utilization", "optimization_status", "kv_stats", "tps", "ftl_ms", "p95_ms", "mem", "util",
}  # fmt: skip


def state() -> Any:
    return opened_state(Policy(), AgentStore(), {})


def test_all_groups_are_there_and_nothing_is_invented() -> None:
    found = snapshot(state(), lambda: None)
    assert set(found) >= GROUPS
    assert found["tps"] is found["ftl_ms"] is found["p95_ms"] is None
    assert found["util"] == {"npu": None, "igpu": None, "cpu": None}
    assert found["quality"]["delta_ppl_est"] is None
    assert found["memory"]["kv_cache_usage_mb"] is None
    assert found["memory"]["total_allocated_mb"] > 1


def test_prometheus_reads_the_same_figures_at_both_paths() -> None:
    agent = state()
    now = agent.clock()
    agent.metrics.record(RequestTimes(now - 2, now, 10, now - 1))
    with controlling(agent) as control:
        for path in ("/metrics", "/v1/metrics/prometheus"):
            answer = ask(control.agent.url + path)
            assert answer.kind.startswith("text/plain")
            samples = {s.name: s.value for f in text_string_to_metric_families(answer.body) for s in f.samples}
            assert samples["inferos_first_token_latency_seconds"] == pytest.approx(1.0)
            assert "inferos_npu_utilization_ratio" not in samples


def test_an_agent_without_traffic_writes_no_history() -> None:
    agent = state()
    job = Telemetry(agent)
    job()
    assert agent.store.samples(10) == []
    now = agent.clock()
    agent.metrics.record(RequestTimes(now - 2, now, 10, now - 1))
    Telemetry(agent)()
    (row,) = agent.store.samples(10)
    assert row.ftl_ms == pytest.approx(1000)
    assert row.policy_version == 1


def test_a_loop_goes_on_after_a_job_that_fails() -> None:
    loop = Loop("slow", lambda: 0.1)
    done: list[int] = []
    loop.jobs += [lambda: 1 // 0, lambda: done.append(1)]
    loop.turn()
    loop.turn()
    assert done == [1, 1]
    shown = loop.times.shown(100)
    assert (shown["turns"], shown["failures"], shown["requested_ms"]) == (2, 2, 100)


def test_the_port_is_the_options_then_the_environments() -> None:
    assert chosen_port(7, {"INFEROS_AGENT_PORT": "8"}) == 7
    assert chosen_port(None, {"INFEROS_AGENT_PORT": "8"}) == 8
    assert chosen_port(None, {"INFEROS_RANDOM_PORT": "true"}) == 0
    assert chosen_port(None, {}) == 7031
    with pytest.raises(ConfigError, match="INFEROS_AGENT_PORT"):
        chosen_port(None, {"INFEROS_AGENT_PORT": "x"})
