"""The rotation: an orthonormal Walsh-Hadamard transform, the same bits on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_cases import HEAD_DIMS, ISAS

from inferos.errors import ShapeError
from inferos.kv import kernels


def chunk(head_dim: int) -> int:
    return min(128, head_dim & -head_dim)


def matrix(head_dim: int) -> np.ndarray:
    """Block-diagonal, each block in Sylvester's order, float64."""
    n = chunk(head_dim)
    block = np.ones((1, 1))
    while len(block) < n:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(head_dim // n), block / np.sqrt(n))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_the_orthonormal_matrix(head_dim: int, isa: str) -> None:
    x = np.random.default_rng(head_dim).standard_normal((37, head_dim)).astype(np.float32)
    exact = x.astype(np.float64) @ matrix(head_dim)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    assert (np.abs(kernels.rotate(x, isa=isa) - exact) <= 1e-6 * norm).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotating_twice_gives_the_rows_back_and_keeps_norms(head_dim: int) -> None:
    x = np.random.default_rng(head_dim).standard_normal((37, head_dim)).astype(np.float32)
    once = kernels.rotate(x)
    norm = np.linalg.norm(x, axis=1)
    assert np.allclose(np.linalg.norm(once, axis=1), norm, rtol=1e-6)
    assert (np.abs(kernels.rotate(once) - x) <= 1e-6 * norm[:, None]).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(HEAD_DIMS), st.integers(1, 9), st.integers(-140, 100))
def test_every_isa_equals_scalar(seed: int, head_dim: int, rows: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.standard_normal((rows, head_dim)), exponent).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = -0.0
    wanted = kernels.rotate(x, isa="scalar").tobytes()
    for isa in ISAS[1:]:
        assert kernels.rotate(x, isa=isa).tobytes() == wanted, isa


def test_an_outlier_is_spread_over_its_chunk_and_no_further() -> None:
    x = np.zeros((1, 96), np.float32)  # three chunks of 32
    x[0, 40] = 8
    rotated = kernels.rotate(x)[0]
    assert np.allclose(np.abs(rotated[32:64]), 8 / np.sqrt(32))
    assert not rotated[:32].any()
    assert not rotated[64:].any()


def test_the_rows_given_are_not_changed() -> None:
    x = np.ones((2, 16), np.float32)
    kernels.rotate(x)
    assert (x == 1).all()


@pytest.mark.parametrize("shape", [(16,), (2, 8), (2, 0), (2, 100), (2, 512), (1, 2, 8)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="rotate"):
        kernels.rotate(np.zeros(shape, np.float32))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError):
        kernels.rotate(np.zeros((2, 16)))
    with pytest.raises(TypeError):
        kernels.rotate(np.zeros((2, 16), np.float16))


def test_no_rows_are_fine() -> None:
    assert kernels.rotate(np.zeros((0, 32), np.float32)).shape == (0, 32)


@pytest.mark.parametrize("isa", ISAS)
def test_leading_dimensions_are_more_rows_and_the_result_may_take_the_place_of_the_rows(isa: str) -> None:
    x = np.random.default_rng(3).standard_normal((3, 7, 2, 96)).astype(np.float32)
    wanted = kernels.rotate(x.reshape(-1, 96), isa=isa).reshape(x.shape)
    assert (kernels.rotate(x, isa=isa) == wanted).all()
    assert kernels.rotate(x, isa=isa, out=x) is x
    assert (x == wanted).all()
    with pytest.raises(ShapeError, match="out has shape"):
        kernels.rotate(x, out=np.empty((3, 7, 1, 96), np.float32))
