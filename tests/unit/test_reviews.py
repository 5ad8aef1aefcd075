"""What is decided before a review: which rules, which thresholds, which scores; over a cache that only notes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inferos.config import SCORER_OPTIONS, Policy, Thresholds
from inferos.config.section import Section
from inferos.errors import ConfigError
from inferos.kv.scorers import SCORERS, Scorer
from inferos.kv.statistics import Blocks, TokenStatistics
from inferos.runtime._reviews import REVIEW_INTERVAL, Reviews
from inferos.runtime.cache_rules import CacheRules

AUTO = CacheRules("auto")
MOVING = replace(AUTO, moves=True)


@dataclass
class NotedCache:
    """Notes what is set; `used` of `budget` bytes are live."""

    kv: str = "auto"
    length: int = 0
    used: int = 0
    budget: int = 100
    due: tuple[int, ...] = ()
    set: list[dict[str, Any]] = field(default_factory=list)
    scored: dict[int, Any] = field(default_factory=dict)

    layers = (SimpleNamespace(kv_heads=2), SimpleNamespace(kv_heads=3))

    @property
    def arena(self) -> Any:
        return SimpleNamespace(stats=lambda: SimpleNamespace(used_bytes=self.used, budget_bytes=self.budget))

    def set_policy(self, **changes: Any) -> None:
        self.set.append(changes)

    def review_due(self, layer: int) -> bool:
        return layer in self.due

    def block_spans(self, layer: int) -> tuple[Any, Any]:
        return np.array([4, 68]), np.array([68, 132])

    def token_statistics(self, layer: int, head: int) -> TokenStatistics:
        values = np.linspace(0, 1, 128)
        return TokenStatistics(np.arange(4, 132), values, values, values, values)

    def set_scores(self, layer: int, scores: Any) -> None:
        self.scored[layer] = scores


def reviews(rules: CacheRules, delta_ppl: float | None = None) -> Any:
    """Reviews over any cache."""
    return Reviews(rules, rules, lambda: delta_ppl)


# Rules -------------------------------------------------------------------------------------------------------------


def test_an_open_cache_follows_what_changed_and_only_that() -> None:
    cache, held = NotedCache(), reviews(AUTO)
    held.before_step(cache, 1, AUTO)
    changed = replace(
        AUTO, recent_window=128, eviction="never", max_levels=("L1", "L3"), thresholds=Thresholds(1, 0, 0)
    )
    held.before_step(cache, 1, changed)
    held.before_step(cache, 1, changed)
    assert cache.set == [
        {"recent_window": 128, "eviction": "never", "max_levels": ("L1", "L3"), "thresholds": (1, 0, 0)}
    ]


def test_limits_of_layers_can_be_taken_back() -> None:
    cache, held = NotedCache(), reviews(replace(AUTO, max_levels=("L1", "L3")))
    held.before_step(cache, 1, AUTO)
    assert cache.set == [{"max_levels": ("L3", "L3")}]


def test_a_prompt_is_fed_by_the_new_rules_too() -> None:
    cache, held = NotedCache(), reviews(AUTO)
    held.before_step(cache, 500, replace(AUTO, recent_window=16))
    assert cache.set == [{"recent_window": 16}]


def test_sinks_scorer_and_a_fixed_format_stay() -> None:
    cache, held = NotedCache(), reviews(AUTO)
    held.before_step(cache, 1, replace(AUTO, sink_tokens=8, scorer="recency"))
    assert (cache.set, cache.scored) == ([], {})
    fixed, held = NotedCache("int8"), reviews(CacheRules("int8"))
    held.before_step(fixed, 1, AUTO)
    assert fixed.set == []


# Thresholds that move ----------------------------------------------------------------------------------------------


def moves(held: Any, cache: NotedCache, used: int, length: int) -> Any:
    """Thresholds set before the step behind `length` tokens, or None."""
    cache.set.clear()
    cache.used, cache.length = used, length
    held.before_step(cache, 1, held.rules)
    return cache.set[0]["thresholds"] if cache.set else None


def test_thresholds_follow_pressure_once_a_review_interval() -> None:
    cache, held = NotedCache(), reviews(MOVING)
    assert moves(held, cache, 40, 130) is None
    assert moves(held, cache, 95, 150) is None  # looked already
    assert moves(held, cache, 95, 3 * REVIEW_INTERVAL - 1) == (1, 1, 0.6)
    assert moves(held, cache, 40, 4 * REVIEW_INTERVAL - 1) == (1, 0.7, 0.3)


def test_without_a_budget_there_is_no_pressure() -> None:
    cache, held = NotedCache(budget=0), reviews(MOVING)
    assert moves(held, cache, 1 << 40, 63) is None


def test_a_quality_over_its_bound_takes_thresholds_back() -> None:
    assert moves(reviews(replace(MOVING, max_delta_ppl=0.1), 0.2), NotedCache(), 0, 63) == (0.8, 0.3, 0)


def test_another_mode_puts_its_own_thresholds_in_force() -> None:
    cache, held = NotedCache(), reviews(MOVING)
    assert moves(held, cache, 95, 63) == (1, 1, 0.6)
    cache.set.clear()
    held.before_step(cache, 1, AUTO)
    assert cache.set == [{"thresholds": (1, 0.7, 0.3)}]


def test_a_fork_moves_on_its_own() -> None:
    cache, held = NotedCache(), reviews(MOVING)
    copy = held.fork()
    assert moves(held, cache, 95, 63) == (1, 1, 0.6)
    assert copy.thresholds == AUTO.thresholds


# Scores ------------------------------------------------------------------------------------------------------------


def test_a_scorer_ranks_every_head_of_the_layers_that_are_due() -> None:
    cache, held = NotedCache(due=(1,)), reviews(replace(AUTO, scorer="recency"))
    held.before_step(cache, 1, held.rules)
    assert list(cache.scored) == [1]
    np.testing.assert_array_equal(cache.scored[1], [[68, 132]] * 3)


def test_a_prompt_is_not_scored_and_the_caches_own_scorer_never() -> None:
    cache = NotedCache(due=(0, 1))
    reviews(replace(AUTO, scorer="recency")).before_step(cache, 2, AUTO)
    reviews(AUTO).before_step(cache, 1, AUTO)
    assert cache.scored == {}


def test_options_reach_the_scorer() -> None:
    kv = {"scorer": "attention_mass", "scorer_options": {"heaviest": 1}}
    rules = CacheRules.of(Policy.from_mapping({"kv": kv}), 2)
    cache, held = NotedCache(due=(0,)), reviews(rules)
    held.before_step(cache, 1, rules)
    np.testing.assert_allclose(cache.scored[0], [[63 / 127, 1]] * 2)


def test_a_scorer_of_your_own_can_be_named_by_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Alternating(Scorer):
        first: int = 0

        def score(self, tokens: TokenStatistics, blocks: Blocks) -> Any:
            return (np.arange(len(blocks)) + self.first) % 2.0

    class Options(Section):
        first: int = 0

    monkeypatch.setitem(SCORERS, "alternating", Alternating)
    monkeypatch.setitem(SCORER_OPTIONS, "alternating", Options)
    policy = Policy.from_mapping({"kv": {"scorer": "alternating", "scorer_options": {"first": 1}}})
    rules = CacheRules.of(policy, 2)
    cache, held = NotedCache(due=(0,)), reviews(rules)
    held.before_step(cache, 1, rules)
    np.testing.assert_array_equal(cache.scored[0], [[1, 0]] * 2)


# Rules of a policy -------------------------------------------------------------------------------------------------


def test_a_policy_is_read_for_a_models_layers() -> None:
    policy = Policy.from_mapping(
        {
            "kv": {
                "mode": "latency_optimized",
                "layer_overrides": {"-1": {"max_level": "L1"}},
                "scorer_options": {"gamma": 0.9},
                "overflow": "stop",
            }
        }
    )
    assert CacheRules.of(policy, 3) == CacheRules(
        "auto",
        recent_window=128,
        thresholds=Thresholds(1, 0.5, 0.2),
        max_levels=("L3", "L3", "L1"),
        gamma=0.9,
        scorer_options={"gamma": 0.9},
        overflow="stop",
        max_delta_ppl=0.3,
    )
    with pytest.raises(ConfigError, match=r"kv\.layer_overrides\.-4: no such layer; the model has 3"):
        CacheRules.of(policy.update({"kv": {"layer_overrides": {"-4": {"max_level": "L1"}}}}), 3)


def test_options_that_a_scorer_refuses_are_refused_with_their_key() -> None:
    weights = {"alpha": 0, "beta": 0, "gamma": 0, "eta": 0}
    with pytest.raises(ConfigError, match=r"kv\.scorer_options: .* all weights are 0"):
        CacheRules.of(Policy.from_mapping({"kv": {"scorer": "mission", "scorer_options": weights}}), 3)


@pytest.mark.parametrize(
    ("kv", "word", "held"),
    [
        ({"mode": "disabled"}, "auto", "f16"),
        ({"mode": "quality_optimized"}, "auto", "int8"),
        ({"mode": "throughput_optimized"}, "auto", "auto"),
        ({}, "auto", "auto"),
        ({}, "int4", "int4"),
    ],
)
def test_a_fixed_format_is_the_words_or_what_the_thresholds_mean(kv: Any, word: str, held: str) -> None:
    assert CacheRules.of(Policy.from_mapping({"kv": kv}), 3, word).kv == held
