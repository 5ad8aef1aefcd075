"""An agent that listens on a free port of the loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from inferos.agent.server import Server, bind
from inferos.agent.state import AgentState
from inferos.config import Policy
from inferos.kv.policy import PolicyStore

TOKEN = "test-token-of-32-characters-abcd"


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent."""

    port: int
    state: AgentState

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Inferos-Token": TOKEN}

    def connect(self, timeout: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, request: bytes) -> Raw:
        """Send these bytes, whatever they are; the answer, the connection closed by either side."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_answer(connection)


def read_answer(connection: socket.socket) -> Raw:
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            break
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    length = int(headers.get("content-length", "0"))
    while len(body) < length:
        part = connection.recv(65536)
        if not part:
            break
        body += part
    return Raw(int(first.split()[1]) if first else 0, headers, body)


def new_state() -> AgentState:
    state = AgentState(PolicyStore(Policy()))
    state.ready.set()
    return state


@contextmanager
def serving(state: AgentState, build: Callable[[AgentState, int], object]) -> Iterator[Agent]:
    """Serve what `build(state, port)` gives until the block ends."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(build(state, port))
    thread = threading.Thread(target=server.run_on, args=(listener,), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        assert thread.is_alive(), "the server did not start"
    try:
        yield Agent(port, state)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
