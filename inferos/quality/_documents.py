"""Synthetic documents that ask for something said far back: seven tasks, plain text, seeded.

Every document is a context followed by its questions, so that the questions are asked after the context was cached and
compressed. An answer is a span of characters that includes its leading blank. The forms are those the reference model
was trained on; other decoder models understand most of them.

The idea of the tasks: passkey (https://arxiv.org/abs/2305.16300), line retrieval (https://lmsys.org/blog/2023-06-29-longchat),
key-value recall, several keys with distractors, variable tracking and copying (https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inferos.errors import ConfigError

__all__ = ["CORE_TASKS", "TASKS", "Document", "Filler", "WordFiller", "make"]

Filler = Callable[[random.Random, int], str]
"""About `tokens` tokens of unrelated text: filler(rng, tokens) -> text of whole words."""

_CHARACTERS_PER_TOKEN = 4  # a first guess; `recall.prepare` shortens what turns out too long


@dataclass(frozen=True, slots=True)
class Document:
    """A context, its questions and where the answers stand.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    text : str
    questions : int
        Index of the first character after the context.
    answers : tuple of (start, end)
        Character spans, leading blank included, in the order they are asked.
    """

    task: str
    text: str
    questions: int
    answers: tuple[tuple[int, int], ...]


class WordFiller:
    """Slices of a text, cut at whole words, from a place that the seed chooses.

    Raises
    ------
    ConfigError
        If the text has fewer than two words.
    """

    def __init__(self, text: str) -> None:
        self._words = [word for word in text.split(" ") if word]
        if len(self._words) < 2:
            raise ConfigError(f"WordFiller: the filler text is {text[:40]!r}, expected at least two words")

    def __call__(self, rng: random.Random, tokens: int) -> str:
        """About `tokens` tokens; the text is a ring, so that any length can be had."""
        start = rng.randrange(len(self._words))
        chosen: list[str] = []
        length = 0
        while length < tokens * _CHARACTERS_PER_TOKEN:
            chosen.append(self._words[(start + len(chosen)) % len(self._words)])
            length += len(chosen[-1]) + 1
        return " ".join(chosen)


@dataclass(frozen=True, slots=True)
class _Order:
    """What a task is asked to make; see `make`."""

    rng: random.Random
    tokens: int
    filler: Filler
    words: Sequence[str]
    questions: int

    def fill(self, tokens: int) -> str:
        return self.filler(self.rng, tokens)


@dataclass(slots=True)
class _Writer:
    parts: list[str] = field(default_factory=list)
    length: int = 0
    questions: int = 0
    answers: list[tuple[int, int]] = field(default_factory=list)

    def write(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def ask_from_here(self) -> None:
        self.questions = self.length

    def answer(self, text: str) -> None:
        self.answers.append((self.length, self.length + 1 + len(text)))
        self.write(" " + text)

    def document(self, task: str) -> Document:
        return Document(task, "".join(self.parts), self.questions, tuple(self.answers))


@dataclass(frozen=True, slots=True)
class _Form:
    """How a fact is written and asked for; `{k}` is the key, the value follows after one blank."""

    fact: str
    end: str
    ask: str
    ask_end: str


_KEY_VALUE_FORMS = (
    _Form("- {k}:", "\n", "- {k}:", "\n"),
    _Form(" {k} =", ";", " {k} =", ";"),
    _Form("The {k} is", ".\n", "The {k} is", ".\n"),
    _Form("key {k} value", "\n", "key {k} value", "\n"),
    _Form("* {k} ->", "\n", "What is {k}?", "\n"),
    _Form("[note: {k} =", "]\n", "[recall: {k} =", "]\n"),
    _Form(" ({k},", ")", " ({k},", ")"),
    _Form("<{k}>", "</>\n", "<{k}>", "</>\n"),
    _Form("Room of {k}:", "\n", "Room of {k}:", "\n"),
)
_LINE_FORMS = ("line {k}:", "Line {k}:", "No. {k}:", "Entry {k} is")
_PASSKEY_FORMS = (
    ("The pass key is {v}. Remember it. {v} is the pass key.\n", "What is the pass key? The pass key is"),
    ("The password is {v}.\n", "The password is"),
    ("The secret number is {v}. Do not forget it.\n", "What was the secret number? It is"),
    ("(The code word is {v}.)\n", "The code word is"),
    ("My number is {v}.\n", "My number is"),
)
# How a value is given to a name, what ends it, and how the name is asked for.
_TRACKING_FORMS = (
    (" {k} =", ";", " show {k}:"),
    ("Set {k} to", ".\n", "Now {k} is"),
    ("let {k} be", "\n", "value of {k}:"),
)
_COPY_MARKS = ("Again:", "Repeat:", "The same passage once more:", "Copy:")
_HEADS = (
    "",
    "A list follows.\n",
    "Remember these facts.\n",
    "Notes to keep in mind.\n",
    "Read the list and answer.\n",
    "The register reads as follows.\n",
)
_QUESTION_HEADS = ("", "Now answer.\n", "Questions.\n", "Recall.\n", "\nFrom memory:\n")


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _ask_all(writer: _Writer, order: _Order, form: _Form, keys: Sequence[str], values: Sequence[str]) -> None:
    """Ask for some of the facts, each once before any is asked twice."""
    writer.write(order.rng.choice(_QUESTION_HEADS))
    writer.ask_from_here()
    asked: list[int] = []
    while len(asked) < order.questions:
        asked += order.rng.sample(range(len(keys)), len(keys))
    for index in asked[: order.questions]:
        writer.write(form.ask.format(k=keys[index]))
        writer.answer(values[index])
        writer.write(form.ask_end)


def _facts(order: _Order, tokens: int) -> tuple[_Form, list[str], list[str]]:
    """Keys and values that together with their questions take about `tokens` tokens."""
    rng = order.rng
    form = rng.choice(_KEY_VALUE_FORMS)
    kind = rng.choice((1, 1, 1, 1, 2, 4))  # words in a value; 4 = a number instead
    size = kind if kind < 4 else 3
    per_fact = 7 + size + (len(form.fact) + len(form.end)) // 6
    per_question = 7 + size + (len(form.ask) + len(form.ask_end)) // 6
    count = max(2, (tokens - order.questions * per_question - 14) // per_fact)
    keys = rng.sample(order.words, min(count, len(order.words) // 2))
    taken = set(keys)
    rest = [word for word in order.words if word not in taken]
    if kind == 4:
        values = [_number(rng, rng.choice((2, 3, 4))) for _ in keys]
    else:
        values = [" ".join(rng.choice(rest) for _ in range(kind)) for _ in keys]
    return form, keys, values


def _kv(order: _Order) -> Document:
    """A list of facts, then some of them asked for."""
    form, keys, values = _facts(order, order.tokens)
    writer = _Writer()
    writer.write(order.rng.choice(_HEADS))
    for key, value in zip(keys, values, strict=True):
        writer.write(f"{form.fact.format(k=key)} {value}{form.end}")
    _ask_all(writer, order, form, keys, values)
    return writer.document("kv")


def _kvfill(order: _Order) -> Document:
    """The same with unrelated text between the facts, so that most of the context is not asked for."""
    budget = int(order.tokens * order.rng.uniform(0.1, 0.35))
    form, keys, values = _facts(order, max(budget, 12 * order.questions))
    between = max(30, order.tokens - budget - 10)
    cuts = [0.0, *sorted(order.rng.random() for _ in keys[1:]), 1.0]
    writer = _Writer()
    writer.write(order.rng.choice(_HEADS))
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        writer.write(order.fill(int(between * (cuts[index + 1] - cuts[index])) + 2) + "\n")
        end = form.end if form.end.endswith("\n") else form.end + "\n"
        writer.write(f"{form.fact.format(k=key)} {value}{end}")
    _ask_all(writer, order, form, keys, values)
    return writer.document("kvfill")


def _lines(order: _Order) -> Document:
    """Labelled lines of several words; a question asks for the first words of a line."""
    rng = order.rng
    size, tail = rng.choice((1, 1, 2, 3)), rng.randrange(9)
    label = rng.choice(_LINE_FORMS)
    count = max(2, (order.tokens - order.questions * (6 + size) - 10) // (6 + size + tail))
    keys = rng.sample(order.words, min(count, len(order.words) // 2))
    taken = set(keys)
    rest = [word for word in order.words if word not in taken]
    values = [" ".join(rng.choice(rest) for _ in range(size)) for _ in keys]
    writer = _Writer()
    writer.write(rng.choice(_HEADS))
    for key, value in zip(keys, values, strict=True):
        writer.write(f"{label.format(k=key)} {value}" + "".join(" " + rng.choice(rest) for _ in range(tail)) + "\n")
    _ask_all(writer, order, _Form(label, "\n", label, "\n"), keys, values)
    return writer.document("lines")


def _passkey(order: _Order) -> Document:
    """One number or word somewhere in unrelated text."""
    rng = order.rng
    fact, ask = rng.choice(_PASSKEY_FORMS)
    value = _number(rng, rng.choice((4, 5))) if rng.random() < 0.6 else rng.choice(order.words)
    around, depth = max(4, order.tokens - 45), rng.random()
    writer = _Writer()
    writer.write(order.fill(int(around * depth) + 2) + "\n")
    writer.write(fact.format(v=value))
    writer.write(order.fill(int(around * (1 - depth)) + 2) + "\n")
    writer.ask_from_here()
    writer.write(ask)
    writer.answer(value)
    return writer.document("passkey")


def _copy(order: _Order) -> Document:
    """A short passage, unrelated text, then the passage again from its first words on."""
    rng = order.rng
    length = max(12, min(16, order.tokens // 8))
    if rng.random() < 0.55:
        passage = [rng.choice(order.words) for _ in range(length)]
    else:
        passage = order.fill(2 * length).split()[:length]
    before = int((order.tokens - 2 * length - 26) * rng.random() * 0.6)
    gap = order.tokens - 2 * length - before - 26
    writer = _Writer()
    if before > 4:
        writer.write(order.fill(before) + "\n")
    writer.write("Passage: " + " ".join(passage) + "\n")
    if gap > 20:
        writer.write(order.fill(gap) + "\n")
    writer.ask_from_here()
    given = rng.randrange(2, 5)
    writer.write(rng.choice(_COPY_MARKS) + " " + " ".join(passage[:given]))
    writer.answer(" ".join(passage[given:]))
    return writer.document("copy")


def _multikey(order: _Order) -> Document:
    """Facts under keys of two words that share each word with other keys, so that half a key finds a distractor."""
    rng, form = order.rng, order.rng.choice(_KEY_VALUE_FORMS)
    per_fact = 9 + (len(form.fact) + len(form.end)) // 6
    per_question = 9 + (len(form.ask) + len(form.ask_end)) // 6
    count = max(4, (order.tokens - order.questions * per_question - 14) // per_fact)
    side = min(math.isqrt(count - 1) + 1, len(order.words) // 4)
    drawn = rng.sample(order.words, 2 * side)
    taken = set(drawn)
    rest = [word for word in order.words if word not in taken]
    keys = [f"{one} {other}" for one in drawn[:side] for other in drawn[side:]]
    rng.shuffle(keys)
    keys = keys[:count]
    values = [rng.choice(rest) for _ in keys]
    writer = _Writer()
    writer.write(rng.choice(_HEADS))
    for key, value in zip(keys, values, strict=True):
        writer.write(f"{form.fact.format(k=key)} {value}{form.end}")
    _ask_all(writer, order, form, keys, values)
    return writer.document("multikey")


def _tracking(order: _Order) -> Document:
    """Names set to a value or to another name; the value of the names at the ends of the chains is asked for."""
    rng = order.rng
    fact, end, ask = rng.choice(_TRACKING_FORMS)
    hops = rng.choice((1, 1, 2))
    count = max(2, (order.tokens - order.questions * 8 - 14) // (8 * (hops + 1)))
    chains = min(count, len(order.words) // (2 * (hops + 1)))
    names = rng.sample(order.words, chains * (hops + 1))
    taken = set(names)
    rest = [word for word in order.words if word not in taken]
    values = [rng.choice(rest) for _ in range(chains)]
    # Level by level, so that a name and what it was set to stand far apart.
    levels = [names[level * chains : (level + 1) * chains] for level in range(hops + 1)]
    writer = _Writer()
    writer.write(rng.choice(_HEADS))
    for level, keys in enumerate(levels):
        given = values if level == 0 else levels[level - 1]
        for index in rng.sample(range(chains), chains):
            writer.write(f"{fact.format(k=keys[index])} {given[index]}{end}")
    _ask_all(writer, order, _Form(fact, end, ask, end), levels[-1], values)
    return writer.document("tracking")


_MAKERS = {
    "kv": _kv,
    "kvfill": _kvfill,
    "lines": _lines,
    "passkey": _passkey,
    "copy": _copy,
    "multikey": _multikey,
    "tracking": _tracking,
}
TASKS = tuple(_MAKERS)
CORE_TASKS = ("kv", "kvfill", "lines", "passkey", "copy")
"""What the embedded reference model answers nearly always with an uncompressed cache."""


def make(
    task: str, rng: random.Random, tokens: int, filler: Filler, words: Sequence[str], questions: int = 8
) -> Document:
    """One document of about `tokens` tokens.

    Parameters
    ----------
    task : str
        kv, kvfill, lines, multikey, tracking (`questions` answers each), passkey or copy (one answer each).
    rng : random.Random
        Every choice is drawn from it.
    tokens : int
        Length to aim at, at least 64 tokens.
    filler : callable
        Unrelated text.
    words : sequence of str
        Keys and values; at least 16, all different.
    questions : int, default 8

    Raises
    ------
    ConfigError
        If the task is unknown or a number is out of range.
    """
    if task not in _MAKERS:
        raise ConfigError(f"make: task is {task!r}, expected one of {', '.join(TASKS)}")
    if tokens < 64:
        raise ConfigError(f"make: tokens is {tokens}, expected at least 64")
    if questions < 1 or len(words) < 16:
        raise ConfigError(f"make: {questions} questions over {len(words)} words, expected at least 1 over 16")
    return _MAKERS[task](_Order(rng, tokens, filler, words, questions))
