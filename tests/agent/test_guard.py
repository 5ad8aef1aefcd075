"""The attack matrix: every request that must be refused, and the code it is refused with, over a real socket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from agent_server import TOKEN, Agent, Raw, new_state, read_answer, serving
from fastapi import APIRouter, Request

from inferos.agent.app import build_app
from inferos.agent.guard import Guard, Limits
from inferos.agent.receipt import RECEIPT_SECONDS

KB = 1 << 10


def echoing(state: Any, port: int) -> Any:
    """An agent whose /v1/echo and /v1/chat/echo say how long the body was."""
    router = APIRouter()

    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    for path in ("/v1/echo", "/v1/chat/echo", "/v1/policy"):
        router.add_api_route(path, echo, methods=["GET", "POST"])
    limits = Limits(failures=3, writes_burst=5, writes_per_second=0.0)
    return Guard(
        build_app(state, [router]), port=port, token=TOKEN, inference=["/v1/chat"], writes=["/v1/policy"], limits=limits
    )


@pytest.fixture
def agent() -> Iterator[Agent]:
    with serving(new_state(), echoing) as running:
        yield running


def request(
    agent: Agent,
    line: str = "GET /v1/ready",
    *headers: str,
    host: str | None = "",
    token: bool = True,
    body: bytes = b"",
) -> Raw:
    """One request; `host` "" is the right one, None is none."""
    lines = [f"{line} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host or f'127.0.0.1:{agent.port}'}")
    if token:
        lines.append(f"X-Inferos-Token: {TOKEN}")
    return agent.raw("\r\n".join([*lines, *headers, "", ""]).encode() + body)


def post(agent: Agent, body: bytes, *headers: str, path: str = "/v1/echo", kind: str = "application/json") -> Raw:
    return request(agent, f"POST {path}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers, body=body)


GOOD = {
    "own host": ("127.0.0.1", ()),
    "localhost": ("localhost", ()),
    "IPv6 loopback": ("[::1]", ()),
    "own origin": ("127.0.0.1", ("Origin: http://127.0.0.1:{port}",)),
    "a navigation": ("127.0.0.1", ("Sec-Fetch-Site: none",)),
    "a page of ours": ("127.0.0.1", ("Sec-Fetch-Site: same-origin",)),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_is_answered(agent: Agent, name: str) -> None:
    host, headers = GOOD[name]
    lines = (header.format(port=agent.port) for header in headers)
    assert request(agent, "GET /v1/ready", *lines, host=f"{host}:{agent.port}").status == 200


HOSTS = {
    "another name": "evil.example:{port}",
    "no port": "127.0.0.1",
    "another port": "127.0.0.1:1",
    "a port that overflows": "127.0.0.1:99999999",
    "a name under localhost": "evil.localhost:{port}",
    "a suffix": "127.0.0.1:{port}.evil.example",
    "user information": "127.0.0.1:{port}@evil.example",
    "characters that move the path": "127.0.0.1:{port}/v1/health?",
    "the empty name": ":{port}",
    "upper case of another": "EVIL:{port}",
}


@pytest.mark.parametrize("name", HOSTS)
def test_other_hosts_are_misdirected(agent: Agent, name: str) -> None:
    answer = request(agent, "GET /v1/health", host=HOSTS[name].format(port=agent.port))
    assert answer.status == 421
    assert json.loads(answer.body)["error"]["code"] == 421


def test_no_host_at_all_is_refused(agent: Agent) -> None:
    assert agent.raw(b"GET /v1/health HTTP/1.0\r\n\r\n").status == 421
    assert request(agent, host=None).status in (400, 421)  # HTTP/1.1 itself demands one


def test_two_hosts_are_refused(agent: Agent) -> None:
    assert request(agent, "GET /v1/health", "Host: evil.example").status == 400


def test_an_absolute_target_is_refused(agent: Agent) -> None:
    assert request(agent, "GET http://evil.example/v1/health").status == 400
    assert request(agent, f"GET http://127.0.0.1:{agent.port}/v1/health").status == 400


@pytest.mark.parametrize(
    "header",
    [
        "Origin: null",
        "Origin: http://evil.example",
        "Origin: http://127.0.0.1",
        "Origin: https://127.0.0.1:{port}",
        "Origin: http://127.0.0.1:{port}.evil.example",
        "Origin: file://",
        "Origin: chrome-extension://abc",
        "Origin: ",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
        "Sec-Fetch-Site: nonsense",
    ],
)
@pytest.mark.parametrize("path", ["/v1/health", "/v1/ready"])
def test_other_origins_are_forbidden_even_with_a_token(agent: Agent, header: str, path: str) -> None:
    assert request(agent, f"GET {path}", header.format(port=agent.port)).status == 403


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT", "BREW"])
def test_other_methods_are_not_allowed_and_there_is_no_cors(agent: Agent, method: str) -> None:
    answer = request(agent, f"{method} /v1/ready", token=False)
    assert answer.status == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/v1/ready", "/v1/echo", "/nowhere", "/", "/v1/health/", "//v1/health", "/V1/HEALTH"])
def test_without_a_token_there_is_health_and_nothing_else(agent: Agent, path: str) -> None:
    assert request(agent, f"GET {path}", token=False).status == 401
    answer = request(agent, "GET /v1/health", token=False)
    assert answer.status == 200
    assert set(json.loads(answer.body)) == {"status", "version"}


@pytest.mark.parametrize(
    "header",
    [
        "X-Inferos-Token: wrong",
        "X-Inferos-Token: ",
        f"X-Inferos-Token: {TOKEN}x",
        f"X-Inferos-Token: {TOKEN[:-1]}",
        "Authorization: Bearer wrong",
        f"Authorization: Basic {TOKEN}",
        f"Authorization: {TOKEN}",
        f"Cookie: token={TOKEN}",
    ],
)
def test_a_wrong_token_is_none(agent: Agent, header: str) -> None:
    assert request(agent, "GET /v1/ready", header, token=False).status == 401


def test_the_token_is_taken_from_either_header_and_never_from_the_query(agent: Agent) -> None:
    assert request(agent, "GET /v1/ready", f"Authorization: Bearer {TOKEN}", token=False).status == 200
    assert request(agent, f"GET /v1/ready?token={TOKEN}&X-Inferos-Token={TOKEN}", token=False).status == 401


def test_two_token_headers_are_refused(agent: Agent) -> None:
    assert request(agent, "GET /v1/ready", "X-Inferos-Token: other").status == 400


def test_after_too_many_wrong_tokens_others_wait_and_the_owner_does_not(agent: Agent) -> None:
    codes = [request(agent, "GET /v1/ready", "X-Inferos-Token: wrong", token=False).status for _ in range(5)]
    assert codes == [401, 401, 401, 429, 429]
    answer = request(agent, "GET /v1/ready", "X-Inferos-Token: wrong", token=False)
    assert 0 < int(answer.headers["retry-after"]) <= 61
    assert request(agent, "GET /v1/ready").status == 200


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/json5"],
)
def test_a_body_is_json_or_refused(agent: Agent, kind: str) -> None:
    assert post(agent, b"{}", kind=kind).status == 415
    assert post(agent, b"{}", kind="Application/JSON; charset=utf-8").status == 200


@pytest.mark.parametrize(("path", "most"), [("/v1/echo", 64 * KB), ("/v1/chat/echo", 8 << 20)])
def test_bodies_are_bounded(agent: Agent, path: str, most: int) -> None:
    def body(size: int) -> bytes:
        return b'"' + b"x" * (size - 2) + b'"'

    assert json.loads(post(agent, body(most), path=path).body) == {"bytes": most}
    assert post(agent, body(most + 1), path=path).status == 413


def test_a_declared_length_beyond_the_bound_is_refused_before_the_body(agent: Agent) -> None:
    for length in (3 << 20, 10**18, 10**30):
        answer = request(agent, "POST /v1/echo", "Content-Type: application/json", f"Content-Length: {length}")
        assert answer.status in (400, 413), length


def test_a_chunked_body_beyond_the_bound_is_refused(agent: Agent) -> None:
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    headers = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    assert request(agent, "POST /v1/echo", *headers, body=chunk * 20 + b"0\r\n\r\n").status == 413


def test_length_and_chunks_together_are_refused(agent: Agent) -> None:
    headers = ("Content-Type: application/json", "Content-Length: 2", "Transfer-Encoding: chunked")
    assert request(agent, "POST /v1/echo", *headers, body=b"2\r\n{}\r\n0\r\n\r\n").status == 400


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[" * 17 + b"]" * 17, "nested"),
        (b"[" * 30000 + b"]" * 30000, "nested"),
        (b"{", "not JSON"),
        (b'"\xff"', "UTF-8"),
    ],
)
def test_what_parsers_disagree_about_is_refused(agent: Agent, body: bytes, why: str) -> None:
    answer = post(agent, body)
    assert answer.status == 400
    assert why in json.loads(answer.body)["error"]["details"]


def test_deep_json_is_for_inference(agent: Agent) -> None:
    assert post(agent, b"[" * 16 + b"]" * 16).status == 200
    assert post(agent, b"[" * 64 + b"]" * 64, path="/v1/chat/echo").status == 200
    assert post(agent, b"[" * 65 + b"]" * 65, path="/v1/chat/echo").status == 400


def test_writes_of_the_policy_have_a_rate(agent: Agent) -> None:
    codes = [post(agent, b"{}", path="/v1/policy").status for _ in range(7)]
    assert codes == [200] * 5 + [429] * 2
    assert request(agent, "GET /v1/policy").status == 200


def test_a_websocket_is_refused(agent: Agent) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA")
    assert request(agent, "GET /v1/echo2", *upgrade, token=False).status in (400, 401, 403, 426)


@pytest.mark.parametrize(
    ("line", "token"), [("GET /v1/health", False), ("GET /v1/ready", True), ("GET /nowhere", True), ("GET /x", False)]
)
def test_every_answer_has_the_security_headers_and_names_no_server(agent: Agent, line: str, token: bool) -> None:
    headers = request(agent, line, token=token).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


def test_a_refusal_has_the_missions_form_and_no_echo(agent: Agent) -> None:
    answer = request(agent, "GET /v1/<script>alert(1)</script>")
    assert set(json.loads(answer.body)["error"]) == {"code", "message", "details", "type", "param"}
    assert b"script" not in answer.body


def test_a_request_behind_a_refused_one_is_answered_on_the_same_connection(agent: Agent) -> None:
    with agent.connect() as connection:
        for _ in range(3):
            for token, status in (("wrong", 401), (TOKEN, 200)):
                head = f"GET /v1/ready HTTP/1.1\r\nHost: localhost:{agent.port}\r\nX-Inferos-Token: {token}\r\n\r\n"
                connection.sendall(head.encode())
                assert read_answer(connection).status == status
            if _ == 0:
                break


HALF_OPEN = {
    "silent": b"",
    "half a line": b"GET /v1/hea",
    "half the headers": b"GET /v1/health HTTP/1.1\r\nHost: ",
    "half the body": b"POST /v1/echo HTTP/1.1\r\nHost: localhost:%d\r\nX-Inferos-Token: %s\r\n"
    b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
}


@pytest.mark.slow
def test_half_open_connections_are_closed_while_good_requests_are_answered(agent: Agent) -> None:
    """400 of them, each of a kind; all closed after 5 s, a good request within 50 ms in the median meanwhile."""
    kinds = [text % (agent.port, TOKEN.encode()) if b"%d" in text else text for text in HALF_OPEN.values()]
    began = time.monotonic()
    held = [agent.connect() for _ in range(400)]
    for number, connection in enumerate(held):
        connection.sendall(kinds[number % len(kinds)])
    took = []
    while time.monotonic() - began < RECEIPT_SECONDS - 1:
        start = time.perf_counter()
        assert request(agent).status == 200
        took.append(time.perf_counter() - start)
    assert sorted(took)[len(took) // 2] < 0.05
    for connection in held:
        assert connection.recv(1) == b""  # blocks until it is closed; a timeout fails
        connection.close()
    assert time.monotonic() - began < 2 * RECEIPT_SECONDS + 5


@pytest.mark.parametrize("kind", HALF_OPEN)
def test_a_half_open_connection_is_closed(agent: Agent, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferos.agent.receipt.RECEIPT_SECONDS", 0.2)
    text = HALF_OPEN[kind]
    with agent.connect() as connection:
        connection.sendall(text % (agent.port, TOKEN.encode()) if b"%d" in text else text)
        assert connection.recv(1) == b""


def test_a_kept_connection_lives_between_requests(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferos.agent.receipt.RECEIPT_SECONDS", 0.1)
    head = f"GET /v1/ready HTTP/1.1\r\nHost: localhost:{agent.port}\r\nX-Inferos-Token: {TOKEN}\r\n\r\n".encode()
    with agent.connect() as connection:
        for _ in range(2):
            connection.sendall(head)
            assert read_answer(connection).status == 200
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(20)
