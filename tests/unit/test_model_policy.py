"""A policy in force: over the real cache and the embedded model, as far as it goes; over fakes for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeSession

from inferos.config import Policy
from inferos.errors import BudgetError, ConfigError
from inferos.runtime.model import Model, load

pytest.importorskip("onnxruntime")

PROMPT = np.arange(1, 600)
MANY = 200  # decoded tokens: four reviews
LAYERS = 6  # of the embedded model


def opened(kv: str = "auto", policy: dict[str, Any] | None = None, **options: Any) -> Model:
    return load("reference", kv, {"kv": {"l2_format": "k4v4", **(policy or {})}}, threads=1, **options)


def feed(sequence: Any, tokens: int) -> None:
    """Decode ids that do not matter."""
    for token in range(tokens):
        sequence.feed(np.array([token % 500 + 1]))


def held(sequence: Any) -> dict[str, int]:
    """Tokens by format, summed over layers and heads, where there are any."""
    return {kv: count for kv, count in sequence.cache.stats().token_heads.items() if count}


@pytest.fixture
def dynamic() -> Iterator[Model]:
    with opened() as model:
        yield model


# Changes at run time -----------------------------------------------------------------------------------------------


def test_an_open_sequence_follows_a_change_from_its_next_reviews_on(dynamic: Model) -> None:
    sequence: Any = dynamic.session.sequence()
    sequence.feed(PROMPT)
    feed(sequence, MANY)
    before = held(sequence)["int4"]
    assert dynamic.set_policy({"kv": {"mode": "throughput_optimized"}}, "more room") == 2
    feed(sequence, MANY)
    assert before < held(sequence)["int4"]
    assert "int8" not in held(sequence)  # the thresholds leave no block a choice
    sequence.close()


def test_a_new_sequence_is_kept_by_the_new_policy(dynamic: Model) -> None:
    dynamic.set_policy({"kv": {"mode": "disabled"}}, "to compare")
    sequence: Any = dynamic.session.sequence()
    sequence.feed(PROMPT)
    feed(sequence, MANY)
    assert set(held(sequence)) == {"f16"}


def test_a_mode_that_was_a_fixed_format_can_be_left(dynamic: Model) -> None:
    with opened(policy={"mode": "quality_optimized"}) as model:
        assert model.kv == "int8"
        model.set_policy({"kv": {"mode": "throughput_optimized"}}, "more room")
        assert model.kv == "auto"
        sequence: Any = model.session.sequence()
        sequence.feed(PROMPT)
        feed(sequence, MANY)
        assert held(sequence)["int4"] > 0


def test_a_refused_change_changes_neither_policy_nor_cache(dynamic: Model) -> None:
    rules = dynamic.session.rules  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"kv\.layer_overrides\.6: no such layer; the model has 6"):
        dynamic.set_policy({"kv": {"layer_overrides": {"6": {"max_level": "L1"}}, "recent_window": 16}}, "x")
    assert dynamic.session.rules is rules  # type: ignore[attr-defined]
    assert [version.reason for version in dynamic.policy_history] == ["start"]


def test_a_rollback_is_in_force_like_a_change(dynamic: Model) -> None:
    dynamic.set_policy({"kv": {"recent_window": 128}}, "a")
    dynamic.policies.rollback(1)
    assert dynamic.policy.kv.recent_window == dynamic.session.rules.recent_window == 64  # type: ignore[attr-defined]
    assert [v.reason for v in dynamic.policy_history] == ["start", "a", "rollback to version 1"]


# Layers, scorers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["int4", "auto"])
def test_a_layer_goes_no_further_than_its_override(kv: str) -> None:
    overrides = {"0": {"max_level": "L0"}, "-1": {"max_level": "L1"}}
    with opened(kv, {"layer_overrides": overrides, "mode": "throughput_optimized"}) as model:
        sequence: Any = model.session.sequence()
        sequence.feed(PROMPT)
        feed(sequence, MANY)
        formats = [set(sequence.cache.formats(layer, 0).tolist()) for layer in range(LAYERS)]
    assert formats[0] == {0}
    assert formats[-1] == {0, 1}
    assert all(3 in found for found in formats[1:-1])


def test_a_layer_that_is_not_there_is_refused_on_loading() -> None:
    with pytest.raises(ConfigError, match=r"kv\.layer_overrides\.-7: .* wanted -6\.\.5"):
        opened(policy={"layer_overrides": {"-7": {"max_level": "L1"}}})


@pytest.mark.parametrize("scorer", ["recency", "keydiff", "snapkv", "mission", "random"])
def test_a_scorer_decides_which_blocks_are_demoted(scorer: str) -> None:
    found = []
    for name in (scorer, "attention_ema"):
        with opened(policy={"scorer": name, "mode": "latency_optimized"}) as model:
            sequence: Any = model.session.sequence()
            sequence.feed(PROMPT)
            feed(sequence, MANY)
            found.append(
                np.stack([sequence.cache.formats(layer, head) for layer in range(LAYERS) for head in range(2)])
            )
    assert (found[0] == 3).any()
    assert (found[0] != found[1]).any()
    if scorer == "recency":  # in every head the oldest ones
        for row in found[0]:
            narrow = np.flatnonzero(row == 3)
            assert narrow.size == 0 or narrow.max() < np.flatnonzero(row == 1).min()


# Pressure and quality ----------------------------------------------------------------------------------------------


def test_mode_dynamic_tightens_under_pressure_and_gives_the_same_tokens_again() -> None:
    texts, thresholds = [], []
    for _ in range(2):
        with opened(budget_bytes="1300KiB", prefill_chunk=64) as model:
            sequence: Any = model.session.sequence()
            sequence.feed(PROMPT)
            picked = []
            for _ in range(MANY):
                picked.append(int(sequence.feed(np.array(picked[-1:] or [1])).argmax()))
            texts.append(picked)
            thresholds.append(sequence.reviews.thresholds.as_tuple())
    assert texts[0] == texts[1]
    assert thresholds[0] == thresholds[1] > (1, 0.7, 0.3)


def test_mode_dynamic_relaxes_where_a_measured_quality_is_over_its_bound(dynamic: Model) -> None:
    dynamic.watch_quality(lambda: 1.0)
    sequence: Any = dynamic.session.sequence()
    sequence.feed(PROMPT)
    feed(sequence, 1)
    assert sequence.reviews.thresholds.as_tuple() == (0.8, 0.3, 0)


# The budget --------------------------------------------------------------------------------------------------------


def test_overflow_stop_keeps_the_text_and_the_model() -> None:
    with opened(policy={"overflow": "stop", "eviction": "never"}, budget_bytes="800KiB") as model:
        generation = model.generate("Once", 4000, ignore_eos=True, seed=1)
        tokens = list(generation)
        assert (generation.finish_reason, generation.text) == ("budget", "".join(token.text for token in tokens))
        assert len(tokens) > 100
        assert len(list(model.generate("Once", 5))) == 5


def test_overflow_evict_goes_on_within_the_budget() -> None:
    with opened(policy={"overflow": "evict"}, budget_bytes="800KiB") as model:
        generation = model.generate("Once", 1000, ignore_eos=True, seed=1)
        assert len(list(generation)) == 1000
        stats = model.session.arena.stats()  # type: ignore[attr-defined]
        assert stats.reserved_high_water_bytes <= 800 * 1024


def test_overflow_error_raises() -> None:
    with opened(policy={"eviction": "never"}, budget_bytes="800KiB") as model, pytest.raises(BudgetError):
        list(model.generate("Once", 4000, ignore_eos=True, seed=1))


# What is in force --------------------------------------------------------------------------------------------------


def test_what_is_in_force_stands_beside_what_was_asked_for() -> None:
    with opened("int4", {"mode": "latency_optimized", "recent_window": 32}, budget_bytes="1GiB") as model:
        found = model.effective_policy
    assert (found.version, found.reason) == (1, "start")
    assert found.requested == {"kv": {"l2_format": "k4v4", "mode": "latency_optimized", "recent_window": 32}}
    assert found.effective["kv"]["format"] == "int4"
    assert found.effective["kv"]["recent_window"] == 32
    assert found.effective["kv"]["level_thresholds"] is None
    assert found.effective["io"] == {"host_pool_bytes": 1 << 30, "enable_iobinding": True}
    assert found.notes == ("kv.mode: not in force, kv=int4 is a fixed format",)


def test_what_only_new_sequences_or_a_new_model_can_take_up_is_said(dynamic: Model) -> None:
    changes = {
        "kv": {"sink_tokens": 8, "scorer": "recency"},
        "io": {"host_pool_bytes": "1GiB"},
        "scheduler": {"decode_device": "npu"},
    }
    dynamic.set_policy(changes, "x")
    assert [note.partition(":")[0] for note in dynamic.effective_policy.notes] == [
        "kv.sink_tokens",
        "kv.scorer",
        "scheduler.decode_device",
        "io.host_pool_bytes",
    ]


def test_without_compression_the_policy_is_said_not_to_be_in_force() -> None:
    with opened("off") as model:
        found = model.effective_policy
    assert (found.effective["kv"], found.effective["io"]) == (None, {"host_pool_bytes": None, "enable_iobinding": None})
    assert found.notes == ("kv: not in force, kv=off leaves the cache to ONNX Runtime",)


def test_a_session_without_rules_keeps_its_history_all_the_same() -> None:
    model = Model(FakeSession(), policy=Policy())
    assert model.set_policy({"kv": {"sink_tokens": 8}}, "x") == 2
    assert (model.policy.kv.sink_tokens, model.effective_policy.effective["kv"]) == (8, None)


def test_the_environment_reaches_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFEROS_KV__RECENT_WINDOW", "128")
    with load("reference", "int8") as model:
        assert model.session.rules.recent_window == 128  # type: ignore[attr-defined]
