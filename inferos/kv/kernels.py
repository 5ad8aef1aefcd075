"""The quantisers, the fp16 conversions, the rotation and the block codec, on numpy arrays.

A block is 1 to 64 tokens of one kv head. Quantisers take any number of blocks, as leading dimensions: keys of
``(kv_heads, tokens, head_dim)``, tokens a multiple of 64, are ``x.reshape(kv_heads, -1, 64, head_dim)``. head_dim is a
multiple of 16 from 16 to 256. ``isa`` is one of `runnable_isas()`, or "" for the active one; all of them return the same
bits. Arrays must be C-contiguous and of the dtype stated: nothing is converted silently. ``out`` takes the result
instead of fresh arrays, whose page faults cost more than the work; it must not overlap the input. All functions are
thread-safe and release the GIL while they work.

The arithmetic, and why the half step is a promise that holds: csrc/kernels/quantize.hpp. The bytes: block.hpp there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from inferos import _core
from inferos.errors import ConfigError, ShapeError

__all__ = [
    "BlockFormat",
    "Quantized",
    "active_isa",
    "dequantize_k",
    "dequantize_v",
    "pack_block",
    "quantize_k",
    "quantize_v",
    "rotate",
    "runnable_isas",
    "to_f16",
    "to_f32",
    "unpack_block",
]

BlockFormat: TypeAlias = Literal["f16", "int8", "k8v4", "int4"]

_Float32: TypeAlias = npt.NDArray[np.float32]
_Float16: TypeAlias = npt.NDArray[np.float16]
_Rows: TypeAlias = _Float32 | _Float16
_Part: TypeAlias = Literal["k8", "k4", "v8", "v4"]

_native = _core.kernels
# An INFEROS_ISA that cannot run here is a ConfigError now: where kernels are used, nothing may throw.
_native.active_isa()

_BLOCK_TOKENS = 64
_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)
_QUANTIZE = {part: getattr(_native, f"quantize_{part}") for part in ("k8", "k4", "v8", "v4")}
_DEQUANTIZE = {part: getattr(_native, f"dequantize_{part}") for part in ("k8", "k4", "v8", "v4")}


@dataclass(frozen=True, slots=True)
class Quantized:
    """Keys or values of blocks, quantised. The value of a code is ``minimum + scale * code``.

    All arrays have the blocks' dimensions first, none for one block.

    Parameters
    ----------
    part : "k8", "k4", "v8" or "v4"
        Keys (a grid per channel) or values (a grid per token), and the bits of a code.
    tokens : int
        Tokens of each block that were quantised, 1 to 64; the codes of the others are 0.
    head_dim : int
        Channels.
    codes : uint8, for v8 int8
        In the order of the block format: keys ``(..., 2, head_dim / 4, 32 tokens, 4 channels)`` with 8 bits and
        ``(..., 2, head_dim / 8, 32 tokens, 4)`` with 4, values ``(..., head_dim / 16, 16, 16 channels, 4 tokens)`` with
        8 bits and ``(..., head_dim / 16, 8, 16 channels, 4)`` with 4. A byte of 4-bit codes has items j below and 4 + j
        above.
    scales : (..., head_dim) for keys, (..., 64) for values, float16
    minima : as scales, or None for v8, which is symmetric around 0
    """

    part: _Part
    tokens: int
    head_dim: int
    codes: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    scales: _Float16
    minima: _Float16 | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima, as they stand in the blocks."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minima is None else self.minima.nbytes)


def runnable_isas() -> tuple[str, ...]:
    """Names of the instruction sets this CPU runs, "scalar" first, the fastest last."""
    return tuple(_native.runnable_isas())


def active_isa() -> str:
    """Name of the instruction set in use: the fastest, or the one that the environment variable INFEROS_ISA names."""
    return str(_native.active_isa())


def _empty(part: _Part, x: _Rows) -> Quantized:
    """Arrays for the quantised x, with what x's shape says whether it is right or not: the native side checks."""
    tokens, d = x.shape[-2:] if x.ndim >= 2 else (0, 0)
    blocks, bits = x.shape[:-2], int(part[1])
    tiles = (2, d * bits // 32, 32, 4) if part[0] == "k" else (d // 16, 2 * bits, 16, 4)
    grids = (*blocks, d if part[0] == "k" else _BLOCK_TOKENS)
    codes = np.empty((*blocks, *tiles), np.int8 if part == "v8" else np.uint8)
    minima = None if part == "v8" else np.empty(grids, np.float16)
    return Quantized(part, tokens, d, codes, np.empty(grids, np.float16), minima)


def _quantized(part: _Part, x: _Rows, isa: str, out: Quantized | None) -> Quantized:
    if out is None:
        out = _empty(part, x)
    elif (out.part, out.tokens, out.head_dim) != (part, *x.shape[-2:]):
        raise ShapeError(
            f"quantize_{part}: out is {out.part} of {out.tokens} tokens, head_dim {out.head_dim}; x has shape {x.shape}"
        )
    _QUANTIZE[part](x, out.codes, out.scales, out.minima, isa)
    return out


def _width(function: str, bits: int) -> Literal[8, 4]:
    if bits == 8:
        return 8
    if bits == 4:
        return 4
    raise ConfigError(f"{function}: bits is {bits!r}, wanted 8 or 4")


def quantize_k(x: _Rows, bits: int = 8, *, isa: str = "", out: Quantized | None = None) -> Quantized:
    """Quantise keys: one asymmetric grid per channel over the tokens.

    Per channel because keys have outlier channels, which would spoil a grid they share with others
    (https://arxiv.org/abs/2402.02750). NaN counts as 0, and values are clamped to ±65504.

    Parameters
    ----------
    x : (..., tokens, head_dim) float32 or float16
        1 to 64 tokens a block, any number of blocks.
    bits : 8 or 4
    isa : str
    out : Quantized, optional
        Written and returned: what an earlier call for the same shape returned.

    Returns
    -------
    Quantized
        With ``abs(x - (minimum + scale * code)) <= scale / 2`` for every value.

    Raises
    ------
    TypeError
        If x is of another dtype, or not C-contiguous.
    ShapeError
        If x is not (..., 1..64, a valid head_dim), or `out` is for another shape.
    ConfigError
        If bits is neither 8 nor 4, or isa cannot run here.
    """
    return _quantized("k8" if _width("quantize_k", bits) == 8 else "k4", x, isa, out)


def quantize_v(x: _Rows, bits: int = 8, *, isa: str = "", out: Quantized | None = None) -> Quantized:
    """Quantise values: one grid per token over the channels, symmetric with 8 bits, asymmetric with 4.

    Blocks rotate values before 4 bits; this function does not (see `rotate`).

    Parameters
    ----------
    x : (..., tokens, head_dim) float32 or float16
        1 to 64 tokens a block, any number of blocks.
    bits : 8 or 4
    isa : str
    out : Quantized, optional
        Written and returned: what an earlier call for the same shape returned.

    Returns
    -------
    Quantized
        With ``abs(x - (minimum + scale * code)) <= scale / 2`` for every value.

    Raises
    ------
    TypeError
        If x is of another dtype, or not C-contiguous.
    ShapeError
        If x is not (..., 1..64, a valid head_dim), or `out` is for another shape.
    ConfigError
        If bits is neither 8 nor 4, or isa cannot run here.
    """
    return _quantized("v8" if _width("quantize_v", bits) == 8 else "v4", x, isa, out)


def _dequantized(q: Quantized, half: bool, isa: str, out: _Rows | None) -> _Rows:
    dtype = _HALF if half else _SINGLE
    rows = np.empty((*q.codes.shape[:-4], q.tokens, q.head_dim), dtype) if out is None else out
    if rows.dtype != dtype:
        raise TypeError(f"dequantize_{q.part}: out has dtype {rows.dtype}, wanted {dtype}")
    if rows.shape[-2:] != (q.tokens, q.head_dim):
        raise ShapeError(f"dequantize_{q.part}: out has shape {rows.shape}, wanted (..., {q.tokens}, {q.head_dim})")
    _DEQUANTIZE[q.part](q.codes, q.scales, q.minima, rows, isa)
    return rows


def dequantize_k(q: Quantized, *, half: bool = False, isa: str = "", out: _Rows | None = None) -> _Rows:
    """Keys back from `quantize_k`.

    Parameters
    ----------
    q : Quantized
    half : bool, default False
        float16 instead of float32; beyond ±65504 it saturates.
    isa : str
    out : (..., tokens, head_dim) float32, or float16 where half, optional
        Written and returned.

    Returns
    -------
    (..., tokens, head_dim) float32 or float16

    Raises
    ------
    TypeError
        If `out` is of another dtype, or not C-contiguous.
    ShapeError
        If q holds values, or its arrays do not fit together.
    """
    if q.part[0] != "k":
        raise ShapeError(f"dequantize_k: q is {q.part!r}, wanted keys: k8 or k4")
    return _dequantized(q, half, isa, out)


def dequantize_v(q: Quantized, *, half: bool = False, isa: str = "", out: _Rows | None = None) -> _Rows:
    """Values back from `quantize_v`, rotated if they were.

    Parameters
    ----------
    q : Quantized
    half : bool, default False
        float16 instead of float32; beyond ±65504 it saturates.
    isa : str
    out : (..., tokens, head_dim) float32, or float16 where half, optional
        Written and returned.

    Returns
    -------
    (..., tokens, head_dim) float32 or float16

    Raises
    ------
    TypeError
        If `out` is of another dtype, or not C-contiguous.
    ShapeError
        If q holds keys, or its arrays do not fit together.
    """
    if q.part[0] != "v":
        raise ShapeError(f"dequantize_v: q is {q.part!r}, wanted values: v8 or v4")
    return _dequantized(q, half, isa, out)


def rotate(x: _Float32, *, isa: str = "", out: _Float32 | None = None) -> _Float32:
    """Apply the orthonormal Walsh-Hadamard transform that blocks apply to values before 4 bits.

    It works on chunks of ``min(128, the largest power of two that divides head_dim)`` channels, and is its own inverse
    up to rounding (https://arxiv.org/abs/2404.00456).

    Parameters
    ----------
    x : (..., rows, head_dim) float32
    isa : str
    out : (..., rows, head_dim) float32, optional
        Written and returned; here it may be x itself.

    Returns
    -------
    (..., rows, head_dim) float32

    Raises
    ------
    ShapeError
        If x is not at least two-dimensional with a valid head_dim, or `out` has another shape.
    """
    rotated = np.empty_like(x) if out is None else out
    _native.rotate(x, rotated, isa=isa)
    return rotated


def to_f16(x: _Float32, *, saturate: bool = False, isa: str = "", out: _Float16 | None = None) -> _Float16:
    """Convert to float16, to nearest, ties to even.

    Parameters
    ----------
    x : float32, any shape
    saturate : bool, default False
        Beyond ±65504, infinity included, becomes ±65504 instead of infinity. NaN stays NaN.
    isa : str
    out : float16 of the same shape, optional
        Written and returned.

    Returns
    -------
    float16 of the same shape

    Raises
    ------
    TypeError
        If an array is of another dtype, or not C-contiguous.
    ShapeError
        If `out` has another shape.
    """
    half = np.empty(x.shape, np.float16) if out is None else out
    _native.f32_to_f16(x, _bits(half, "to_f16: out"), saturate=saturate, isa=isa)
    return half


def to_f32(x: _Float16, *, isa: str = "", out: _Float32 | None = None) -> _Float32:
    """Convert float16 of any shape to float32, exactly.

    Parameters
    ----------
    x : float16, any shape
    isa : str
    out : float32 of the same shape, optional
        Written and returned.

    Returns
    -------
    float32 of the same shape

    Raises
    ------
    TypeError
        If an array is of another dtype, or not C-contiguous.
    ShapeError
        If `out` has another shape.
    """
    single = np.empty(x.shape, np.float32) if out is None else out
    _native.f16_to_f32(_bits(x, "to_f32: x"), single, isa=isa)
    return single


def _bits(half: _Float16, what: str) -> npt.NDArray[np.uint16]:
    if half.dtype != np.float16:
        raise TypeError(f"{what} has dtype {half.dtype}, wanted float16")
    return half.view(np.uint16)


def pack_block(block_format: BlockFormat, k: _Float32, v: _Float32) -> npt.NDArray[np.uint8]:
    """One block as the cache stores it, by the active instruction set. Values are rotated where the format asks for it.

    Parameters
    ----------
    block_format : "f16", "int8", "k8v4" or "int4"
    k, v : (tokens, head_dim) float32

    Returns
    -------
    (bytes,) uint8
        The record of csrc/kernels/block.hpp; a "f16" block has room for 64 tokens.

    Raises
    ------
    TypeError
        If k or v is of another dtype, or not C-contiguous.
    ShapeError
        If k is not (1..64, a valid head_dim), or v has another shape.
    ConfigError
        If the format is unknown.
    """
    block: npt.NDArray[np.uint8] = _native.pack_block(block_format, k, v)
    return block


def unpack_block(
    block_format: BlockFormat, block: npt.NDArray[np.uint8], head_dim: int, tokens: int = _BLOCK_TOKENS
) -> tuple[_Float32, _Float32]:
    """Keys and values of a block, un-rotated.

    Parameters
    ----------
    block_format : "f16", "int8", "k8v4" or "int4"
    block : (bytes,) uint8
        As `pack_block` returned it.
    head_dim : int
    tokens : int, default 64
        How many tokens to return, 1 to 64.

    Returns
    -------
    k, v : (tokens, head_dim) float32

    Raises
    ------
    ShapeError
        If head_dim or tokens is out of range, or the block has another length.
    ConfigError
        If the format is unknown.
    """
    k, v = _native.unpack_block(block_format, block, head_dim, tokens)
    return k, v
