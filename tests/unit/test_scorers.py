"""Scorers: each against its definition in plain loops, and the promises all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferos.errors import ConfigError, ShapeError
from inferos.kv.importance import ImportanceCalculator
from inferos.kv.scorers import SCORERS, Scorer, make_scorer
from inferos.kv.statistics import Blocks, TokenStatistics

Token = dict[str, float]
SIZES = [64, 64, 17, 64, 1, 5]  # tokens of a block; a rewind leaves short ones behind


def statistics(seed: int = 0, tokens: int = 4 + sum(SIZES)) -> TokenStatistics:
    random = np.random.default_rng(seed)
    mass = random.exponential(size=tokens)
    return TokenStatistics(
        position=np.arange(tokens),
        mass=mass / mass.sum(),
        value_norm=random.uniform(0.5, 2, tokens),
        key_norm=random.uniform(5, 9, tokens),
        key_similarity=random.uniform(-1, 1, tokens),
    )


def grid() -> Blocks:
    ends = 4 + np.cumsum(SIZES)
    return Blocks(start=ends - SIZES, stop=ends)


def rows(tokens: TokenStatistics, blocks: Blocks) -> list[list[Token]]:
    """The tokens of every block, as mappings."""
    names = [field.name for field in fields(TokenStatistics)]
    found = [{name: float(getattr(tokens, name)[i]) for name in names} for i in range(len(tokens))]
    pairs = zip(blocks.start, blocks.stop, strict=True)
    return [[token for token in found if a <= token["position"] < b] for a, b in pairs]


def heaviest(worth: Callable[[Token], float]) -> Callable[[list[Token], list[list[Token]]], float]:
    def of_block(block: list[Token], _every: list[list[Token]]) -> float:
        best = sorted((worth(token) for token in block), reverse=True)[:8]
        return sum(best) / len(best)

    return of_block


def snapkv(block: list[Token], every: list[list[Token]]) -> float:
    mass = {int(p): float(m) for p, m in zip(statistics().position, statistics().mass, strict=True)}

    def pooled(token: Token) -> float:
        near = [mass[p] for p in range(int(token["position"]) - 2, int(token["position"]) + 3) if p in mass]
        return sum(near) / len(near)

    return heaviest(pooled)(block, every)


def mission(block: list[Token], every: list[list[Token]]) -> float:
    attention = [heaviest(lambda t: t["mass"] * t["value_norm"])(b, every) for b in every]
    own = attention[every.index(block)]
    ends = [b[-1]["position"] for b in every]
    return (
        0.4 * sum(a < own for a in attention) / (len(every) - 1)
        + 0.3 * sum(t["mass"] > 1 / len(statistics()) for t in block) / len(block)
        + 0.2 * (1 - sum(t["key_similarity"] for t in block) / len(block)) / 2
        + 0.1 * (1 - (max(ends) - block[-1]["position"]) / (max(ends) - min(ends)))
    )


DEFINITIONS: dict[str, Callable[[list[Token], list[list[Token]]], float]] = {
    "attention_ema": heaviest(lambda token: token["mass"] * token["value_norm"]),
    "attention_mass": heaviest(lambda token: token["mass"]),
    "key_norm": heaviest(lambda token: -token["key_norm"]),
    "keydiff": heaviest(lambda token: -token["key_similarity"]),
    "mission": mission,
    "recency": lambda block, _every: block[-1]["position"] + 1,
    "snapkv": snapkv,
    "streaming_llm": lambda block, _every: math.inf if block[0]["position"] < 4 else block[-1]["position"] + 1,
}


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_a_scorer_computes_its_definition(name: str) -> None:
    blocks, tokens = grid(), statistics()
    every = rows(tokens, blocks)
    wanted = [DEFINITIONS[name](block, every) for block in every]
    np.testing.assert_allclose(make_scorer(name).score(tokens, blocks), wanted, rtol=1e-9)


def test_every_scorer_but_the_control_has_its_definition_here() -> None:
    assert set(SCORERS) == {*DEFINITIONS, "random"}


def test_streaming_llm_never_gives_up_a_sink() -> None:
    blocks = Blocks(start=np.array([0, 4, 68]), stop=np.array([4, 68, 132]))
    scores = make_scorer("streaming_llm", {"sinks": 4}).score(statistics(), blocks)
    assert scores.tolist() == [math.inf, 68, 132]


def test_the_control_is_even_and_knows_only_position_and_seed() -> None:
    start = np.arange(4, 64 * 20_000, 64)
    blocks = Blocks(start=start, stop=start + 64)
    scores = make_scorer("random").score(statistics(), blocks)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert np.histogram(scores, 10, (0, 1))[0] == pytest.approx(np.full(10, len(start) / 10), rel=0.1)
    tail = Blocks(start=start[7:9], stop=start[7:9] + 3)
    np.testing.assert_array_equal(make_scorer("random").score(statistics(1), tail), scores[7:9])
    other = make_scorer("random", {"seed": 1}).score(statistics(), blocks)
    assert abs(np.corrcoef(scores, other)[0, 1]) < 0.03


def shared_table() -> list[Any]:
    return [pytest.param(make_scorer(name), id=name) for name in sorted(SCORERS)]


@pytest.mark.parametrize("scorer", shared_table())
class TestEveryScorer:
    def test_gives_one_number_a_block_and_no_block_none(self, scorer: Scorer) -> None:
        scores = scorer.score(statistics(), grid())
        assert scores.shape == (len(SIZES),)
        assert scores.dtype == np.float64
        none = np.empty(0, np.int64)
        assert scorer.score(statistics(), Blocks(start=none, stop=none)).shape == (0,)
        assert scorer.score(statistics(tokens=0), grid()).shape == (len(SIZES),)

    def test_is_pure(self, scorer: Scorer) -> None:
        tokens = statistics()
        before = [getattr(tokens, field.name).copy() for field in fields(tokens)]
        np.testing.assert_array_equal(scorer.score(tokens, grid()), scorer.score(tokens, grid()))
        for field, old in zip(fields(tokens), before, strict=True):
            np.testing.assert_array_equal(getattr(tokens, field.name), old)

    def test_is_frozen_and_hashable(self, scorer: Scorer) -> None:
        assert hash(scorer) == hash(type(scorer)())
        for field in fields(scorer):  # type: ignore[arg-type]
            with pytest.raises(FrozenInstanceError):
                setattr(scorer, field.name, 1)

    def test_says_unknown_for_a_block_of_which_nothing_it_needs_is_known(self, scorer: Scorer) -> None:
        tokens = statistics()
        for name in ("mass", "value_norm", "key_norm", "key_similarity"):
            getattr(tokens, name)[4:68] = np.nan
        scores = scorer.score(tokens, grid())
        by_position = type(scorer).__name__ in ("Recency", "StreamingLLM", "RandomOrder")
        assert np.isnan(scores[0]) != by_position
        assert not np.isnan(scores[1:]).any()


@given(st.lists(st.booleans(), min_size=10, max_size=10))
def test_an_unmeasured_token_does_not_count(measured: list[bool]) -> None:
    tokens = statistics(3, 10)
    tokens.mass[~np.array(measured)] = np.nan
    known = tokens.mass[np.array(measured)]
    block = Blocks(start=np.array([0]), stop=np.array([10]))
    wanted = np.sort(known)[-8:].mean() if known.size else np.nan
    np.testing.assert_allclose(make_scorer("attention_mass").score(tokens, block), [wanted])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("age", {}, "'age' is not one of attention_ema"),
        ("recency", {"sinks": 4}, "unknown option 'sinks'; known here: none"),
        ("snapkv", {"pool": 4}, "pool 4 is even"),
        ("snapkv", {"pool": 65}, "pool 65 is not a whole number within 1..63"),
        ("attention_ema", {"heaviest": 0}, "heaviest 0 is not a whole number within 1..64"),
        ("keydiff", {"heaviest": True}, "heaviest True"),
        ("streaming_llm", {"sinks": -1}, "sinks -1"),
        ("random", {"seed": 0.5}, "seed 0.5"),
        ("mission", {"alpha": -0.1}, "alpha -0.1"),
        ("mission", {"eta": math.nan}, "eta nan"),
        ("mission", dict.fromkeys(("alpha", "beta", "gamma", "eta"), 0), "all weights are 0"),
    ],
)
def test_a_wrong_option_is_one_typed_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_scorer(name, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_that_do_not_fit_together_are_refused() -> None:
    ones = np.ones(3)
    with pytest.raises(ShapeError, match="mass has shape"):
        TokenStatistics(np.arange(3), np.ones(2), ones, ones, ones)
    with pytest.raises(ShapeError, match="ascend"):
        TokenStatistics(np.array([0, 2, 2]), ones, ones, ones, ones)
    with pytest.raises(ShapeError, match="stop is not behind"):
        Blocks(np.array([0, 4]), np.array([4, 4]))


def test_importance_is_the_weighted_sum_and_falls_with_age() -> None:
    calculator = ImportanceCalculator()
    assert (calculator.alpha, calculator.beta, calculator.gamma, calculator.eta) == (0.4, 0.3, 0.2, 0.1)
    assert float(calculator.calculate(0.5, 0.25, 1, 0)) == pytest.approx(0.4 * 0.5 + 0.3 * 0.25 + 0.2 + 0.1)
    ages = calculator.calculate(0.5, 0.5, 0.5, np.linspace(0, 1, 5))
    assert (np.diff(ages) < 0).all()
    assert ages[0] - ages[-1] == pytest.approx(0.1)
    assert float(ImportanceCalculator(1, 0, 0, 3).calculate(1, 0, 0, 1)) == 0.25


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_importance_stays_within_0_1(numbers: list[float]) -> None:
    weights, terms = numbers[:4], numbers[4:]
    if sum(weights) > 0:
        assert 0 <= float(ImportanceCalculator(*weights).calculate(*terms)) <= 1


@pytest.mark.parametrize("name", ["attention", "frequency", "semantic", "age"])
@pytest.mark.parametrize("value", [-0.01, 1.5, math.inf, "much", None])
def test_a_term_outside_0_1_is_refused_by_name(name: str, value: object) -> None:
    terms: dict[str, Any] = {"attention": 0, "frequency": 0, "semantic": 0, "age": 0}
    if value is None:
        assert np.isnan(ImportanceCalculator().calculate(**{**terms, name: math.nan}))
        return
    with pytest.raises(ConfigError, match=name):
        ImportanceCalculator().calculate(**{**terms, name: value})


def test_terms_of_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"frequency \(3,\)"):
        ImportanceCalculator().calculate(np.zeros(2), np.zeros(3), 0, 0)


def test_the_documented_scorer_works_and_the_documents_table_is_the_registry() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "scorers.md").read_text("utf-8")
    named = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(named) == sorted(SCORERS)
    example = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    blocks, tokens = grid(), statistics()
    wanted = [heaviest(lambda t: t["mass"] * t["key_norm"])(b, []) for b in rows(tokens, blocks)]
    with mock.patch.dict(SCORERS):
        exec(compile(example, "docs/scorers.md", "exec"), {"__name__": "example"})  # noqa: S102 - our own text
        np.testing.assert_allclose(make_scorer("attention_per_key").score(tokens, blocks), wanted)
