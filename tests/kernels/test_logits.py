"""What the sampler asks of a row of logits: every ISA returns scalar's bits, and the sums are those of float64."""

from __future__ import annotations

import numpy as np
import pytest

from inferos import _core
from inferos.kv import kernels

ISAS = kernels.runnable_isas()
CHUNK = 512
SIZES = (1, 15, 16, 17, 63, 511, 512, 513, 1024, 1500, 32001)
native = _core.kernels


def rows(seed: int, size: int) -> np.ndarray:
    """Logits of which some do not count, up to a whole chunk of them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    bad = rng.random(size) < rng.choice([0.0, 0.01, 0.5])
    x[bad] = rng.choice(np.float32([np.nan, np.inf, -np.inf, -0.0, 1e-40]), int(bad.sum()))
    if size > 2 * CHUNK:
        x[CHUNK : 2 * CHUNK] = rng.choice(np.float32([np.nan, -np.inf, 3.0]))
    return x


def chunks(x: np.ndarray) -> list[np.ndarray]:
    return [c[np.isfinite(c)] for c in np.split(x, range(CHUNK, x.size, CHUNK))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
def test_largest_of_all_and_of_each_chunk(isa: str, size: int) -> None:
    for seed in range(20):
        x = rows(seed, size)
        top, tops = native.logits_largest(x, isa)
        wanted = [c.max() if c.size else -np.inf for c in chunks(x)]
        assert tops.tolist() == wanted, seed
        assert top == max(wanted)
        assert tops.tobytes() == native.logits_largest(x, "scalar")[1].tobytes(), f"zeros of two signs, seed {seed}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inverse_temperature", [1.0, 0.53125, 20.0, 1e30])
@pytest.mark.parametrize("size", SIZES)
def test_sums_have_scalars_bits_and_are_those_of_float64(isa: str, size: int, inverse_temperature: float) -> None:
    for seed in range(20):
        x = rows(seed, size)
        top, _ = native.logits_largest(x, isa)
        if top == -np.inf:
            continue
        total, sums = native.logits_weigh(x, top, inverse_temperature, isa)
        scalar = native.logits_weigh(x, top, inverse_temperature, "scalar")
        assert (total, sums.tobytes()) == (scalar[0], scalar[1].tobytes()), f"{isa} differs from scalar, seed {seed}"
        exact = [np.exp((c.astype(np.float64) - top) * inverse_temperature).sum() for c in chunks(x)]
        np.testing.assert_allclose(sums, exact, rtol=1e-5, atol=1e-36)  # terms far below the largest: 1e-8 a nat
        assert total == pytest.approx(sum(exact), rel=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
def test_positions_of_the_logits_that_reach_a_threshold(isa: str, size: int) -> None:
    for seed in range(20):
        x = rows(seed, size)
        for threshold in (-np.inf, -1.0, 0.0, float(x[seed % size]), np.inf):
            if np.isnan(threshold):
                continue
            found = native.logits_at_least(x, threshold, isa)
            assert found.tolist() == np.flatnonzero(np.isfinite(x) & (x >= threshold)).tolist(), seed
