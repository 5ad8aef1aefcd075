"""Killed at any moment and started again, the agent goes on with the last policy that it acknowledged."""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from agent_client import Answer, ask
from agent_server import TOKEN

from inferos.agent.history import AgentStore, Sample
from inferos.agent.launch import agent_file, opened_state
from inferos.config import Policy
from inferos.errors import ConfigError


class Process:
    """`inferos agent` in a process of its own."""

    def __init__(self, home: Path) -> None:
        (home / "token").write_text(TOKEN)
        (home / "token").chmod(0o600)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("INFEROS_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "inferos.cli", "agent", "--port", "0", "--token-file", str(home / "token")],
            env=kept | {"XDG_DATA_HOME": str(home), "LOCALAPPDATA": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("inferos agent on http://"), line
        assert TOKEN not in line
        self.url = line.removeprefix("inferos agent on ").split(";")[0]

    def ask(self, path: str, body: Any = None) -> Answer:
        return ask(self.url + path, body)

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self._process.kill()

    def close(self) -> str:
        """End it if it lives; what it said."""
        self._process.kill()
        said, _ = self._process.communicate(timeout=20)
        return said


def run_and_kill(home: Path, seed: int, number: int, acknowledged: int) -> tuple[int, int]:
    """Change the policy till the kill; the newest acknowledged version, and what was asked for last."""
    agent = Process(home)
    try:
        found = agent.ask("/v1/policy").body
        window = found["requested"].get("kv", {}).get("recent_window", 0)
        assert window in (acknowledged, number), "neither the last acknowledged policy nor the one in flight"
        history = agent.ask("/v1/policy/history").body["history"]
        versions = [entry["version"] for entry in history]
        assert versions == list(range(versions[0], versions[0] + len(versions)))
        acknowledged = number = window
        killer = threading.Thread(target=agent.kill_after, args=(random.Random(seed).uniform(0, 0.4),))
        killer.start()
        try:
            for _ in range(1000):
                number = 16 + (number - 15) % 490
                answer = agent.ask("/v1/policy", {"kv": {"recent_window": number}})
                if answer.status == 200:
                    acknowledged = number
                else:
                    assert answer.status == 429
                    time.sleep(0.02)
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            pass  # killed
        killer.join()
    finally:
        assert TOKEN not in agent.close()
    return acknowledged, number


def survives(home: Path, kills: int) -> None:
    acknowledged, asked = 0, 0
    for seed in range(kills):
        acknowledged, asked = run_and_kill(home, seed, asked, acknowledged)
    assert acknowledged > 0


@pytest.mark.skipif(sys.platform == "win32", reason="platformdirs asks Windows, not the environment, for the folder")
def test_a_kill_loses_no_acknowledged_policy(tmp_path: Path) -> None:
    survives(tmp_path, 4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="as above")
def test_fifty_kills_lose_no_acknowledged_policy(tmp_path: Path) -> None:
    survives(tmp_path, 50)


def test_a_new_agent_goes_on_with_policy_settings_and_history(tmp_path: Path) -> None:
    first = AgentStore(tmp_path / "agent.db")
    state = opened_state(Policy(), first, {})
    state.policies.update({"kv": {"sink_tokens": 9}}, "more sinks")
    first.add_sample(Sample(5.0, 1.5, None, None, None, None, 2), 10)
    first.close()
    second = AgentStore(tmp_path / "agent.db")
    again = opened_state(Policy(), second, {})
    assert again.policies.history == state.policies.history
    assert second.samples(10) == [Sample(5.0, 1.5, None, None, None, None, 2)]
    second.close()


def test_what_file_and_environment_say_anew_becomes_a_version(tmp_path: Path) -> None:
    for policy, sinks, version in ((Policy(), 9, 2), (Policy.from_mapping({"kv": {"sink_tokens": 3}}), 3, 3)):
        store = AgentStore(tmp_path / "agent.db")
        state = opened_state(policy, store, {})
        if version == 2:
            state.policies.update({"kv": {"sink_tokens": 9}}, "by hand")
        assert (state.policies.policy.kv.sink_tokens, state.policies.current.version) == (sinks, version)
        store.close()


def test_two_agents_do_not_share_a_file(tmp_path: Path) -> None:
    store = AgentStore(tmp_path / "agent.db")
    with pytest.raises(ConfigError, match="another agent has it open"):
        AgentStore(tmp_path / "agent.db")
    store.close()


def test_the_history_keeps_the_newest_rows() -> None:
    store = AgentStore()
    for number in range(300):
        store.add_sample(Sample(float(number), None, None, None, None, None, 1), 50)
    store.prune(50)
    assert [row.at for row in store.samples(1000)] == [float(number) for number in range(250, 300)]


def test_a_policy_that_cannot_be_kept_is_not_in_force(tmp_path: Path) -> None:
    store = AgentStore(tmp_path / "agent.db")
    state = opened_state(Policy(), store, {})
    store.close()
    with pytest.raises(OSError, match="cannot be written"):
        state.policies.update({"kv": {"sink_tokens": 9}}, "lost")
    assert state.policies.current.version == 1
    assert state.policies.policy.kv.sink_tokens == 4


def test_agents_on_other_ports_have_files_of_their_own() -> None:
    assert len({agent_file(port) for port in (0, 7031, 7032)}) == 3
