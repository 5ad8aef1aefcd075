"""The outermost layer: nothing reaches a route that has not passed here, and what is not allowed is refused.

In this order: form of the request (400) - Host (421) - Origin and Sec-Fetch-Site (403) - method (405) - token (401, 429)
- content type (415) - size (413) - JSON (400) - rate of writes (429). It reads the raw request: no framework has
interpreted it yet. The body of a request is received here, whole and bounded, before any route runs.

Who is kept out: web pages (also by DNS rebinding, also from a sandboxed frame, whose Origin is ``null``), and whoever
cannot read the token's file. Who is let in: processes of the same user.
"""

from __future__ import annotations

import hmac
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from inferos.agent.problems import Problem, problem_body

__all__ = ["Guard", "Limits", "OPEN_PATHS"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})
_READING = frozenset({"GET", "HEAD"})
OPEN_PATHS = frozenset({"/v1/health", "/api/v1/health", "/v1/live", "/live", "/api/v1/live"})
_SAME_SITE = frozenset({b"none", b"same-origin"})

_DRAINED = 1 << 20  # bytes

_SECURITY = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may be, and how many.

    Attributes
    ----------
    control_bytes, inference_bytes : int
        Of a body.
    control_depth, inference_depth : int
        Of nested JSON; tools' schemas are deep.
    failures, failures_seconds : wrong tokens in so many seconds, after which further ones are answered 429
    writes_per_second, writes_burst : changes of the policy
    """

    control_bytes: int = 64 << 10
    inference_bytes: int = 8 << 20
    control_depth: int = 16
    inference_depth: int = 64
    failures: int = 10
    failures_seconds: float = 60.0
    writes_per_second: float = 20.0
    writes_burst: int = 40


class Guard:
    """An ASGI application around another one.

    Parameters
    ----------
    app : ASGI application
    port : int
        The port that clients name in their Host header.
    token : str
    hosts : names
        By which the agent may be addressed, without port.
    public : paths
        GET of these needs no token, besides health and live: the data-free shell of the dashboard.
    inference : path prefixes
        Bodies up to `Limits.inference_bytes`; all others up to `Limits.control_bytes`.
    writes : paths
        POST of these counts against the rate of writes.
    limits : Limits
    clock : seconds, monotonic
    """

    def __init__(
        self,
        app: App,
        *,
        port: int,
        token: str,
        hosts: Iterable[str] = ("127.0.0.1", "localhost", "[::1]"),
        public: Iterable[str] = (),
        inference: Iterable[str] = (),
        writes: Iterable[str] = (),
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._hosts = frozenset(f"{host}:{port}".encode() for host in hosts)
        self._origins = frozenset(b"http://" + host for host in self._hosts)
        self._token = token.encode()
        self._open = OPEN_PATHS | frozenset(public)
        self._inference = tuple(inference)
        self._writes = frozenset(writes)
        self._limits = limits or Limits()
        self._clock = clock
        self._failed: deque[float] = deque(maxlen=self._limits.failures)
        self._allowance = float(self._limits.writes_burst)
        self._allowed_at = clock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        answering = _Answer(send)
        try:
            body = await self._admit(scope, receive)
        except Problem as problem:
            await answering.refuse(problem)
            return
        await self._app(scope, _replay(body, receive), answering)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        headers = _Headers(scope["headers"])
        self._check_form(scope, headers)
        self._check_sender(headers)
        method, path = scope["method"], scope["path"]
        if method not in _METHODS:
            raise Problem(
                405, "Method not allowed", method[:16], [(b"allow", b", ".join(sorted(map(str.encode, _METHODS))))]
            )
        trusted = self._trusts(headers)
        if not trusted and not (method in _READING and path in self._open):
            raise self._unauthorized(headers)
        scope.setdefault("state", {})["trusted"] = trusted
        if method in _READING:
            return b""
        inference = path.startswith(self._inference) if self._inference else False
        most = self._limits.inference_bytes if inference else self._limits.control_bytes
        body = await _body(headers, receive, most)
        if body:
            if headers.one(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
                raise Problem(415, "Unsupported media type", "the body is not application/json")
            _check_json(body, self._limits.inference_depth if inference else self._limits.control_depth)
        if path in self._writes:
            self._spend()
        return body

    def _check_form(self, scope: Scope, headers: _Headers) -> None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        if not raw.startswith(b"/"):
            raise Problem(400, "Bad request", "the request's target is not a path")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Problem(400, "Bad request", "both Content-Length and Transfer-Encoding are given")
        for name in (b"host", b"origin", b"content-length", b"content-type", b"x-inferos-token", b"authorization"):
            if headers.count(name) > 1:
                raise Problem(400, "Bad request", f"more than one {name.decode()} header")
        if headers.one(b"host", b"") not in self._hosts:
            raise Problem(421, "Misdirected request", "the Host header does not name this agent")

    def _check_sender(self, headers: _Headers) -> None:
        origin = headers.one(b"origin", None)
        if origin is not None and origin not in self._origins:
            raise Problem(403, "Forbidden", "requests of other origins are not answered")
        if headers.one(b"sec-fetch-site", b"none") not in _SAME_SITE:
            raise Problem(403, "Forbidden", "cross-site requests are not answered")

    def _trusts(self, headers: _Headers) -> bool:
        given = headers.one(b"x-inferos-token", None)
        if given is None:
            scheme, _, given = headers.one(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer":
                return False
        return hmac.compare_digest(given.strip(), self._token)

    def _unauthorized(self, headers: _Headers) -> Problem:
        if b"x-inferos-token" in headers or b"authorization" in headers:
            now, limits = self._clock(), self._limits
            if len(self._failed) == limits.failures and now - self._failed[0] < limits.failures_seconds:
                wait = int(limits.failures_seconds - (now - self._failed[0])) + 1
                return Problem(429, "Too many wrong tokens", None, [(b"retry-after", str(wait).encode())])
            self._failed.append(now)
        return Problem(
            401, "Unauthorized", "X-Inferos-Token or a bearer token is wanted", [(b"www-authenticate", b"Bearer")]
        )

    def _spend(self) -> None:
        """One write of what the rate allows."""
        now, limits = self._clock(), self._limits
        gained = (now - self._allowed_at) * limits.writes_per_second
        self._allowance, self._allowed_at = min(self._allowance + gained, float(limits.writes_burst)), now
        if self._allowance < 1:
            raise Problem(429, "Too many writes", None, [(b"retry-after", b"1")])
        self._allowance -= 1


class _Headers:
    """The raw headers, by name."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._all: dict[bytes, list[bytes]] = {}
        for name, value in raw:
            self._all.setdefault(name.lower(), []).append(value)

    def __contains__(self, name: bytes) -> bool:
        return name in self._all

    def count(self, name: bytes) -> int:
        return len(self._all.get(name, ()))

    def one(self, name: bytes, absent: Any) -> Any:
        return self._all[name][0] if name in self._all else absent


