"""`inferos.load` on the embedded model: the whole path, from text to text, over the real cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferos
from inferos.errors import BudgetError, ConfigError, ContextError, ModelError, RewindError
from inferos.runtime.model import Model, load

pytest.importorskip("onnxruntime")

PROMPT = "The register reads as follows.\n trees = speaking; mentioned = put; worthy = took;Questions.\n mentioned ="
FORMATS = ["f16", "int8", "k8v4", "int4"]


@pytest.fixture(scope="module", params=["off", *FORMATS, "auto"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load("reference", request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def int8() -> Iterator[Model]:
    with load("reference") as opened:
        yield opened


def text(generation: Any) -> str:
    return "".join(token.text for token in generation)


def test_every_format_answers_from_the_prompt(model: Model) -> None:
    assert text(model.generate(PROMPT, 1)) == " put"


def test_the_effective_format_is_the_one_asked_for(model: Model, request: pytest.FixtureRequest) -> None:
    assert model.kv == request.node.callspec.params["model"]


def test_a_seed_gives_the_same_text_again(model: Model) -> None:
    runs = [text(model.generate("Once", 30, temperature=0.9, top_p=0.95, seed=4)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_stopping_anywhere_and_going_on_gives_the_undisturbed_text(model: Model) -> None:
    ids = model.prompt_ids(PROMPT).tolist()
    whole = [token.id for token in model.generate(ids, 40, ignore_eos=True)]
    first = model.generate(ids, 40, ignore_eos=True)
    begun = [next(first).id for _ in range(11)]
    first.close()
    assert begun + [token.id for token in model.generate(ids + begun, 29, ignore_eos=True)] == whole


def test_the_default_is_int8_within_the_policys_pool() -> None:
    with inferos.load("reference") as model:
        assert (model.kv, model.name) == ("int8", "reference")
        assert model.kv_pool is not None
        assert model.kv_pool.budget_bytes == 4 << 30


def test_a_policy_sets_window_and_sinks_and_auto_follows_its_mode() -> None:
    policy = {"kv": {"mode": "quality_optimized", "sink_tokens": 8}}
    with load("reference", "auto", policy) as model:
        assert model.kv == "int8"
        with model.generate(np.zeros(600, np.int64), 1) as generation:
            list(generation)
            wide = generation.kv_bytes
    with load("reference", "int8", {"kv": {"recent_window": 16}}) as model:
        generation = model.generate(np.zeros(600, np.int64), 1)
        list(generation)
    assert wide is not None
    assert generation.kv_bytes is not None
    # 240 tokens more in FP16 instead of INT8.
    assert wide > generation.kv_bytes * 1.2


def test_auto_packs_as_far_as_the_policys_thresholds_say() -> None:
    held = []
    for shares in ((0, 0, 0), (1, 0, 0), (1, 0.7, 0)):
        levels = dict(zip(("L1_int8", "L2_int4", "L3_evict"), shares, strict=True))
        with load("reference", "auto", {"kv": {"level_thresholds": levels, "l2_format": "k4v4"}}) as model:
            generation = model.generate(np.arange(1, 600), 135, ignore_eos=True)
            list(generation)
            held.append(generation.kv_bytes or 0)
    assert held[0] > held[1] > held[2] > 0


def test_a_prompt_longer_than_the_context_is_refused(model: Model) -> None:
    with pytest.raises(ContextError, match="4097 tokens are more than the model's context of 4096"):
        model.generate(np.zeros(4097, np.int64))


def test_a_budget_too_small_is_a_typed_error() -> None:
    with load("reference", budget_bytes="64KiB") as model, pytest.raises(BudgetError):
        next(model.generate(np.zeros(200, np.int64)))
    with pytest.raises(ConfigError, match="budget_bytes 1000"):
        load("reference", budget_bytes=1000)


def test_a_budget_that_runs_out_ends_the_generation_and_not_the_model() -> None:
    with load("reference", budget_bytes="768KiB") as model:
        with pytest.raises(BudgetError):
            list(model.generate("Once", 4000, ignore_eos=True))
        assert text(model.generate(PROMPT, 1)) == " put"


def test_a_conversation_computes_only_what_is_new(int8: Model) -> None:
    with int8.chat(max_tokens=8) as conversation:
        text(conversation.send(PROMPT))
        second = conversation.send("\n worthy =")
        answer = text(second)
        assert second.cached_tokens > 30
        assert second.prompt_tokens - second.cached_tokens < 20
        messages = conversation.messages[:-1]
    assert answer == text(int8.generate(messages, 8))


def test_a_cancelled_prompt_frees_what_it_held(int8: Model) -> None:
    cancel = threading.Event()
    cancel.set()
    generation = int8.generate(np.zeros(2000, np.int64), cancel=cancel)
    assert list(generation) == []
    assert (generation.finish_reason, generation.kv_bytes) == ("cancelled", 0)


def test_closing_a_model_frees_every_cache() -> None:
    model = load("reference")
    running = model.generate("Once")
    next(running)
    arena = model.session.arena  # type: ignore[attr-defined]
    assert arena.stats().used_bytes > 0
    model.close()
    assert arena.stats().used_bytes == 0


def test_a_rewind_that_cannot_be_is_a_typed_error(int8: Model) -> None:
    sequence = int8.session.sequence()
    sequence.feed(np.zeros(4, np.int64))
    with pytest.raises(RewindError):
        sequence.rewind(5)
    sequence.close()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv: 'int3' is not one of off, f16, int8, k8v4, int4, auto"):
        load("reference", "int3")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load(tmp_path)


def test_the_pool_remembers_the_most_it_held() -> None:
    with inferos.load("reference") as model:
        list(model.generate(list(range(1, 300)), 3))
        pool = model.kv_pool
        assert pool is not None
        assert 0 == pool.used_bytes < pool.used_high_water_bytes <= pool.reserved_high_water_bytes
    with inferos.load("reference", "off") as model:
        assert model.kv_pool is None


def test_iobinding_is_in_force_as_the_model_was_opened() -> None:
    with load("reference", policy={"io": {"enable_iobinding": False}}) as model:
        assert model.effective_policy.effective["io"]["enable_iobinding"] is False
        assert model.effective_policy.notes == ()
        model.set_policy({"io": {"enable_iobinding": True}}, "test")
        (note,) = model.effective_policy.notes
        assert note == "io.enable_iobinding: false (requested true: set when the model is opened)"
