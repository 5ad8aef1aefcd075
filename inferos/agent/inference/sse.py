"""Server-sent events that end early when the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response

__all__ = ["EventStream", "PING", "PING_SECONDS", "watched"]

PING = b": ping\n\n"
PING_SECONDS = 10.0

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@asynccontextmanager
async def watched(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """While the block runs, `on_gone` is called as soon as the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])


class EventStream(Response):
    """A response of events, sent as they come.

    Parameters
    ----------
    events : bytes of one or more whole events each
    on_gone : called when the client disconnects, and when sending ends in whatever way; the events end then
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_gone: Callable[[], None]) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_gone = on_gone

    async def __call__(self, _scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Send them."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with watched(receive, self._on_gone):
                async for part in self._events:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_gone()
