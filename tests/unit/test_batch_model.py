"""A batch of ragged prompts on the embedded model, over the real cache: what it gives is what each row gives alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from inferos.errors import BudgetError
from inferos.runtime.model import Model, load
from inferos.runtime.protocols import Float32, Ids
from inferos.runtime.queue import RequestQueue
from inferos.runtime.reference import reference_words

pytest.importorskip("onnxruntime")

# As for f16 against stock attention, see test_session.py. Here the cache holds the same in both; what may differ is the
# order of sums inside ONNX Runtime's MatMul. On the machines we measured, nothing does.
EPSILON = 0.012
LENGTHS = (1, 3, 33, 70, 101, 129, 200, 330)
STEPS = 80


@pytest.fixture(scope="module", params=["f16", "int8", "k8v4", "int4", "auto"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load("reference", request.param, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def texts() -> list[Ids]:
    """A text for each row, `STEPS` tokens longer than its prompt."""
    with load("reference", threads=1) as opened:
        words = np.random.default_rng(5).choice(reference_words(), 6000)
        ids = opened.prompt_ids(" ".join(words)[: 1 << 13])
    return [ids[37 * row : 37 * row + length + STEPS] for row, length in enumerate(LENGTHS)]


def test_teacher_forced_logits_of_a_batch_are_those_of_single_runs(model: Model, texts: list[Ids]) -> None:
    session = model.session
    together, alone = ([session.sequence() for _ in LENGTHS] for _ in range(2))
    for sequences in (together, alone):
        for sequence, length, ids in zip(sequences, LENGTHS, texts, strict=True):
            sequence.feed(ids[:length])
    for step in range(STEPS):
        tokens = np.array([ids[length + step] for length, ids in zip(LENGTHS, texts, strict=True)])
        rows = session.step(together, tokens)
        wanted = np.stack([sequence.feed(tokens[i : i + 1]) for i, sequence in enumerate(alone)])
        np.testing.assert_allclose(rows, wanted, rtol=0, atol=EPSILON, err_msg=f"step {step}")


def test_greedy_tokens_of_a_batch_are_those_of_single_runs(model: Model, texts: list[Ids]) -> None:
    prompts = [ids[:length] for length, ids in zip(LENGTHS, texts, strict=True)]
    batch = model.generate(prompts, STEPS, ignore_eos=True)
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in batch:
        rows[row].append(token.id)
    for prompt, found in zip(prompts, rows, strict=True):
        alone = [token.id for token in model.generate(prompt, STEPS, ignore_eos=True)]
        differs = next((at for at, pair in enumerate(zip(found, alone, strict=True)) if pair[0] != pair[1]), None)
        if differs is not None:  # then they were too near to tell apart, and the texts go separate ways
            assert gap(model, prompt, alone[:differs]) < 2 * EPSILON


def gap(model: Model, prompt: Ids, tokens: list[int]) -> float:
    """The likeliest logit minus the second after a prompt and tokens."""
    sequence = model.session.sequence()
    logits: Float32 = sequence.feed(np.concatenate([prompt, np.array(tokens, np.int64)]))
    sequence.close()
    top = np.sort(logits)
    return float(top[-1] - top[-2])


def test_a_budget_that_is_used_up_ends_one_row_and_the_others_go_on(texts: list[Ids]) -> None:
    # Room for two and a half of the three rows.
    with load("reference", "f16", budget_bytes=1 << 22, threads=1) as probe:
        one = probe.generate(texts[3][:60], 150, ignore_eos=True)
        list(one)
        assert one.kv_bytes is not None
        room = int(2.5 * one.kv_bytes)
    with load("reference", "f16", budget_bytes=room, threads=1) as model:
        prompts = [texts[3][:60], texts[4][:60], texts[5][:60]]
        alone = [[token.id for token in model.generate(prompt, 150, ignore_eos=True)] for prompt in prompts]
        batch = model.generate(prompts, 150, ignore_eos=True)
        found: list[list[int]] = [[] for _ in prompts]
        with pytest.raises(BudgetError):
            for row, token in batch:
                found[row].append(token.id)
        failed = [isinstance(row.error, BudgetError) for row in batch.rows]
        assert sum(failed) == 1
        for ids, wanted, ended in zip(found, alone, failed, strict=True):
            assert ids == wanted[: len(ids)]
            assert ended == (len(ids) < 150)


def test_requests_of_the_queue_are_answered_as_alone(model: Model, texts: list[Ids]) -> None:
    prompts = [ids[: min(length, 200)] for length, ids in zip(LENGTHS, texts, strict=True)]
    with RequestQueue(model, max_rows=4) as queue:
        requests = [queue.submit(prompt, 20, temperature=0.8, seed=row) for row, prompt in enumerate(prompts)]
        answers = [[token.id for token in request] for request in requests]
    for row, prompt in enumerate(prompts):
        assert answers[row] == [token.id for token in model.generate(prompt, 20, temperature=0.8, seed=row)]
