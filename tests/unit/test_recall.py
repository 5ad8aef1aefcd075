"""Recall documents and their scoring, against sessions that answer in a known way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from inferos.errors import ConfigError, ContextError
from inferos.quality._documents import TASKS
from inferos.quality.recall import Prompt, WordFiller, default_filler, make, measure, prepare, wilson
from inferos.runtime import reference
from inferos.runtime.protocols import Float32, Ids

VOCAB = 4096
WORDS = reference.reference_words()


@pytest.fixture(scope="module")
def encoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(Path(reference.__file__).parents[1] / "assets" / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(encoder: tokenizers.Tokenizer) -> list[Prompt]:
    filler = default_filler()
    return prepare(
        encoder, tokens=256, words=WORDS, filler=filler, first_token=0, tasks=TASKS, documents=1, questions=4
    )


Answer = Callable[[Prompt, int], int]


@dataclass
class KnowingSequence:
    """Finds the prompt it is fed among those it knows and predicts what `answer` says."""

    session: KnowingSession
    ids: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    closed: bool = False

    @property
    def length(self) -> int:
        return len(self.ids)

    kv_bytes = kv_elements = 0

    def feed(self, ids: Ids) -> Float32:
        self.fed.append(len(ids))
        self.ids += ids.tolist()
        known = next(p for p in self.session.prompts if p.ids[: self.length].tolist() == self.ids)
        logits = np.zeros(VOCAB, np.float32)
        logits[self.session.answer(known, self.length)] = 9.0
        return logits

    def feed_all(self, ids: Ids) -> Float32:
        raise AssertionError("recall goes through feed")

    def rewind(self, length: int) -> None:
        raise AssertionError("recall never rewinds")

    def fork(self) -> KnowingSequence:
        raise AssertionError("recall never forks")

    def close(self) -> None:
        self.closed = True


@dataclass
class KnowingSession:
    prompts: Sequence[Prompt]
    answer: Answer
    context_length: int = 4096
    vocab_size: int = VOCAB
    kv: str = "fake"
    sequences: list[KnowingSequence] = field(default_factory=list)

    def sequence(self) -> KnowingSequence:
        self.sequences.append(KnowingSequence(self))
        return self.sequences[-1]

    def step(self, sequences: object, ids: object) -> Float32:
        raise AssertionError("recall feeds one sequence")


def in_answer(prompt: Prompt, position: int) -> bool:
    return any(first <= position < end for first, end in prompt.answers)


def true_token(prompt: Prompt, position: int) -> int:
    return int(prompt.ids[position])


def test_a_session_that_knows_every_answer_gets_all_right(prompts: list[Prompt]) -> None:
    result = measure(KnowingSession(prompts, true_token), prompts)
    assert result.exact == 1.0
    assert result.by_task == dict.fromkeys(TASKS, 1.0)
    assert len(result.right) == sum(len(prompt.answers) for prompt in prompts)
    assert result.tokens == max(len(prompt.ids) for prompt in prompts)


def test_only_answers_are_scored(prompts: list[Prompt]) -> None:
    session = KnowingSession(prompts, lambda p, i: true_token(p, i) if in_answer(p, i) else 7)
    assert measure(session, prompts).exact == 1.0


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_wrong_token_makes_exactly_that_answer_wrong(prompts: list[Prompt], place: str) -> None:
    target = prompts[2]
    first, end = target.answers[1]
    position = first if place == "first" else end - 1

    def answer(prompt: Prompt, index: int) -> int:
        wrong = prompt is target and index == position
        return (true_token(prompt, index) + 1) % VOCAB if wrong else true_token(prompt, index)

    result = measure(KnowingSession(prompts, answer), prompts)
    number = sum(len(prompt.answers) for prompt in prompts[:2]) + 1
    assert [index for index, right in enumerate(result.right) if not right] == [number]


def test_questions_are_fed_alone_and_after_the_context(prompts: list[Prompt]) -> None:
    session = KnowingSession(prompts, true_token)
    measure(session, prompts)
    for prompt, sequence in zip(prompts, session.sequences, strict=True):
        assert sequence.fed[0] == prompt.context
        assert set(sequence.fed[1:]) == {1}
        assert prompt.context < prompt.answers[0][0]
        assert sequence.closed


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(12))
def test_every_answer_stands_in_the_context(task: str, seed: int) -> None:
    document = make(task, random.Random(seed), 400, default_filler(), WORDS, 6)
    context = document.text[: document.questions]
    assert document.answers
    for start, end in document.answers:
        assert start >= document.questions
        answer = document.text[start:end]
        assert answer.startswith(" ")
        assert answer.strip() in context


@pytest.mark.parametrize("seed", range(8))
def test_a_key_in_a_list_has_one_value_and_the_question_names_the_key(seed: int) -> None:
    document = make("lines", random.Random(seed), 600, default_filler(), WORDS, 8)
    for start, end in document.answers:
        asked = document.text[document.text.rindex("\n", 0, start) + 1 : end]
        assert document.text[: document.questions].count(asked) == 1


@pytest.mark.parametrize("seed", range(8))
def test_each_word_of_a_multikeys_key_belongs_to_other_keys_too(seed: int) -> None:
    document = make("multikey", random.Random(seed), 600, default_filler(), WORDS, 6)
    context, drawn = document.text[: document.questions], set(WORDS)
    for start, end in document.answers:
        asked = document.text[max(document.questions, start - 60) : start]
        one, other = [word for word in re.findall(r"\w+", asked) if word in drawn][-2:]
        value = document.text[start:end].strip()
        assert re.search(rf"\b{one} {other}\b\W[^\n]*{value}", context)
        assert len(re.findall(rf"\b{one} \w+", context)) > 1
        assert len(re.findall(rf"\w+ {other}\b", context)) > 1


@pytest.mark.parametrize("seed", range(8))
def test_following_a_tracked_name_leads_to_the_answer(seed: int) -> None:
    document = make("tracking", random.Random(seed), 500, default_filler(), WORDS, 6)
    context = document.text[: document.questions]
    set_to = dict(re.findall(r"(?: |Set |let )(\w+) (?:=|to|be) (\w+)", context))
    for start, end in document.answers:
        name = re.findall(r"(?:show|Now|value of) (\w+)(?::| is)$", document.text[:start])[0]
        hops = 0
        while name in set_to:
            name, hops = set_to[name], hops + 1
        assert name == document.text[start:end].strip()
        assert hops >= 2  # the value never stands beside the name that is asked for


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_documents_fill_the_length_and_never_exceed_it(encoder: tokenizers.Tokenizer, tokens: int) -> None:
    made = prepare(encoder, tokens=tokens, words=WORDS, filler=default_filler(), first_token=0, tasks=TASKS, seed=3)
    lengths = [len(prompt.ids) for prompt in made]
    assert max(lengths) <= tokens
    assert min(lengths) >= 0.85 * tokens
    assert all(prompt.ids[0] == 0 for prompt in made)


def test_the_answer_spans_decode_to_the_answers(encoder: tokenizers.Tokenizer) -> None:
    filler = default_filler()
    for prompt in prepare(encoder, tokens=300, words=WORDS, filler=filler, documents=1, seed=9):
        for first, end in prompt.answers:
            answer = encoder.decode(prompt.ids[first:end].tolist())
            assert answer.strip() in encoder.decode(prompt.ids[: prompt.context + 1].tolist())


def test_documents_depend_on_the_seed_alone(encoder: tokenizers.Tokenizer) -> None:
    def once(seed: int) -> list[list[int]]:
        made = prepare(encoder, tokens=200, words=WORDS, filler=default_filler(), documents=1, questions=2, seed=seed)
        return [prompt.ids.tolist() for prompt in made]

    assert once(1) == once(1)
    assert all(a != b for a, b in zip(once(1), once(2), strict=True))


def test_a_filler_is_whole_words_of_about_the_asked_length() -> None:
    text = " ".join(f"word{i}" for i in range(500))
    filler = WordFiller(text)
    words = set(text.split())
    for tokens in (1, 5, 100, 3000):
        drawn = filler(random.Random(tokens), tokens).split()
        assert drawn
        assert words.issuperset(drawn)
        assert len(" ".join(drawn)) <= 4 * tokens + 12
    assert len(filler(random.Random(0), 3000)) > 11_000


def test_wilson_is_the_published_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(("right", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(right: int, total: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        wilson(right, total)


def test_bad_requests_are_refused(encoder: tokenizers.Tokenizer, prompts: list[Prompt]) -> None:
    rng, filler = random.Random(0), default_filler()
    with pytest.raises(ConfigError, match="'riddle', expected one of kv"):
        make("riddle", rng, 100, filler, WORDS)
    with pytest.raises(ConfigError, match="tokens is 63"):
        make("kv", rng, 63, filler, WORDS)
    with pytest.raises(ConfigError, match="over 3 words"):
        make("kv", rng, 100, filler, WORDS[:3])
    with pytest.raises(ConfigError, match="too few for 60 questions"):
        prepare(encoder, tokens=100, words=WORDS, filler=filler, tasks=("kv",), questions=60)
    with pytest.raises(ConfigError, match="two words"):
        WordFiller("alone")
    with pytest.raises(ConfigError, match="0 prompts"):
        measure(KnowingSession(prompts, true_token), [])
    with pytest.raises(ContextError, match="context is 100"):
        measure(KnowingSession(prompts, true_token, context_length=100), prompts)
