"""How far attention over a compressed cache is from float64: the bounds that README and docs state."""

from __future__ import annotations

from collections.abc import Callable

import accuracy_cases as accuracy
import pytest

FLAT_BOUND = {"int8": 0.010, "int4": 0.16}
ARITHMETIC_BOUND = 0.004  # of int8: the rest of the bound above is storage
OUTLIER_BOUND = {"int8": 0.01, "int4": 0.12}


@pytest.mark.parametrize("ratio", accuracy.RATIOS)
@pytest.mark.parametrize("head_dim", accuracy.HEAD_DIMS)
def test_fp16_blocks_lose_nothing(head_dim: int, ratio: int, record_property: Callable[[str, object], None]) -> None:
    nmse = accuracy.flat_error("f16", head_dim, ratio) ** 2
    record_property("nmse", nmse)
    assert nmse <= 1e-7


@pytest.mark.parametrize("fmt", FLAT_BOUND)
@pytest.mark.parametrize("ratio", accuracy.RATIOS)
@pytest.mark.parametrize("head_dim", accuracy.HEAD_DIMS)
def test_flat_attention_keeps_its_bound(
    head_dim: int, ratio: int, fmt: str, record_property: Callable[[str, object], None]
) -> None:
    error = accuracy.flat_error(fmt, head_dim, ratio)
    record_property("error", error)
    assert error <= FLAT_BOUND[fmt]


@pytest.mark.parametrize("ratio", accuracy.RATIOS)
@pytest.mark.parametrize("head_dim", accuracy.HEAD_DIMS)
def test_int8_arithmetic_keeps_its_bound(
    head_dim: int, ratio: int, record_property: Callable[[str, object], None]
) -> None:
    error = accuracy.flat_error("int8", head_dim, ratio, arithmetic_only=True)
    record_property("error", error)
    assert error <= ARITHMETIC_BOUND


@pytest.mark.parametrize("fmt", OUTLIER_BOUND)
@pytest.mark.parametrize("frequency", accuracy.FREQUENCIES)
@pytest.mark.parametrize("magnitude", accuracy.MAGNITUDES)
@pytest.mark.parametrize("head_dim", accuracy.HEAD_DIMS)
def test_outlier_key_channels_keep_the_bound(
    head_dim: int, magnitude: int, frequency: str, fmt: str, record_property: Callable[[str, object], None]
) -> None:
    error = accuracy.outlier_error(fmt, head_dim, magnitude, frequency)
    record_property("error", error)
    assert error <= OUTLIER_BOUND[fmt]
