"""Reading memory: every ISA sees every byte of the range, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from inferos.errors import ConfigError, ShapeError
from inferos.kv import ReadBuffer, kernels

MIB = 1 << 20
WORD = 0x9E3779B97F4A7C15


@pytest.mark.parametrize("isa", kernels.runnable_isas())
@pytest.mark.parametrize(("offset", "count"), [(0, 2 * MIB), (0, 256), (512, 768), (2 * MIB - 256, 256), (256, 0)])
def test_a_read_folds_exactly_its_words(isa: str, offset: int, count: int) -> None:
    words = np.arange(offset // 8, (offset + count) // 8, dtype=np.uint64) * np.uint64(WORD)
    assert ReadBuffer(2 * MIB).read(offset, count, isa=isa) == int(np.bitwise_xor.reduce(words))


def test_a_size_is_rounded_up_to_whole_huge_pages() -> None:
    assert ReadBuffer(2 * MIB + 1).size == 4 * MIB


@pytest.mark.parametrize(
    ("offset", "count"), [(0, 2 * MIB + 256), (2 * MIB, 256), (-256, 256), (0, -256), (128, 256), (0, 100)]
)
def test_a_range_outside_or_off_the_step_is_a_shape_error(offset: int, count: int) -> None:
    with pytest.raises(ShapeError):
        ReadBuffer(2 * MIB).read(offset, count)


def test_an_unknown_isa_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot run here"):
        ReadBuffer(1).read(0, 256, isa="neon")


def test_no_memory_is_asked_for_in_vain() -> None:
    with pytest.raises(ShapeError):
        ReadBuffer(0)
