"""The policy on the command line: what its flags and the environment set, and what a report says about it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inferos.cli._app import app

pytest.importorskip("onnxruntime")

LIMIT = 64 << 20


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def written(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_dry_run_shows_what_the_policy_amounts_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFEROS_KV__MODE", "latency_optimized")
    monkeypatch.setenv("INFEROS_KV__LAYER_OVERRIDES", '{"-1": {"max_level": "L1"}}')
    plan = written(call("run", "reference", "x", "--kv", "auto", "--memory-limit", "64MiB", "--dry-run", "--json", "-"))
    assert (plan["mode"], plan["thresholds"], plan["recent_window"]) == ("latency_optimized", [1, 0.5, 0.2], 128)
    assert (plan["max_levels"], plan["memory_limit"]) == (["L3"] * 5 + ["L1"], LIMIT)


def test_limit_and_threshold_are_the_policys_and_a_report_says_what_is_in_force() -> None:
    arguments = ["--kv", "auto", "--memory-limit", "64MiB", "--quality-threshold", "0.1", "--max-tokens", "2"]
    policy = written(call("run", "reference", "x", *arguments, "--json", "-"))["policy"]
    assert policy["requested"] == {"io": {"host_pool_bytes": LIMIT}, "quality": {"max_delta_ppl": 0.1}}
    assert policy["effective"]["io"] == {"host_pool_bytes": LIMIT, "enable_iobinding": True}
    assert policy["effective"]["quality"] == {"max_delta_ppl": 0.1}
    assert policy["effective"]["kv"]["format"] == "auto"


def test_a_requested_key_that_is_not_in_force_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFEROS_KV__SCORER", "recency")
    result = call("run", "reference", "x", "--kv", "int4", "--max-tokens", "2")
    assert "inferos: kv.scorer: not in force, kv=int4 is a fixed format" in result.stderr


def test_an_evaluation_goes_by_the_policy_and_the_limit_spares_its_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFEROS_KV__MODE", "quality_optimized")
    monkeypatch.setenv("INFEROS_KV__RECENT_WINDOW", "64")
    arguments = ["--context", "400", "--threads", "1", "--no-recall", "--memory-limit", "16MiB", "--kv", "int8,auto"]
    rows = written(call("eval", "reference", *arguments, "--json", "-"))["rows"]
    assert rows[0]["kv_bytes"] == rows[1]["kv_bytes"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--memory-limit", "1MiB"], "--memory-limit: 1MiB is 1048576 bytes, expected at least 16MiB"),
        (["chat", "reference", "--quality-threshold", "3"], "--quality-threshold: 3.0 is not within 0..2"),
    ],
)
def test_a_bad_limit_or_threshold_is_bad_usage(arguments: list[str], told: str) -> None:
    result = call(*arguments)
    assert (result.exit_code, told in result.stderr) == (2, True)


def test_a_bad_environment_variable_is_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFEROS_KV__WIDOW", "1")
    result = call("run", "reference", "x")
    assert (result.exit_code, "INFEROS_*: kv.widow: unknown key" in result.stderr) == (2, True)
