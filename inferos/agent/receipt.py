"""A deadline for receiving a request: half-open connections are closed, which uvicorn alone never does."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["RECEIPT_SECONDS", "ReceiptDeadlineProtocol"]

RECEIPT_SECONDS = 5.0  # from the first byte (of a connection: from its beginning) to the whole request


class ReceiptDeadlineProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol; a connection whose request is not whole in time is closed."""

    _receipt: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a client that says nothing is half-open too."""
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop it where the request is whole."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next request on the connection has its own time, from its first byte."""
        super().on_response_complete()
        self._stop()
        self._watch()

    def _watch(self) -> None:
        state: Any = self.conn.their_state
        begun = state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))
        if not begun:
            self._stop()
        elif self._receipt is None:
            self._start()

    def _start(self) -> None:
        self._receipt = self.loop.call_later(RECEIPT_SECONDS, self._expire)

    def _stop(self) -> None:
        if self._receipt is not None:
            self._receipt.cancel()
            self._receipt = None

    def _expire(self) -> None:
        self._receipt = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.abort()
