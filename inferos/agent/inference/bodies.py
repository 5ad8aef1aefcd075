"""What OpenAI's clients send. Unknown fields are no error: servers differ in what they know."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from inferos.agent.problems import Problem

__all__ = ["ChatBody", "CompletionBody", "Sampling", "StreamOptions"]

_TOLERANT = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = _TOLERANT

    include_usage: bool | None = None


class Sampling(BaseModel):
    """What chats and completions share. What is not given, or null, is the model's default."""

    model_config = _TOLERANT

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    priority: str | None = None

    def options(self) -> dict[str, Any]:
        """As of `RequestQueue.submit`. Negative seeds and top_k mean chance and all, as with llama.cpp."""
        penalty = self.repetition_penalty if self.repeat_penalty is None else self.repeat_penalty
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": penalty,
            "seed": None if self.seed is None or self.seed < 0 else self.seed,
            "stop": self.stop or (),
            "priority": self.priority,
        }

    def most_tokens(self) -> int | None:
        """Tokens of the answer at most, where said; -1 says nothing, as with llama.cpp."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if given == -1 else given

    def check(self) -> None:
        """Refuse what is not offered."""
        if self.n not in (None, 1):
            raise Problem(400, "Invalid request", f"n: {self.n}; one answer a request is given")


class ChatBody(Sampling):
    """POST /chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        """Refuse what is not offered."""
        super().check()
        if self.top_logprobs:
            raise Problem(400, "Invalid request", "top_logprobs: the chosen token's alone is known, so 0 is wanted")

    def prompt(self) -> list[dict[str, Any]]:
        """The messages; content that comes in parts as one text."""
        return [{**message, **_text_of(message)} for message in self.messages]

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """For the chat template."""
        return None if self.tool_choice == "none" else self.tools or None


class CompletionBody(Sampling):
    """POST /completions."""

    prompt: str | list[int] | list[str]
    logprobs: int | None = None
    echo: bool | None = None

    def check(self) -> None:
        """Refuse what is not offered."""
        super().check()
        if self.logprobs:
            raise Problem(400, "Invalid request", "logprobs: the chosen token's alone is known, so 0 is wanted")
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str) and len(self.prompt) > 1:
            raise Problem(400, "Invalid request", "prompt: one a request is continued")

    def given_prompt(self) -> str | list[int]:
        """A text, or ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0] if self.prompt else ""
        return first if isinstance(first, str) else [int(id) for id in self.prompt]


def _text_of(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return {}
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Problem(400, "Invalid request", "messages: content of other kinds than text is not understood")
        texts.append(part["text"])
    return {"content": "".join(texts)}
