"""An agent from its options to its end: token, socket, routes, the file that outlives it, and the model in the background."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import platformdirs
from fastapi import APIRouter

from inferos.agent.app import build_app
from inferos.agent.control import WRITES, control_router
from inferos.agent.guard import Guard
from inferos.agent.history import AgentStore
from inferos.agent.metrics import metrics_router
from inferos.agent.prometheus import prometheus_router
from inferos.agent.server import DEFAULT_PORT, Server, bind, check_host
from inferos.agent.settings import AgentSettings
from inferos.agent.state import AgentState
from inferos.agent.telemetry import Telemetry
from inferos.agent.token import TOKEN_VARIABLE, ensure_token, take_token_variable, token_path
from inferos.config import Policy, load_policy
from inferos.errors import ConfigError
from inferos.kv.policy import PolicyStore
from inferos.runtime.model import Model

__all__ = ["Launch", "agent_file", "agent_routers", "chosen_port", "opened_state", "start_policy"]

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_LEVELS = ("debug", "info", "warning", "error")
_TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_log = logging.getLogger(__name__)


def agent_routers() -> list[APIRouter]:
    """The routes of every agent, besides health."""
    return [control_router(), metrics_router(), prometheus_router()]


def chosen_port(given: int | None, environment: Mapping[str, str] | None = None) -> int:
    """The port to listen on: the one given, else INFEROS_AGENT_PORT, else 0 (any) with INFEROS_RANDOM_PORT, else 7031.

    Raises
    ------
    ConfigError
        If it is no port, or a variable is not of its form.
    """
    variables = os.environ if environment is None else environment
    text = variables.get("INFEROS_AGENT_PORT")
    if given is None and text is not None:
        if not text.isascii() or not text.isdigit() or len(text) > 5:
            raise ConfigError(f"INFEROS_AGENT_PORT: {text!r:.40} is not within 0..65535")
        given = int(text)
    if given is None:
        return 0 if _truth("INFEROS_RANDOM_PORT", variables, default=False) else DEFAULT_PORT
    if not 0 <= given <= 65535:
        raise ConfigError(f"port: {given} is not within 0..65535")
    return given


def start_policy(config: Path | None, environment: Mapping[str, str] | None = None) -> Policy:
    """What the file and the environment say; with INFEROS_ENABLED=false, uncompressed.

    Raises
    ------
    ConfigError
        If either is refused.
    """
    variables = os.environ if environment is None else environment
    policy = load_policy(config, variables)
    if not _truth("INFEROS_ENABLED", variables, default=True):
        policy = policy.update({"kv": {"mode": "disabled", "preset": None, "level_thresholds": None}})
    return policy


def agent_file(port: int) -> Path:
    """The file of the agent on a port (0: of agents on any free one)."""
    name = "agent" if port == DEFAULT_PORT else f"agent-{port or 'random'}"
    return platformdirs.user_data_path("inferos", appauthor=False) / f"{name}.db"


def opened_state(policy: Policy, store: AgentStore | None, environment: Mapping[str, str] | None = None) -> AgentState:
    """The state that a new agent begins with.

    It goes on with the policy of the run before, unless file and environment say something else than they did then:
    in that case with what they say now, as a new version.

    Parameters
    ----------
    policy : Policy
        Of file and environment.
    store : AgentStore, optional
    environment : mapping, optional
        For INFEROS_LOG_LEVEL, which wins over the level that was kept.

    Raises
    ------
    ConfigError
        If the log level is unknown.
    """
    policies = PolicyStore(policy)
    settings = AgentSettings()
    if store is not None:
        said = json.dumps(policy.requested(), sort_keys=True)
        before = store.versions()
        if before:
            policies.restore(before)
        policies.record_with(store.add_version)
        if not before:
            store.add_version(policies.current)
        elif store.setting("start") != said:
            policies.replace(policy, "the file or the environment changed")
        store.set("start", said)
        kept = store.setting("settings")
        settings = settings if kept is None else AgentSettings.model_validate_json(kept)
    level = (os.environ if environment is None else environment).get("INFEROS_LOG_LEVEL")
    if level is not None:
        if level.lower() not in _LEVELS:
            raise ConfigError(f"INFEROS_LOG_LEVEL: {level!r:.40} is not one of {', '.join(_LEVELS)}")
        settings = settings.model_copy(update={"log_level": level.lower()})
    settings.put_in_force()
    state = AgentState(policies, start_policy=policy, store=store, settings=settings)
    state.loops.periods_ms = lambda: _periods(state)
    state.loops.slow.jobs.append(Telemetry(state))
    return state


@dataclass(frozen=True, slots=True)
class Launch:
    """How an agent runs.

    Parameters
    ----------
    config : Path, optional
        A policy file.
    port : int, optional
        As `chosen_port`.
    host : str
        Another one than the loopback needs `expose` and `token_file`.
    token_file : Path, optional
        The user's own unless given; INFEROS_AGENT_TOKEN wins over the user's own.
    expose : bool
    token_given : bool
        Whether INFEROS_AGENT_TOKEN is there; it is taken out of the environment when the agent runs.
    """

    config: Path | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    token_file: Path | None = None
    expose: bool = False
    token_given: bool = field(default_factory=lambda: TOKEN_VARIABLE in os.environ)

    @property
    def token_source(self) -> str:
        """Where the token is, in words; never the token."""
        if self.token_file is not None:
            return str(self.token_file)
        return TOKEN_VARIABLE if self.token_given else str(token_path())

    def check(self) -> None:
        """Refuse what must not be listened on.

        Raises
        ------
        ConfigError
        """
        check_host(self.host, exposed=self.expose)
        if self.expose and self.token_file is None:
            raise ConfigError("--expose: a --token-file must be given")

    def run(
        self,
        *,
        routers: Sequence[APIRouter] = (),
        inference: Sequence[str] = (),
        public: Sequence[str] = (),
        load: Callable[[Policy], Model] | None = None,
        warm: Callable[[AgentState], None] | None = None,
        listening: Callable[[str, AgentState], None] = lambda _url, _state: None,
        policy_changes: Mapping[str, object] | None = None,
    ) -> None:
        """Serve until a signal.

        Parameters
        ----------
        routers : routes besides the agent's own
        inference : path prefixes whose bodies may be long
        public : paths that answer without a token
        load : callable, optional
            Opens the model that is to be served, given the policy in force; run in the background.
        warm : callable, optional
            Run after it, in the background; the agent is ready when it returns.
        listening : callable
            Told the address once connections are accepted.
        policy_changes : mapping, optional
            Of the command line, over file and environment.

        Raises
        ------
        ConfigError
            If an option is refused or the port is taken. What `load` and `warm` raise ends the agent.
        """
        self.check()
        port = chosen_port(self.port)
        policy = start_policy(self.config)
        if policy_changes:
            policy = policy.update(policy_changes)
        given = take_token_variable()
        token = given if given is not None and self.token_file is None else ensure_token(self.token_file)
        listener = bind("127.0.0.1" if self.host == "localhost" else self.host, port)
        store: AgentStore | None = None
        try:
            store = AgentStore(agent_file(port))
            state = opened_state(policy, store)
            app = build_app(state, [*agent_routers(), *routers])
            bound = listener.getsockname()[1]
            guard = Guard(
                app, port=bound, token=token, hosts=_names(self.host), public=public, inference=inference, writes=WRITES
            )
            self._serve(Server(guard), listener, state, load, warm, listening)
        finally:
            listener.close()
            if store is not None:
                store.close()

    def _serve(
        self,
        server: Server,
        listener: socket.socket,
        state: AgentState,
        load: Callable[[Policy], Model] | None,
        warm: Callable[[AgentState], None] | None,
        listening: Callable[[str, AgentState], None],
    ) -> None:
        failed: list[BaseException] = []

        def prepare() -> None:
            try:
                if load is not None:
                    state.serve(load(state.policies.policy))
                if warm is not None:
                    warm(state)
                state.ready.set()
            except BaseException as error:  # noqa: BLE001 - told by the thread that started us
                failed.append(error)
                server.should_exit = True

        thread = threading.Thread(target=prepare, name="inferos-load", daemon=True)
        state.loops.start()
        listening(_url(self.host, listener.getsockname()[1]), state)
        thread.start()
        try:
            with _stopping(server):
                server.run_on(listener)
        finally:
            state.loops.close()
            if state.model is not None:
                state.model.close()
        if failed:
            raise failed[0]


@contextmanager
def _stopping(server: Server) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the server, and after it us as an end that was asked for, not as a failure."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn puts its own handlers in place while it runs, and afterwards raises what came to those of before.
    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _names(host: str) -> tuple[str, ...]:
    name = f"[{host}]" if ":" in host else host
    return _LOOPBACK if name in _LOOPBACK else (*_LOOPBACK, name)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _periods(state: AgentState) -> tuple[float, float, float]:
    loops = state.policies.policy.loops
    return loops.fast_ms, loops.mid_ms, loops.slow_ms


def _truth(name: str, variables: Mapping[str, str], *, default: bool) -> bool:
    text = variables.get(name)
    if text is None or not text.strip():
        return default
    if text.strip().lower() not in _TRUTHS:
        raise ConfigError(f"{name}: {text!r:.40} is not true or false")
    return _TRUTHS[text.strip().lower()]
