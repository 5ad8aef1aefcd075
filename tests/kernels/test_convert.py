"""f32 <-> fp16: the definition, bit for bit, on every ISA. tests/cpp/exhaustive.cpp runs over all 2^32 patterns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quantize_cases import ISAS

from inferos.errors import ConfigError, ShapeError
from inferos.kv import kernels

HALVES = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)


def around_every_boundary() -> np.ndarray:
    """Every fp16 value and every half way point between two, each with both neighbours in float32, both signs."""
    finite = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    finite[-1] = 65536  # where infinity would lie
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    return np.concatenate([points, -points, np.float32([np.inf, -np.inf, 3.4e38, 1e-45, -1e-45])])


def nearest_half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float16)


@pytest.mark.parametrize("isa", ISAS)
def test_to_f32_is_exact_for_every_half(isa: str) -> None:
    got = kernels.to_f32(HALVES, isa=isa)
    numbers = ~np.isnan(HALVES)
    assert got[numbers].tobytes() == HALVES[numbers].astype(np.float32).tobytes()
    assert np.isnan(got[~numbers]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_halves_survive_the_round_trip(isa: str) -> None:
    back = kernels.to_f16(kernels.to_f32(HALVES, isa=isa), isa=isa).view(np.uint16)
    wanted = HALVES.view(np.uint16) | np.where(np.isnan(HALVES), 0x0200, 0).astype(np.uint16)  # NaN becomes quiet
    assert (back == wanted).all()


@pytest.mark.parametrize("isa", ISAS)
def test_to_f16_rounds_to_nearest_even_at_every_boundary(isa: str) -> None:
    x = around_every_boundary()
    assert kernels.to_f16(x, isa=isa).tobytes() == nearest_half(x).tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_to_f16_saturates_and_keeps_nan(isa: str) -> None:
    x = around_every_boundary()
    wanted = np.clip(nearest_half(x), np.float16(-65504), np.float16(65504))
    assert kernels.to_f16(x, saturate=True, isa=isa).tobytes() == wanted.tobytes()
    assert np.isnan(kernels.to_f16(np.float32([np.nan]), saturate=True, isa=isa)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("saturate", [False, True])
def test_nan_keeps_sign_and_upper_payload_and_becomes_quiet(isa: str, saturate: bool) -> None:
    bits = np.uint32([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FAAB123, 0xFFBFFFFF])
    wanted = np.uint16([0x7E00, 0xFE00, 0x7E00, 0x7F55, 0xFFFF])
    got = kernels.to_f16(bits.view(np.float32), saturate=saturate, isa=isa).view(np.uint16)
    assert [hex(half) for half in got] == [hex(half) for half in wanted]


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint32, st.integers(0, 130)), st.booleans())
def test_any_bits_convert_alike_on_every_isa(bits: np.ndarray, saturate: bool) -> None:
    x = bits.view(np.float32)
    wanted = kernels.to_f16(x, saturate=saturate, isa="scalar")
    for isa in ISAS[1:]:
        assert kernels.to_f16(x, saturate=saturate, isa=isa).tobytes() == wanted.tobytes()
        assert kernels.to_f32(wanted, isa=isa).tobytes() == kernels.to_f32(wanted, isa="scalar").tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_every_length_and_shape_is_converted_whole(isa: str) -> None:
    for n in range(70):
        x = np.arange(n, dtype=np.float32) + 0.25
        assert (kernels.to_f32(kernels.to_f16(x, isa=isa), isa=isa) == x).all()
    for shape in [(), (0,), (3, 0, 2), (2, 3, 5)]:
        x = np.ones(shape, np.float32)
        assert kernels.to_f16(x, isa=isa).shape == kernels.to_f32(x.astype(np.float16), isa=isa).shape == shape


def test_other_dtypes_and_isas_are_refused() -> None:
    with pytest.raises(TypeError):
        kernels.to_f16(np.zeros(3))
    with pytest.raises(TypeError):
        kernels.to_f16(np.zeros(8, np.float32)[::2])
    with pytest.raises(TypeError):
        kernels.to_f32(np.zeros(3, np.uint16))
    with pytest.raises(ConfigError, match="'neon9' cannot run here"):
        kernels.to_f16(np.zeros(3, np.float32), isa="neon9")


def test_a_result_goes_where_the_caller_wants_it() -> None:
    x = np.random.default_rng(2).standard_normal((3, 50)).astype(np.float32)
    half, single = np.empty((3, 50), np.float16), np.empty((3, 50), np.float32)
    assert kernels.to_f16(x, out=half) is half
    assert kernels.to_f32(half, out=single) is single
    assert (half == x.astype(np.float16)).all()
    assert (single == half).all()
    with pytest.raises(ShapeError, match="to_f16: out has shape"):
        kernels.to_f16(x, out=half[:2])
    with pytest.raises(TypeError):
        kernels.to_f16(x, out=single)  # type: ignore[arg-type]
    single.setflags(write=False)
    with pytest.raises(ValueError, match="not writeable"):
        kernels.to_f32(half, out=single)
