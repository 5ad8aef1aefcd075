"""Does the model still find what was said far back? Exact-match recall over synthetic documents.

A document's context is fed as a prompt (the session's own chunks); its questions are then fed token by token through
the decode path, so every question meets a context that is already compressed as far as it will be. Answers are teacher-
forced: an answer counts as right when each of its tokens is the most likely one, which is when greedy decoding would
have written it. `inferos.quality._documents` describes the tasks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

import numpy as np

from inferos.errors import ConfigError, ContextError
from inferos.quality._documents import CORE_TASKS, TASKS, Document, Filler, WordFiller, make
from inferos.quality._scoring import log_softmax
from inferos.quality._statistics import Interval, wilson
from inferos.runtime.protocols import DecoderSession, Ids

__all__ = [
    "CORE_TASKS",
    "Document",
    "Encoding",
    "Filler",
    "Prompt",
    "Recall",
    "TASKS",
    "TextEncoder",
    "WordFiller",
    "default_filler",
    "make",
    "measure",
    "prepare",
    "wilson",
]

# The tasks with one answer a document get this many times as many documents.
_SINGLE_ANSWER = {"passkey": 3, "copy": 3}
_FULL, _AIM, _ATTEMPTS = 0.96, 0.98, 8  # share of the length that is long enough, and to aim at


class Encoding(Protocol):
    """Ids and, for each, its span of characters."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""
        ...

    @property
    def offsets(self) -> Sequence[tuple[int, int]]:
        """First character of each token, and the one behind its last."""
        ...