class _Answer:
    """`send`, with the security headers on whatever is answered."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            given = {name.lower() for name, _ in headers}
            headers += [(name, value) for name, value in _SECURITY if name not in given]
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        body = problem_body(problem.code, problem.message, problem.details)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *problem.headers,
        ]
        if problem.code == 413:  # what was not read would be taken for the next request
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": problem.code, "headers": headers})
        await self({"type": "http.response.body", "body": body})


async def _body(headers: _Headers, receive: Receive, most: int) -> bytes:
    """The whole body, of at most `most` bytes.

    One that is somewhat longer is received before it is refused: a client that still sends would not hear the answer.
    """
    refused = Problem(413, "Content too large", f"a body has at most {most} bytes here")
    declared = headers.one(b"content-length", None)
    if declared is not None:
        if not declared.isdigit():
            raise Problem(400, "Bad request", "Content-Length is no number")
        if len(declared) > 18 or int(declared) > most + _DRAINED:
            raise refused
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "Bad request", "the body ends early")
        part = message.get("body", b"")
        size += len(part)
        if size > most + _DRAINED:
            raise refused
        if size <= most:
            parts.append(part)
        more = message.get("more_body", False)
    if size > most:
        raise refused
    return b"".join(parts)


def _check_json(body: bytes, depth: int) -> None:
    """Refuse what parsers disagree about: duplicate keys, NaN, an unreasonable depth, text that is not UTF-8."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("an object has a key twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=object_of, parse_constant=constant)
    except UnicodeDecodeError:
        raise Problem(400, "Bad request", "the body is not UTF-8") from None
    except RecursionError:
        raise Problem(400, "Bad request", f"the body is nested deeper than {depth}") from None
    except ValueError as error:
        # A JSONDecodeError carries the document: only what and where are told.
        reason = f"{error.msg} at {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Problem(400, "Bad request", f"the body is not JSON: {reason}") from None
    level = [value]
    for _ in range(depth):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise Problem(400, "Bad request", f"the body is nested deeper than {depth}")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body again, then whatever comes: a disconnect."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
