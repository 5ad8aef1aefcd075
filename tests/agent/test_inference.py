"""Inference over HTTP: OpenAI's routes, those of Lemonade, and what is kept of a chat."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from agent_server import TOKEN, Agent, new_state, serving

import inferos
from inferos.agent.app import build_app
from inferos.agent.guard import Guard
from inferos.agent.inference import INFERENCE_PATHS, InferenceService, inference_routers, lemonade_health

httpx2 = pytest.importorskip("httpx2")

TEXT = "Once upon a time there was a king who lived in a castle. " * 12
HEADERS = {"X-Inferos-Token": TOKEN}
ROOT = Path(__file__).resolve().parents[2]


def _serve(max_waiting: int = 64, max_rows: int = 8) -> Iterator[Agent]:
    service = InferenceService("reference", max_rows=max_rows, max_waiting=max_waiting)
    state = new_state()
    state.more_health = lambda: lemonade_health(service)

    def build(_state: object, port: int) -> object:
        app = build_app(state, inference_routers(service))
        return Guard(app, port=port, token=TOKEN, inference=INFERENCE_PATHS)

    with inferos.load("reference") as model:
        service.start(model)
        try:
            with serving(state, build) as agent:
                yield agent
        finally:
            service.close()


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    yield from _serve()


@pytest.fixture(scope="module")
def client(agent: Agent) -> Iterator[object]:
    with httpx2.Client(base_url=agent.url, headers=HEADERS, timeout=60) as client:
        yield client


def _chat(messages: list[dict[str, str]], **more: object) -> dict[str, object]:
    return {"model": "reference", "messages": messages, "max_tokens": 8, **more}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_a_chat_is_answered_and_counted(client, prefix):
    answer = client.post(f"{prefix}/chat/completions", json=_chat([_user("Once upon a time")], frequency_penalty=0.5))
    assert answer.status_code == 200
    body = answer.json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 8 == body["timings"]["predicted_n"]


def test_a_stream_gives_the_text_of_the_whole_answer_and_the_usage(client):
    body = _chat([_user("A king and a queen")], seed=3, temperature=0.8)
    whole = client.post("/v1/chat/completions", json=body).json()
    streamed = client.post(
        "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *events, done = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    pieces = [json.loads(event) for event in events]
    text = "".join(choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert pieces[-1]["usage"]["completion_tokens"] == 8


def test_a_stop_text_ends_a_completion(client):
    body = {"prompt": "Once upon a time", "max_tokens": 16, "logprobs": 0}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    assert len(whole["logprobs"]["tokens"]) == 16
    stop = whole["text"].split()[-1]
    cut = client.post("/v1/completions", json={**body, "stop": stop}).json()["choices"][0]
    assert (cut["finish_reason"], stop in cut["text"]) == ("stop", False)


def test_the_second_turn_of_a_chat_finds_its_history_cached(client):
    messages = [_user(TEXT)]
    first = client.post("/v1/chat/completions", json=_chat(messages)).json()
    messages += [first["choices"][0]["message"], _user("And then?")]
    second = client.post("/v1/chat/completions", json=_chat(messages)).json()["usage"]
    history = first["usage"]["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= 0.95 * history
    assert client.get("/v1/stats").json()["cache_tokens"] == second["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (_chat([_user("x")], model="gpt-4"), 404),
        (_chat([]), 400),
        (_chat([_user("x")], n=2), 400),
        (_chat([_user("x")], temperature=-1), 400),
        (_chat([_user("x")], max_tokens=0), 400),
        (_chat([_user("x")], priority="urgent"), 400),
        (_chat([_user("x " * 9000)]), 400),
    ],
)
def test_what_is_not_offered_is_refused_in_the_form_that_clients_read(client, body, code):
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == code
    assert {"code", "message", "type", "param"} <= set(answer.json()["error"])


def test_health_says_what_gaia_asks_only_to_who_has_the_token(agent, client):
    told = client.get("/api/v1/health").json()
    assert tuple(int(part) for part in told["version"].split(".")) >= (10, 2)
    assert (
        told["all_models_loaded"][0]["recipe_options"]["ctx_size"]
        == client.get("/v1/models/reference").json()["max_context_window"]
    )
    open_to_all = agent.raw(f"GET /api/v1/health HTTP/1.1\r\nHost: 127.0.0.1:{agent.port}\r\n\r\n".encode())
    assert set(json.loads(open_to_all.body)) == {"status", "version"}


def test_only_the_one_model_can_be_loaded(client):
    assert client.post("/api/v1/load", json={"model_name": "reference", "ctx_size": 65536}).status_code == 200
    assert client.post("/api/v1/load", json={"model_name": "other"}).status_code == 404
    assert client.post("/api/v1/unload", json={"model_name": "other"}).status_code == 404


def test_what_the_machine_does_not_tell_is_null(client):
    assert client.get("/api/v1/system-stats").json()["npu_percent"] is None
    assert "devices" in client.get("/api/v1/system-info").json()


def test_a_client_that_leaves_ends_its_request(agent, client):
    body = json.dumps({"prompt": "Once", "max_tokens": 4000, "stream": True, "stop": "\x00\x01"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{agent.port}\r\nX-Inferos-Token: {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with agent.connect() as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    pause = threading.Event()
    for _ in range(400):
        if client.get("/v1/health").json()["requests_running"] == 0:
            break
        pause.wait(0.02)
    assert client.get("/v1/stats").json()["output_tokens"] < 4000


def test_fifty_clients_are_all_answered_or_told_to_come_again():
    for agent in _serve(max_waiting=8, max_rows=4):
        answers: list[tuple[int, str | None]] = []

        def ask(number: int, url: str = agent.url, answers: list[tuple[int, str | None]] = answers) -> None:
            with httpx2.Client(base_url=url, headers=HEADERS, timeout=120) as own:
                told = own.post("/v1/chat/completions", json=_chat([_user(f"Tale {number}")], max_tokens=48))
                answers.append((told.status_code, told.headers.get("retry-after")))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(answers) == 50
        assert set(answers) <= {(200, None), (503, "1")}
        assert (200, None) in answers


def test_the_pages_example_prints_what_the_page_says(agent):
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = compile(example.replace("http://127.0.0.1:7031", agent.url), "server.md", "exec")
        exec(code, {"token": TOKEN})  # noqa: S102 - our own text
    assert printed.getvalue().splitlines() == re.findall(r"^# (.*)$", example, re.MULTILINE)


def test_the_official_client_reads_the_answers(agent):
    with openai.OpenAI(base_url=f"{agent.url}/v1", api_key=TOKEN, max_retries=0) as official:
        messages = [_user("Once upon a time")]
        whole = official.chat.completions.create(model="reference", messages=messages, max_tokens=8)
        stream = official.chat.completions.create(model="reference", messages=messages, max_tokens=8, stream=True)
        text = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
        assert text == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            official.chat.completions.create(model="other", messages=messages)