class TextEncoder(Protocol):
    """What `tokenizers.Tokenizer` gives."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoding:
        """Ids of a text."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A document as tokens.

    Parameters
    ----------
    task : str
    ids : (tokens,) int64
        The first-token id in front, where the model has one.
    context : int
        Tokens fed as a prompt; the rest is fed one by one.
    answers : tuple of (first, end)
        Token spans of the answers, first > context.
    """

    task: str
    ids: Ids
    context: int
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Recall:
    """How many answers were right.

    Parameters
    ----------
    exact : float
        Share of right answers, 0..1, over all answers.
    low, high : float
        Wilson 95 % interval of `exact`.
    right : tuple of bool
        Each answer's outcome, in the order of the prompts: comparable between sessions answer by answer.
    by_task : dict of str to float
        The share within each task.
    by_task_interval : dict of str to Interval
        Wilson 95 % intervals of these shares.
    answer_nll : float
        Mean negative log-likelihood of an answer's token, nats.
    tokens : int
        Length of the longest document, tokens.
    """

    exact: float
    low: float
    high: float
    right: tuple[bool, ...]
    by_task: dict[str, float]
    by_task_interval: dict[str, Interval]
    answer_nll: float
    tokens: int


def default_filler() -> Filler:
    """Slices of assets/filler.txt: prose that the reference model itself wrote."""
    return WordFiller((resources.files("inferos") / "assets" / "filler.txt").read_text("utf-8"))


def prepare(
    encoder: TextEncoder,
    *,
    tokens: int,
    words: Sequence[str],
    filler: Filler,
    first_token: int | None = None,
    tasks: Sequence[str] = CORE_TASKS,
    documents: int = 2,
    questions: int = 8,
    seed: int = 0,
) -> list[Prompt]:
    """Documents as token ids, the same for the same arguments.

    Parameters
    ----------
    encoder : TextEncoder
    tokens : int
        No document is longer, the first token included.
    words : sequence of str
        Keys and values.
    filler : callable
    first_token : int, optional
        Put in front of every document; the reference model needs its token 0 there.
    tasks : sequence of str
        Of `TASKS`; those that the reference model answers, `CORE_TASKS`, unless given.
    documents : int, default 2
        Documents a task; tasks with one answer a document get three times as many.
    questions : int, default 8
        Questions a document, where the task has several.
    seed : int, default 0
    """
    return [
        _fit(encoder, task, f"{seed}/{task}/{tokens}/{index}", tokens, words, filler, first_token, questions)
        for task in tasks
        for index in range(documents * _SINGLE_ANSWER.get(task, 1))
    ]


def _fit(
    encoder: TextEncoder,
    task: str,
    seed: str,
    tokens: int,
    words: Sequence[str],
    filler: Filler,
    first_token: int | None,
    questions: int,
) -> Prompt:
    """The longest of a few documents that is not longer than `tokens`."""
    best: Prompt | None = None
    aim = float(tokens)
    for _ in range(_ATTEMPTS):
        # The same seed at every length: the same form and kind of answer, so lengths scale.
        rng = random.Random(seed)  # noqa: S311 - a test text, not a secret
        document = make(task, rng, max(64, int(aim)), filler, words, questions)
        prompt = _as_prompt(encoder, document, first_token)
        length = len(prompt.ids)
        if length <= tokens and (best is None or length > len(best.ids)):
            best = prompt
        if _FULL * tokens <= length <= tokens:
            break
        aim *= _AIM * tokens / length
    if best is None:
        raise ConfigError(f"prepare: tokens is {tokens}, too few for {questions} questions of the task {task}")
    return best


def _as_prompt(encoder: TextEncoder, document: Document, first_token: int | None) -> Prompt:
    encoding = encoder.encode(document.text, add_special_tokens=False)
    front = [] if first_token is None else [first_token]
    starts = np.array([start for start, _ in encoding.offsets])
    ends = np.array([end for _, end in encoding.offsets])

    def span(begin: int, stop: int) -> tuple[int, int]:
        touched = np.flatnonzero((ends > begin) & (starts < stop))
        return int(touched[0]) + len(front), int(touched[-1]) + 1 + len(front)

    context, _ = span(document.questions, document.questions + 1)
    answers = tuple(span(begin, stop) for begin, stop in document.answers)
    # The prompt needs a token of its own, and each answer one before it to be predicted from.
    context = max(1, min(context, answers[0][0] - 1))
    return Prompt(document.task, np.array([*front, *encoding.ids], np.int64), context, answers)


def measure(
    session: DecoderSession, prompts: Sequence[Prompt], *, progress: Callable[[int], None] | None = None
) -> Recall:
    """Ask a session all questions.

    Parameters
    ----------
    session : DecoderSession
    prompts : sequence of Prompt
        From `prepare`.
    progress : callable, optional
        Called with the number of tokens just run.

    Raises
    ------
    ConfigError
        If there is no prompt.
    ContextError
        If a prompt is longer than the model's context.
    """
    if not prompts:
        raise ConfigError("measure: 0 prompts, expected at least one")
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > session.context_length:
        raise ContextError(f"measure: a prompt of {longest} tokens, the model's context is {session.context_length}")
    right: list[bool] = []
    nll: list[float] = []
    by_task: dict[str, list[bool]] = {}
    for prompt in prompts:
        outcomes = _ask(session, prompt, nll)
        right += outcomes
        by_task.setdefault(prompt.task, []).extend(outcomes)
        if progress is not None:
            progress(len(prompt.ids))
    low, high = wilson(sum(right), len(right))
    return Recall(
        exact=sum(right) / len(right),
        low=low,
        high=high,
        right=tuple(right),
        by_task={task: sum(outcomes) / len(outcomes) for task, outcomes in by_task.items()},
        by_task_interval={task: Interval(*wilson(sum(found), len(found))) for task, found in by_task.items()},
        answer_nll=sum(nll) / len(nll),
        tokens=longest,
    )


def _ask(session: DecoderSession, prompt: Prompt, nll: list[float]) -> list[bool]:
    """Each answer's outcome; the answer tokens' NLL is appended to `nll`."""
    hits: dict[int, bool] = {}
    wanted = {position for first, end in prompt.answers for position in range(first, end)}
    sequence = session.sequence()
    try:
        logits = sequence.feed(prompt.ids[: prompt.context])
        for position in range(prompt.context, prompt.answers[-1][1]):
            token = int(prompt.ids[position])
            if position in wanted:
                hits[position] = int(logits.argmax()) == token
                nll.append(-float(log_softmax(logits)[token]))
            if position + 1 < prompt.answers[-1][1]:
                logits = sequence.feed(prompt.ids[position : position + 1])
    finally:
        sequence.close()
    return [all(hits[position] for position in range(first, end)) for first, end in prompt.answers]
