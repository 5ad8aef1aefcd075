"""Serving the application: one socket, bound once, on the loopback unless told otherwise."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import uvicorn

from inferos.agent.receipt import ReceiptDeadlineProtocol
from inferos.errors import ConfigError

__all__ = ["DEFAULT_PORT", "Server", "bind", "check_host"]

DEFAULT_PORT = 7031
_BACKLOG = 512  # half-open connections must not keep a good one waiting
_KEEP_ALIVE_SECONDS = 30
_HEADER_BYTES = 16 << 10


def check_host(host: str, *, exposed: bool) -> None:
    """Refuse another address than the loopback's unless `exposed`.

    Raises
    ------
    ConfigError
        If `host` is no address, or is reachable from outside and that was not asked for.
    """
    if host == "localhost":
        return
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"host: {host!r} is not an IP address") from None
    if not address.is_loopback and not exposed:
        raise ConfigError(
            f"host: {host} can be reached from outside; --expose with a --token-file says that this is meant"
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises
    ------
    ConfigError
        If the port is taken or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows: nobody else may bind the same port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"port: {host}:{port} cannot be bound ({error.strerror})") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn with our receipt deadline, without its own logging and without headers that name it."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ReceiptDeadlineProtocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                date_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=_HEADER_BYTES,
            )
        )

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal or `should_exit`."""
        self.run(sockets=[listener])
