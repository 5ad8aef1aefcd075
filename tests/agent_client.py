"""Requests to a served agent, with its token."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agent_server import TOKEN, Agent, serving

from inferos.agent.app import build_app
from inferos.agent.control import WRITES
from inferos.agent.guard import Guard, Limits
from inferos.agent.launch import agent_routers
from inferos.agent.state import AgentState


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and its body, as JSON where it is."""

    status: int
    body: Any
    kind: str


def ask(url: str, body: Any = None, *, method: str | None = None, token: str = TOKEN) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - our own agent
        url, data, {"X-Inferos-Token": token, "Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - as above
            return _answer(answer.status, answer.read(), answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error.code, error.read(), error.headers)


def _answer(status: int, raw: bytes, headers: Any) -> Answer:
    kind = headers.get("Content-Type", "")
    return Answer(status, json.loads(raw) if "json" in kind else raw.decode(), kind)


@dataclass(frozen=True, slots=True)
class Control:
    """The control routes of a running agent."""

    agent: Agent
    state: AgentState

    def get(self, path: str) -> Any:
        answer = ask(self.agent.url + path)
        assert answer.status == 200, answer
        return answer.body

    def post(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = ask(self.agent.url + path, body, method="POST")
        assert answer.status == status, answer
        return answer.body


def control_app(state: AgentState, port: int) -> Any:
    """The agent's own routes behind the guard, without its rates."""
    limits = Limits(writes_per_second=1e9, writes_burst=1 << 30, failures_seconds=0)
    return Guard(build_app(state, agent_routers()), port=port, token=TOKEN, writes=WRITES, limits=limits)


@contextmanager
def controlling(state: AgentState) -> Iterator[Control]:
    with serving(state, control_app) as agent:
        yield Control(agent, state)
