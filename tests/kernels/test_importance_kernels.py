"""The loops behind importance: every ISA returns scalar's bits, and those are what the contract says."""

from __future__ import annotations

import numpy as np
import pytest

from inferos import _core
from inferos.kv import kernels

ISAS = kernels.runnable_isas()
native = _core.kernels


def halves(seed: int, tokens: int) -> np.ndarray:
    """Averages or norms: not negative, finite, of all magnitudes, with ties."""
    rng = np.random.default_rng(seed)
    x = np.minimum(10.0 ** rng.uniform(-8, 4.8, tokens), 65504)
    return np.where(rng.random(tokens) < 0.3, rng.choice([0.0, 1.0, 2.0]), x).astype(np.float16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", range(1, 65))
def test_a_sample_is_folded_in_and_nan_adds_nothing(isa: str, tokens: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mass = rng.choice(np.float32([0.3, 1e-30, -1.0, -0.0, np.nan, np.inf, 1e9]), tokens) * np.float32(rng.random())
        before = halves(seed, tokens)
        after = before.copy()
        keep, add = np.float32(0.97), np.float32(0.03 * 16384)
        native.importance_fold(after, mass, keep, add, isa)
        received = np.where(mass > 0, mass, np.float32(0))
        exact = before.astype(np.float32) * keep + received * add
        assert after.tobytes() == np.minimum(exact, 65504).astype(np.float16).tobytes(), seed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", range(1, 65))
def test_the_eight_heaviest_products_are_added(isa: str, tokens: int) -> None:
    for seed in range(20):
        average, norm = halves(seed, tokens), halves(seed + 1000, tokens)
        products = np.sort(average.astype(np.float32) * norm.astype(np.float32))[::-1][:8].astype(np.float64)
        wanted = 0.0
        for product in products:
            wanted += float(product)
        assert native.importance_heaviest(average, norm, isa) == wanted, seed
