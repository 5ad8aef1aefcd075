"""Whole blocks: the bytes of block.hpp, built from the quantisers and read back."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from quantize_cases import HEAD_DIMS, ISAS, quantize

from inferos.errors import ConfigError, ShapeError
from inferos.kv import kernels

PACKED = ("int8", "k8v4", "int4")


def rows(seed: int, tokens: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    k, v = np.random.default_rng(seed).standard_normal((2, tokens, head_dim)).astype(np.float32)
    return k, v


def record(block_format: str, k: np.ndarray, v: np.ndarray) -> bytes:
    """The packed record, put together from the quantisers as block.hpp lays it out."""
    keys = quantize("k4" if block_format == "int4" else "k8", k)
    values = quantize("v8", v) if block_format == "int8" else quantize("v4", kernels.rotate(v))
    parts = [keys.codes, keys.scales, keys.minima, values.codes, values.scales, values.minima]
    return b"".join(part.tobytes() for part in parts if part is not None)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_format", PACKED)
def test_packed_record_is_codes_scales_codes_scales(block_format: str, head_dim: int) -> None:
    for tokens in (1, 40, 64):
        k, v = rows(head_dim, tokens, head_dim)
        block = kernels.pack_block(block_format, k, v)
        assert block.nbytes % 64 == 0
        assert block.tobytes() == record(block_format, k, v)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_format", PACKED)
def test_packed_block_reads_back_as_its_parts_do(block_format: str, head_dim: int) -> None:
    k, v = rows(head_dim + 1, 50, head_dim)
    keys, values = kernels.unpack_block(block_format, kernels.pack_block(block_format, k, v), head_dim, 50)
    wanted_k = kernels.dequantize_k(quantize("k4" if block_format == "int4" else "k8", k))
    if block_format == "int8":
        wanted_v = kernels.dequantize_v(quantize("v8", v))
    else:
        wanted_v = kernels.rotate(kernels.dequantize_v(quantize("v4", kernels.rotate(v))))
    assert keys.tobytes() == wanted_k.tobytes()
    assert values.tobytes() == wanted_v.tobytes()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_f16_block_holds_key_panels_of_16_tokens_and_value_rows(head_dim: int) -> None:
    k, v = rows(head_dim + 2, 64, head_dim)
    block = kernels.pack_block("f16", k, v).view(np.float16)
    keys, values = block[: 64 * head_dim].reshape(4, head_dim, 16), block[64 * head_dim :].reshape(64, head_dim)
    assert (keys.transpose(0, 2, 1).reshape(64, head_dim) == k.astype(np.float16)).all()
    assert (values == v.astype(np.float16)).all()


def test_f16_block_reads_back_as_fp16_rows_at_every_length() -> None:
    k, v = rows(3, 64, 80)
    for tokens in range(1, 65):
        block = kernels.pack_block("f16", k[:tokens], v[:tokens])
        keys, values = kernels.unpack_block("f16", block, 80, tokens)
        assert (keys == k[:tokens].astype(np.float16)).all()
        assert (values == v[:tokens].astype(np.float16)).all()


def test_f16_block_saturates() -> None:
    big = np.full((1, 16), 1e9, np.float32)
    keys, values = kernels.unpack_block("f16", kernels.pack_block("f16", big, -big), 16, 1)
    assert (keys == 65504).all()
    assert (values == -65504).all()


@pytest.mark.parametrize("block_format", PACKED)
def test_a_nan_value_costs_only_its_own_place(block_format: str) -> None:
    k, v = rows(4, 64, 128)
    broken = v.copy()
    broken[7, 9] = np.nan
    zeroed = v.copy()
    zeroed[7, 9] = 0
    assert (
        kernels.pack_block(block_format, k, broken).tobytes() == kernels.pack_block(block_format, k, zeroed).tobytes()
    )


@pytest.mark.parametrize(
    ("block_format", "k_bound", "v_bound"), [("int8", 0.01, 0.01), ("k8v4", 0.01, 0.12), ("int4", 0.15, 0.12)]
)
def test_reading_back_is_within_the_formats_error(block_format: str, k_bound: float, v_bound: float) -> None:
    for head_dim in (16, 64, 80, 96, 128, 256):
        k, v = rows(5, 64, head_dim)
        k[:, ::7] *= 75
        keys, values = kernels.unpack_block(block_format, kernels.pack_block(block_format, k, v), head_dim)
        worst = (np.linalg.norm(keys - k, axis=0) / np.linalg.norm(k, axis=0)).max()
        assert worst <= k_bound, f"one channel of head_dim {head_dim} is off by {worst}"
        assert np.linalg.norm(values - v) <= v_bound * np.linalg.norm(v)


def test_rotation_saves_4_bit_values_with_an_outlier_channel() -> None:
    _, v = rows(6, 64, 128)
    v[:, 5] *= 40
    _, values = kernels.unpack_block("int4", kernels.pack_block("int4", v, v), 128)
    others = np.arange(128) != 5
    plain = kernels.dequantize_v(kernels.quantize_v(v, 4))
    assert np.linalg.norm((values - v)[:, others]) < 0.8 * np.linalg.norm((plain - v)[:, others])


def test_demotion_from_int8_to_int4_adds_little_to_int4() -> None:
    k, v = rows(7, 64, 128)
    once = kernels.unpack_block("int4", kernels.pack_block("int4", k, v), 128)
    twice = kernels.unpack_block(
        "int4", kernels.pack_block("int4", *kernels.unpack_block("int8", kernels.pack_block("int8", k, v), 128)), 128
    )
    for x, direct, demoted in zip((k, v), once, twice, strict=True):
        assert np.linalg.norm(demoted - x) <= 1.05 * np.linalg.norm(direct - x)


def digest() -> str:
    """Every format's bytes and what they read back as, in one hash, by this process's active ISA."""
    state = hashlib.sha256()
    for head_dim in (16, 80, 128, 256):
        k, v = rows(8, 61, head_dim)
        for block_format in ("f16", *PACKED):
            block = kernels.pack_block(block_format, k, v)
            state.update(block.tobytes())
            for part in kernels.unpack_block(block_format, block, head_dim, 61):
                state.update(part.tobytes())
    return state.hexdigest()


def in_a_process_with(isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import test_codec; print(test_codec.kernels.active_isa(), test_codec.digest())"],
        env={**os.environ, "INFEROS_ISA": isa, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_have_the_same_bytes_on_every_isa(isa: str) -> None:
    assert in_a_process_with(isa).stdout.split() == [isa, digest()]


def test_an_isa_that_cannot_run_is_refused_at_import() -> None:
    run = in_a_process_with("altivec")
    assert run.returncode != 0
    assert "ConfigError: INFEROS_ISA: 'altivec' cannot run here" in run.stderr


def test_blocks_that_do_not_fit_are_refused() -> None:
    k, v = rows(9, 8, 32)
    with pytest.raises(ShapeError, match="v has shape"):
        kernels.pack_block("int8", k, v[:4])
    with pytest.raises(ShapeError, match="head_dim"):
        kernels.pack_block("int8", k[:, :24].copy(), v[:, :24].copy())
    with pytest.raises(TypeError):
        kernels.pack_block("int8", k.astype(np.float64), v)
    with pytest.raises(ConfigError, match="'int2'"):
        kernels.pack_block("int2", k, v)
    block = kernels.pack_block("int8", k, v)
    with pytest.raises(ShapeError, match="block has shape"):
        kernels.unpack_block("int8", block[:-1].copy(), 32)
    with pytest.raises(ShapeError, match="block has shape"):
        kernels.unpack_block("int4", block, 32)
    for tokens in (0, 65, -1):
        with pytest.raises(ShapeError, match="tokens"):
            kernels.unpack_block("int8", block, 32, tokens)
    for head_dim in (-16, 0, 17, 1 << 40):
        with pytest.raises(ShapeError, match="head_dim"):
            kernels.unpack_block("int8", block, head_dim)
