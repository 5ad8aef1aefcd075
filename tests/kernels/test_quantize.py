"""Quantisers: every ISA returns scalar's bits, and the codes keep what the contract promises, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quantize_cases import (
    HEAD_DIMS,
    ISAS,
    PARTS,
    SHAPES,
    cleaned,
    codes_of,
    dequantize,
    grid_of,
    half_step_violations,
    make,
    quantize,
    same_bits,
)

from inferos.errors import ConfigError, ShapeError
from inferos.kv import kernels

DTYPES = (np.float32, np.float16)
TOP = {"k8": 255, "k4": 15, "v8": 127, "v4": 15}


def compare_isas(x: np.ndarray, part: str, where: str) -> kernels.Quantized:
    wanted = quantize(part, x, "scalar")
    for isa in ISAS[1:]:
        assert same_bits(wanted, quantize(part, x, isa)), f"{isa} differs from scalar: {part}, {where}"
        for half in (False, True):
            values = dequantize(wanted, half=half, isa="scalar")
            assert values.tobytes() == dequantize(wanted, half=half, isa=isa).tobytes(), f"{isa}: {part} back, {where}"
    return wanted


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("part", PARTS)
def test_every_isa_equals_scalar_and_keeps_the_half_step(part: str, shape: object) -> None:
    for seed, head_dim in enumerate(HEAD_DIMS):
        for dtype in DTYPES:
            for tokens in (1, 2 + seed * 4 % 62, 64):
                x = make(shape, seed, tokens, head_dim, dtype)
                where = f"seed {seed}, tokens {tokens}, head_dim {head_dim}, {dtype.__name__}"
                q = compare_isas(x, part, where)
                assert half_step_violations(x, q) == 0, where


@pytest.mark.parametrize("part", PARTS)
def test_every_token_count_equals_scalar(part: str) -> None:
    for tokens in range(1, 65):
        for dtype in DTYPES:
            x = make(SHAPES[0], tokens, tokens, 48, dtype)
            q = compare_isas(x, part, f"tokens {tokens}")
            assert half_step_violations(x, q) == 0
            assert not codes_of(q)[tokens:].any(), "a code where there is no token"
            if part[0] == "v":
                assert not q.scales[tokens:].any()
                assert q.minima is None or not q.minima[tokens:].any()


@settings(max_examples=150, deadline=None)
@given(
    x=st.tuples(st.integers(1, 64), st.sampled_from(HEAD_DIMS[:6])).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(width=32), fill=st.floats(-4, 4, width=32))
    ),
    part=st.sampled_from(PARTS),
)
def test_any_floats_keep_bits_half_step_and_range(x: np.ndarray, part: str) -> None:
    q = compare_isas(x, part, "hypothesis")
    assert half_step_violations(x, q) == 0
    codes = codes_of(q)
    assert codes.min() >= (-127 if part == "v8" else 0)
    assert codes.max() <= TOP[part]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("part", PARTS)
def test_stored_grid_is_the_tightest_fp16_can_hold(part: str, shape: object) -> None:
    x = make(shape, 5, 40, 32, np.float32)
    q = quantize(part, x)
    exact = cleaned(x)
    axis = 0 if part[0] == "k" else 1
    scale, minimum = (grid.take(0, axis=axis) for grid in grid_of(q))
    halves = scale.astype(np.float16)
    below = np.where(halves > 0, np.nextafter(halves, np.float16(0)), np.float16(0)).astype(np.float64)
    if part == "v8":
        width = np.abs(exact).max(axis) / 127
    else:
        low = exact.min(axis)
        assert (minimum <= low).all()
        above = np.nextafter(minimum.astype(np.float16), np.float16(np.inf)).astype(np.float64)
        assert (above > low).all(), "minimum is not the largest fp16 below"
        width = (exact.max(axis) - minimum) / TOP[part]
    assert (width <= scale).all()
    assert (below[halves > 0] < width[halves > 0]).all(), "scale is not the smallest fp16 above"


@pytest.mark.parametrize("part", PARTS)
def test_larger_values_never_get_smaller_codes(part: str) -> None:
    for shape in SHAPES:
        x = make(shape, 11, 64, 64, np.float32)
        axis = 0 if part[0] == "k" else 1
        order = np.argsort(cleaned(x), axis=axis, kind="stable")
        codes = np.take_along_axis(codes_of(quantize(part, x)), order, axis)
        assert (np.diff(codes, axis=axis) >= 0).all(), shape


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("isa", ISAS)
def test_zeros_stay_zeros(part: str, isa: str) -> None:
    for zero in (0.0, -0.0):
        q = quantize(part, np.full((20, 32), zero, np.float32), isa)
        assert not q.codes.any()
        assert not q.scales.view(np.uint16).any()
        assert dequantize(q, isa=isa).tobytes() == bytes(20 * 32 * 4)
    x = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    x[:, ::3] = 0
    if part == "v8":
        assert not dequantize(quantize(part, x, isa), isa=isa)[:, ::3].any()


def test_int4_payload_is_half_of_int8() -> None:
    x = np.ones((64, 128), np.float32)
    for name in "kv":
        assert 2 * quantize(f"{name}4", x).codes.nbytes == quantize(f"{name}8", x).codes.nbytes == 64 * 128
    assert quantize("k4", x).nbytes == 64 * 128 // 2 + 128 * 4
    assert quantize("v4", x).nbytes == 64 * 128 // 2 + 64 * 4


@pytest.mark.parametrize("factor", [20, 75, 400])
@pytest.mark.parametrize("part", ["k8", "k4"])
def test_outlier_channels_leave_every_other_channel_untouched(part: str, factor: int) -> None:
    x = np.random.default_rng(factor).standard_normal((64, 128)).astype(np.float32)
    spiked = x.copy()
    spiked[:, ::9] *= factor
    plain, outlier = quantize(part, x), quantize(part, spiked)
    others = np.arange(128) % 9 != 0
    assert (codes_of(plain)[:, others] == codes_of(outlier)[:, others]).all()
    assert (plain.scales[others] == outlier.scales[others]).all()
    error = np.linalg.norm(dequantize(outlier) - spiked, axis=0) / np.linalg.norm(spiked, axis=0)
    assert error.max() <= (0.01 if part == "k8" else 0.15)


@pytest.mark.parametrize("part", ["v8", "v4"])
def test_a_loud_token_leaves_every_other_token_untouched(part: str) -> None:
    x = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)
    loud = x.copy()
    loud[17] *= 400
    others = np.arange(64) != 17
    assert (codes_of(quantize(part, x))[others] == codes_of(quantize(part, loud))[others]).all()


@pytest.mark.parametrize("part", PARTS)
def test_nan_and_infinity_spoil_nothing_but_themselves(part: str) -> None:
    x = np.random.default_rng(4).uniform(-1, 1, (64, 32)).astype(np.float32)
    x[5, 7], x[9, 3], x[9, 4] = np.nan, np.inf, -np.inf
    y = dequantize(quantize(part, x))
    assert np.isfinite(y).all()
    assert y[9, 3] > 65000 > -65000 > y[9, 4]
    scale, _ = grid_of(quantize(part, x))
    assert abs(y[5, 7]) <= scale[5, 7] / 2


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("isa", ISAS)
def test_values_are_minimum_plus_scale_times_code_rounded_once(part: str, isa: str) -> None:
    for shape in SHAPES:
        x = make(shape, 2, 33, 80, np.float32)
        q = quantize(part, x)
        scale, minimum = grid_of(q)
        exact = minimum + scale * codes_of(q)[:33]
        assert (dequantize(q, isa=isa) == exact.astype(np.float32)).all(), shape
        half = np.clip(exact.astype(np.float32), -65504, 65504).astype(np.float16)
        assert (dequantize(q, half=True, isa=isa) == half).all(), shape


@pytest.mark.parametrize("isa", ISAS)
def test_full_range_saturates_instead_of_overflowing_fp16(isa: str) -> None:
    x = np.linspace(-65504, 65504, 64, dtype=np.float32)[:, None].repeat(16, 1)
    q = quantize("k8", x, isa)
    assert dequantize(q, isa=isa).max() > 65504  # half a step beyond: an infinity in fp16
    assert dequantize(q, half=True, isa=isa).max() == 65504


@pytest.mark.parametrize("part", PARTS)
def test_unaligned_rows_give_the_same_bits(part: str) -> None:
    x = np.random.default_rng(6).standard_normal((64, 48)).astype(np.float32)
    buffer = np.zeros(x.nbytes + 64, np.uint8)
    start = (-buffer.ctypes.data) % 64 + 4
    shifted = buffer[start : start + x.nbytes].view(np.float32).reshape(x.shape)
    shifted[:] = x
    for isa in ISAS:
        assert same_bits(quantize(part, x, isa), quantize(part, shifted, isa))


@pytest.mark.parametrize("shape", [(0, 32), (65, 32), (4, 0), (4, 8), (4, 20), (4, 272), (64,), (1, 65, 32)])
@pytest.mark.parametrize("part", PARTS)
def test_shapes_that_do_not_fit_are_refused(part: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=f"quantize_{part}"):
        quantize(part, np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.uint16, np.complex64, object])
@pytest.mark.parametrize("part", PARTS)
def test_other_dtypes_are_refused(part: str, dtype: type) -> None:
    with pytest.raises(TypeError):
        quantize(part, np.zeros((4, 32), dtype))


def test_arrays_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(TypeError):
        quantize("k8", np.zeros((32, 64), np.float32)[:, ::2])
    with pytest.raises(TypeError):
        quantize("v8", np.zeros((32, 64), np.float16).T)


def test_unknown_options_are_refused() -> None:
    x = np.zeros((4, 32), np.float32)
    with pytest.raises(ConfigError, match="bits is 5"):
        kernels.quantize_k(x, 5)
    with pytest.raises(ConfigError, match="bits is 16"):
        kernels.quantize_v(x, 16)
    with pytest.raises(ConfigError, match="'sse9' cannot run here"):
        kernels.quantize_k(x, isa="sse9")


def test_quantized_parts_that_do_not_fit_are_refused() -> None:
    q = quantize("k8", np.zeros((4, 32), np.float32))
    with pytest.raises(ShapeError, match="wanted values"):
        kernels.dequantize_v(q)
    with pytest.raises(ShapeError, match="wanted keys"):
        kernels.dequantize_k(quantize("v8", np.zeros((4, 32), np.float32)))
    with pytest.raises(ShapeError, match="scales"):
        kernels.dequantize_k(dataclasses.replace(q, scales=q.scales[:16], minima=q.minima[:16]))
    with pytest.raises(ShapeError, match="codes"):
        kernels.dequantize_k(dataclasses.replace(q, codes=np.zeros((1, 8, 32, 4), np.uint8)))
    with pytest.raises(ShapeError, match="codes"):
        kernels.dequantize_k(dataclasses.replace(q, codes=q.codes.ravel()))
    with pytest.raises(TypeError):
        kernels.dequantize_k(dataclasses.replace(q, codes=q.codes.astype(np.int32)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_give_what_each_gives_alone(part: str, isa: str, dtype: type) -> None:
    for tokens in (64, 20):
        x = make(SHAPES[0], tokens, 6 * tokens, 48, dtype).reshape(2, 3, tokens, 48)
        q = quantize(part, x, isa)
        assert q.codes.shape[:2] == q.scales.shape[:2] == (2, 3)
        for half in (False, True):
            values = dequantize(q, half=half, isa=isa)
            assert values.shape == x.shape
            for at in np.ndindex(2, 3):
                alone = quantize(part, x[at], isa)
                minima = None if q.minima is None else q.minima[at]
                assert same_bits(alone, dataclasses.replace(q, codes=q.codes[at], scales=q.scales[at], minima=minima))
                assert (values[at] == dequantize(alone, half=half, isa=isa)).all()


@pytest.mark.parametrize("part", PARTS)
def test_results_go_where_the_caller_wants_them(part: str) -> None:
    quantizer = kernels.quantize_k if part[0] == "k" else kernels.quantize_v
    dequantizer = kernels.dequantize_k if part[0] == "k" else kernels.dequantize_v
    first, second = (make(SHAPES[0], seed, 4 * 64, 32, np.float32).reshape(4, 64, 32) for seed in (1, 2))
    out = quantizer(first, int(part[1]))
    assert quantizer(second, int(part[1]), out=out) is out
    assert same_bits(out, quantizer(second, int(part[1])))
    rows = np.empty((4, 64, 32), np.float16)
    assert dequantizer(out, half=True, out=rows) is rows
    assert (rows == dequantizer(out, half=True)).all()
    for bad in (first[:, :63], first[..., :16], first[:3]):
        with pytest.raises(ShapeError, match=f"quantize_{part}"):
            quantizer(np.ascontiguousarray(bad), int(part[1]), out=out)
    with pytest.raises(ShapeError, match="out is"):
        quantizer(first, 12 - int(part[1]), out=out)
    with pytest.raises(TypeError, match="out has dtype float16, wanted float32"):
        dequantizer(out, out=rows)
    with pytest.raises(ShapeError, match="out has shape"):
        dequantizer(out, half=True, out=rows[:, :50])
    with pytest.raises(ShapeError, match="codes has shape"):
        dequantizer(out, half=True, out=rows[:2])


def test_no_blocks_are_fine() -> None:
    q = kernels.quantize_k(np.zeros((0, 64, 32), np.float32))
    assert q.codes.shape == (0, 2, 8, 32, 4)
    assert kernels.dequantize_k(q).shape == (0, 64, 32)
