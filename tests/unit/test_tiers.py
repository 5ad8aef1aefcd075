"""Shares: the rule by which thresholds become levels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferos.errors import ConfigError
from inferos.kv.tiers import demotions, settled_shares

SHARES = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=3, max_size=3).map(
    lambda shares: tuple(sorted(shares, reverse=True))
)


@given(SHARES, st.integers(0, 60))
def test_the_lowest_go_down_until_each_share_holds_and_no_further(
    thresholds: tuple[float, float, float], blocks: int
) -> None:
    moved = demotions([0] * blocks, list(range(blocks)), [thresholds] * blocks)
    levels = [int(moved.get(index, 0)) for index in range(blocks)]
    assert levels == sorted(levels, reverse=True)
    for level, share in enumerate(thresholds, 1):
        above = sum(held < level for held in levels)
        exact = round((20 - round(share * 20)) * blocks)  # in twentieths
        assert above == math.ceil(exact / 20)
    assert settled_shares(thresholds, blocks) == tuple(levels.count(level) for level in range(4))


@given(SHARES, st.lists(st.integers(0, 3), max_size=30))
def test_blocks_demoted_earlier_count_and_never_come_back(
    thresholds: tuple[float, float, float], levels: list[int]
) -> None:
    moved = demotions(levels, list(range(len(levels))), [thresholds] * len(levels))
    after = [int(moved.get(index, level)) for index, level in enumerate(levels)]
    assert all(new >= old for new, old in zip(after, levels, strict=True))
    full = False
    for level in (1, 2, 3):
        allowed = math.ceil(round((1 - thresholds[level - 1]) * len(levels), 9))
        full |= sum(old < level for old in levels) > allowed
        assert sum(new < level for new in after) <= allowed
    assert bool(moved) == full


def test_a_block_is_demoted_by_its_own_thresholds() -> None:
    moved = demotions([0, 0, 0, 0], [0, 1, 2, 3], [(0, 0, 0), (1, 0, 0), (0, 0, 0), (1, 1, 0)])
    assert moved == {1: 1, 3: 2}


@pytest.mark.parametrize("thresholds", [(0.5, 0.7, 0.3), (1, 0.5), (1.1, 0, 0), (1, math.nan, 0), (1, 0.5, -0.1)])
def test_thresholds_out_of_order_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="0 <= L3 <= L2 <= L1 <= 1"):
        settled_shares(thresholds, 4)
