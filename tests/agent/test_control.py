"""What each control route promises, over a real socket."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from agent_client import Control, controlling
from agent_server import TOKEN, read_answer

import inferos
from inferos.agent.history import AgentStore, Sample
from inferos.agent.launch import opened_state
from inferos.agent.state import AgentState
from inferos.config import Policy

DEFAULT = {"kv": {"recent_window": 128}}


def fresh(policy: Policy | None = None) -> AgentState:
    state = opened_state(policy or Policy.from_mapping(DEFAULT), AgentStore(), {})
    state.ready.set()
    return state


@pytest.fixture
def control() -> Iterator[Control]:
    with controlling(fresh()) as running:
        yield running


def test_a_partial_policy_is_merged_and_gets_a_version_and_a_reason(control: Control) -> None:
    found = control.post("/v1/policy?reason=narrower", {"kv": {"sink_tokens": 8}})
    assert (found["version"], found["reason"]) == (2, "narrower")
    assert found["requested"] == {"kv": {"recent_window": 128, "sink_tokens": 8}}
    assert found["effective"]["kv"]["level_thresholds"] == {"L1_int8": 1.0, "L2_int4": 0.7, "L3_evict": 0.3}
    assert control.get("/v1/policy") == found


@pytest.mark.parametrize(
    ("body", "details"),
    [
        ({"kv": {"recent_window": 9}}, "kv.recent_window: 9 is not within 16..512"),
        ({"kv": {"level_thresholds": {"L1_int8": 0.1}}}, "kv.level_thresholds: L1_int8 0.1"),
        ({"infer_os": {"quality": {"max_delta_ppl": "x"}}}, "quality.max_delta_ppl: 'x'"),
        ({"command": "rm"}, "command: unknown key"),
        ([], "policy: the body is not a mapping"),
        ({"kv": {"scorer": "\ud800"}}, "kv.scorer"),
    ],
)
def test_a_refused_policy_changes_nothing_and_names_the_path(control: Control, body: object, details: str) -> None:
    before = control.get("/v1/policy")
    error = control.post("/v1/policy", body, 400)["error"]
    assert error["code"] == 400
    assert error["message"] == "Invalid policy configuration"
    assert error["details"].startswith(details)
    assert control.get("/v1/policy") == before


def test_an_earlier_version_can_be_brought_back(control: Control) -> None:
    control.post("/v1/policy", {"kv": {"sink_tokens": 8}})
    assert control.post("/v1/policy/rollback", {"version": 1})["requested"] == DEFAULT
    history = control.get("/v1/policy/history")["history"]
    assert [entry["version"] for entry in history] == [1, 2, 3]
    assert history[-1]["reason"] == "rollback to version 1"
    assert "version" in control.post("/v1/policy/rollback", {"version": 77}, 400)["error"]["details"]


def test_baseline_switches_compression_off_and_back_to_what_it_was(control: Control) -> None:
    control.post("/v1/policy", {"kv": {"preset": "13b"}})
    compressed = control.get("/v1/policy")["effective"]["kv"]
    off = control.post("/v1/baseline", {"enable": True})
    assert set(off["effective"]["kv"]["level_thresholds"].values()) == {0.0}
    assert control.post("/v1/baseline?enable=true")["version"] == off["version"]
    on = control.post("/v1/baseline?enable=false")["effective"]["kv"]
    assert on["level_thresholds"] == compressed["level_thresholds"]
    assert on["preset"] == "13b"


def test_baseline_without_a_body_goes_back_to_the_policy_of_the_start(control: Control) -> None:
    control.post("/v1/policy", {"kv": {"mode": "quality_optimized"}, "loops": {"mid_ms": 20}})
    assert control.post("/v1/baseline")["requested"] == DEFAULT
    control.post("/v1/baseline?enable=true", {"enable": True}, 400)
    control.post("/v1/baseline", {"enable": 1}, 400)
    with control.agent.connect() as connection:
        head = f"POST /v1/baseline HTTP/1.1\r\nHost: 127.0.0.1:{control.agent.port}\r\nX-Inferos-Token: {TOKEN}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 4\r\n\r\nnull".encode())
        assert read_answer(connection).status == 400


def kept_bytes(model: inferos.Model) -> set[str]:
    with model.chat(max_tokens=4) as chat:
        list(chat.send("tell me a story " * 40))
        pool = model.kv_pool
        assert pool is not None
        return {purpose for purpose, count in pool.used_by_purpose.items() if count and purpose != "scores"}


def test_baseline_switches_new_sequences_of_a_served_model() -> None:
    state = fresh(Policy())
    with inferos.load("reference", kv="auto", policy=state.policies.policy) as model, controlling(state) as control:
        state.serve(model)
        assert kept_bytes(model) - {"f16"}
        control.post("/v1/baseline", {"enable": True})
        assert kept_bytes(model) == {"f16"}
        assert control.get("/v1/metrics")["optimization_status"]["kv_quantization_active"] is False
        control.post("/v1/baseline", {"enable": False})
        assert kept_bytes(model) - {"f16"}
        assert control.get("/v1/metrics")["optimization_status"]["kv_quantization_active"] is True


def test_baseline_says_when_a_fixed_format_cannot_be_switched() -> None:
    state = fresh(Policy())
    with inferos.load("reference", kv="int8") as model, controlling(state) as control:
        state.serve(model)
        assert "kv=int8" in control.post("/v1/baseline", {"enable": True}, 409)["error"]["details"]


def test_config_changes_the_agents_settings_and_nothing_else(control: Control) -> None:
    before = logging.getLogger("inferos").level
    try:
        found = control.post(
            "/v1/config", {"log_level": "error", "loops": {"slow_ms": 250}, "history": {"max_rows": 5}}
        )
        assert (found["log_level"], found["loops"]["slow_ms"], found["history"]["max_rows"]) == ("error", 250, 5)
        assert control.get("/v1/config") == found
        assert logging.getLogger("inferos").level == logging.ERROR
        assert control.get("/v1/policy")["requested"]["loops"] == {"slow_ms": 250}
        control.post("/v1/config", {"kv": {}}, 400)
        control.post("/v1/config", {"log_level": "info", "loops": {"slow_ms": 0}}, 400)
        assert control.get("/v1/config") == found
    finally:
        logging.getLogger("inferos").setLevel(before)


def test_history_gives_the_newest_rows_after_an_instant(control: Control) -> None:
    store = control.state.store
    assert store is not None
    for second in range(10):
        store.add_sample(Sample(1_800_000_000.0 + second, float(second), None, None, 7, None, 1), 100)
    rows = control.get("/v1/history?limit=3")["history"]
    assert [row["tps"] for row in rows] == [7, 8, 9]
    assert rows[0] | {"timestamp": ""} == {
        "timestamp": "", "tps": 7.0, "ftl_ms": None, "p95_ms": None, "kv_bytes": 7, "delta_ppl": None, "policy_version": 1
    }  # fmt: skip
    later = control.get(f"/v1/history?since={rows[1]['timestamp']}")["history"]
    assert [row["tps"] for row in later] == [9]


def test_a_slower_target_or_a_lower_priority_never_allows_less_compression(control: Control) -> None:
    def bands(target: float | None, quality: float, priority: str) -> np.ndarray:
        body = {"model": "m", "seq_len": 100, "target_ftl_ms": target, "quality_budget": quality, "priority": priority}
        answer = control.post("/v1/run-context", body)
        shares = Policy.from_mapping(answer["policy"]).kv.thresholds()
        return np.array(shares.as_tuple())

    targets, priorities = (100, 900, 5000), ("high", "medium", "low")
    for quality in (0.0, 0.6, 0.8, 1.0):
        for priority in priorities:
            found = [bands(target, quality, priority) for target in targets]
            assert all((later >= earlier).all() for earlier, later in pairwise(found))
        found = [bands(900, quality, priority) for priority in priorities]
        assert all((later >= earlier).all() for earlier, later in pairwise(found))
    assert bands(5000, 0.5, "low")[2] > bands(100, 0.5, "high")[2]


def test_a_suggestion_changes_nothing_and_can_be_applied_as_it_is(control: Control) -> None:
    body = {"model_name": "m", "seq_len": 4096, "target_ftl_ms": 300, "quality_budget": 0.8}
    found = control.post("/v1/policy/suggest", body)
    assert found["allowed_delta_ppl"] == pytest.approx(0.5 * 0.4)
    assert control.get("/v1/policy")["version"] == found["policy_version"] == 1
    control.post("/v1/policy", found["policy"])


def test_pushed_figures_are_counted(control: Control) -> None:
    stats = {"start_time": 1e9, "end_time": 1e9 + 2, "tokens_generated": 50, "first_token_latency": 0.25}
    control.post("/v1/metrics/push", stats, 204)
    found = control.get("/v1/metrics")
    assert found["ftl_ms"] == pytest.approx(250)
    assert found["latency"]["mean_ms"] == pytest.approx(2000)
    assert 0 < found["tps"] <= 25
    control.post("/v1/metrics/push", stats | {"end_time": 1}, 400)


def test_refusals_have_one_form(control: Control) -> None:
    found = control.post("/v1/run-context", {"model": "m", "seq_len": -1, "extra": 1}, 400)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"code", "message", "details", "param", "type"}
    assert "seq_len" in json.dumps(found)
