"""OpenAI's routes: chat completions, completions, models."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from inferos.agent.inference.bodies import ChatBody, CompletionBody, Sampling
from inferos.agent.inference.service import Answer, InferenceService
from inferos.agent.inference.sse import PING, PING_SECONDS, EventStream, watched
from inferos.agent.problems import problem_body
from inferos.errors import BudgetError, InferosError
from inferos.runtime.generate import Generation
from inferos.runtime.stop_texts import Token

__all__ = ["describe", "openai_router", "timings", "usage"]

_REASONS = {"eos": "stop", "stop": "stop", "cancelled": "stop", "length": "length", "context": "length"}


class _Form(ABC):
    """How the answers of one route look."""

    object: str
    chunk: str
    mark: str

    def __init__(self, service: InferenceService, answer: Answer, *, logprobs: bool) -> None:
        self._service = service
        self._id = f"{self.mark}-{secrets.token_hex(12)}"
        self._created = answer.created
        self._logprobs = logprobs

    def whole(self, answer: Answer, tokens: list[Token]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        generation = answer.generation
        text = "".join(token.text for token in tokens)
        choice = {
            "index": 0,
            **self.text(text),
            "logprobs": self.chances(tokens),
            "finish_reason": _reason(generation),
        }
        return {
            **self.head(self.object),
            "choices": [choice],
            "usage": usage(generation),
            "timings": timings(generation),
        }

    def piece(self, tokens: list[Token], *, first: bool) -> dict[str, Any]:
        """An event with text."""
        text = "".join(token.text for token in tokens)
        choice = {"index": 0, **self.delta(text, first=first), "logprobs": self.chances(tokens), "finish_reason": None}
        return {**self.head(self.chunk), "choices": [choice]}

    def last(self, generation: Generation, *, first: bool) -> dict[str, Any]:
        """The event that says why it ended."""
        delta = self.delta("", first=first)
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": _reason(generation)}
        return {**self.head(self.chunk), "choices": [choice], "timings": timings(generation)}

    def figures(self, generation: Generation) -> dict[str, Any]:
        """The event with the usage."""
        return {
            **self.head(self.chunk),
            "choices": [],
            "usage": usage(generation),
            "timings": timings(generation),
        }

    def head(self, kind: str) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}

    @abstractmethod
    def text(self, text: str) -> dict[str, Any]:
        """The text of a whole answer."""

    @abstractmethod
    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        """The text of an event."""

    @abstractmethod
    def chances(self, tokens: list[Token]) -> dict[str, Any] | None:
        """The tokens' log-probabilities, where asked for."""


class _Chat(_Form):
    object, chunk, mark = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": text} if text or first else {}}

    def chances(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {
                    "token": token.text,
                    "logprob": token.logprob,
                    "bytes": list(token.text.encode()),
                    "top_logprobs": [],
                }
                for token in tokens
            ]
        }


class _Completion(_Form):
    object, chunk, mark = "text_completion", "text_completion", "cmpl"

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:  # noqa: ARG002 - the form's
        return {"text": text}

    def chances(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        offsets, place = [], 0
        for token in tokens:
            offsets.append(place)
            place += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": None,
            "text_offset": offsets,
        }


def openai_router(service: InferenceService, prefix: str) -> APIRouter:
    """The routes under `prefix`."""
    router = APIRouter(prefix=prefix, tags=["inference"])

    @router.post("/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Continue a conversation."""
        service.check_name(body.model)
        body.check()
        answer = await service.submit(body.prompt(), body.most_tokens(), tools=body.offered_tools(), **body.options())
        return await _respond(service, request, body, answer, _Chat(service, answer, logprobs=bool(body.logprobs)))

    @router.post("/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue a text."""
        service.check_name(body.model)
        body.check()
        answer = await service.submit(body.given_prompt(), body.most_tokens(), **body.options())
        form = _Completion(service, answer, logprobs=body.logprobs is not None)
        return await _respond(service, request, body, answer, form)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [describe(service)]}

    @router.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """The model of that name."""
        service.check_name(name)
        return describe(service)

    return router


def describe(service: InferenceService) -> dict[str, Any]:
    """The model as clients of OpenAI and of Lemonade read it; None where it is not loaded yet."""
    context = service.model.context_length if service.loaded else None
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "inferos",
        "checkpoint": service.name,
        "recipe": "inferos",
        "downloaded": True,
        "suggested": True,
        "labels": [],
        "context_length": context,
        "max_context_window": context,
        "supports_chat": True,
        "supports_tools": True,
    }


def usage(generation: Generation) -> dict[str, Any]:
    """Counts, and under Lemonade's names the times."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.tokens,
        "total_tokens": generation.prompt_tokens + generation.tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        "prefill_duration_ttft": generation.first_token_seconds,
        "decoding_speed_tps": generation.tokens_per_second,
    }


def timings(generation: Generation) -> dict[str, Any]:
    """Under llama.cpp's names; times of the prompt are up to the first token, waiting in the queue included."""
    first, speed = generation.first_token_seconds, generation.tokens_per_second
    computed = generation.prompt_tokens - generation.cached_tokens
    return {
        "cache_n": generation.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": None if first is None else first * 1e3,
        "prompt_per_second": computed / first if first else None,
        "predicted_n": generation.tokens,
        "predicted_ms": None if not speed else generation.tokens / speed * 1e3,
        "predicted_per_second": speed,
    }


async def _respond(
    service: InferenceService, request: Request, body: Sampling, answer: Answer, form: _Form
) -> Response:
    if body.stream:
        wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(_events(service, answer, form, include_usage=wanted), answer.cancel)
    tokens: list[Token] = []
    try:
        async with watched(request.receive, answer.cancel):
            async for some in answer.tokens(PING_SECONDS):
                tokens += some
    finally:
        answer.cancel()
        service.ended(answer)
    return JSONResponse(form.whole(answer, tokens))


async def _events(
    service: InferenceService, answer: Answer, form: _Form, *, include_usage: bool
) -> AsyncIterator[bytes]:
    generation, first = answer.generation, True
    try:
        async for tokens in answer.tokens(PING_SECONDS):
            if tokens:
                yield _event(form.piece(tokens, first=first))
                first = False
            else:
                yield PING
        yield _event(form.last(generation, first=first))
        if include_usage:
            yield _event(form.figures(generation))
    except InferosError as error:  # the status line is gone: the error is an event
        code = 503 if isinstance(error, BudgetError) else 500
        yield b"data: " + problem_body(code, "The request failed", type(error).__name__) + b"\n\n"
    finally:
        service.ended(answer)
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _reason(generation: Generation) -> str:
    return _REASONS.get(generation.finish_reason or "", "length")
