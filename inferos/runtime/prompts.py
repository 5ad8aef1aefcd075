"""What a prompt may be, and the options that go with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeGuard

import numpy as np
import numpy.typing as npt

from inferos.errors import ShapeError
from inferos.runtime.chat import Message
from inferos.runtime.decode_loop import Cancel
from inferos.runtime.protocols import Ids

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "GenerateOptions",
    "Prompt",
    "are_messages",
    "are_prompts",
    "checked_ids",
]

DEFAULT_MAX_TOKENS = 256

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Sequence[Message]
"""A text, ids (tokens,), or messages for the model's chat template."""


class GenerateOptions(TypedDict, total=False):
    """The options of `Model.generate` but the number of tokens."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    cancel: Cancel | None
    tools: Sequence[Mapping[str, Any]] | None
    speculate: bool


def are_messages(prompt: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(p, Mapping) for p in prompt[:1])
    )


def are_prompts(prompt: Any) -> TypeGuard[Sequence[Prompt]]:
    """Whether it is a list or tuple of prompts: its first item is a text or has items itself, and is no message."""
    first = prompt[0] if isinstance(prompt, list | tuple) and prompt else None
    return isinstance(first, str | list | tuple | np.ndarray)


def checked_ids(prompt: Any, vocab_size: int) -> Ids:
    """Ids (tokens,) as int64. Raises ShapeError if they are no row of integers of the vocabulary."""
    try:
        ids = np.asarray(prompt)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"prompt: {error}") from error
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ShapeError(f"prompt: {ids.dtype} of shape {ids.shape}, wanted text, messages or integers (tokens,)")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ShapeError(f"prompt: ids {ids.min()}..{ids.max()} are not within 0..{vocab_size - 1}")
    return ids.astype(np.int64)
